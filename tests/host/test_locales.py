"""What the front end shows of our nodes in other languages says what the schemas say in English.

Hashes of the English texts, as they were when they were translated, lie in locales.json beside this file. Once the
translations of changed texts are right: `LORA_OPS_TRANSLATED=1 python -m pytest tests/host/test_locales.py`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
from pathlib import Path

import pytest

from harness.comfy import PACK

LANGUAGES = ("ja", "zh")
HASHES = Path(__file__).with_name("locales.json")
SAME = {"alpha", "clip", "dropout", "ema", "gamma", "lora", "vae", "VAE."}  # in every language, but for capitals
LITERAL = re.compile(r"%[^%]+%|`[^`]+`|<[^>]+>|\S*[_=/+]\S*|\w*[A-Z]{2,}\w*|[A-Z]\w*[A-Z]\w*")
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def inputs_of(entries, prefix=""):
    """Every input with its name on the wire, those within a dynamic combo too; what several choices have, once each."""
    for entry in entries:
        yield prefix + entry.id, entry
        for choice in getattr(entry, "options", None) or ():
            yield from inputs_of(getattr(choice, "inputs", ()), f"{prefix}{entry.id}.")


def choices(entry) -> list[str]:
    return [getattr(each, "key", each) for each in getattr(entry, "options", None) or ()]


@pytest.fixture(scope="module")
def schemas(pack):
    nodes = asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())
    return {schema.node_id: schema for schema in (node.define_schema() for node in nodes)}


@pytest.fixture(scope="module")
def english(schemas) -> dict[str, dict[str, str]]:
    """Node -> where the front end looks for a text -> the text."""
    found = {}
    for node, schema in schemas.items():
        texts = found[node] = {"display_name": schema.display_name, "description": schema.description}
        for name, entry in inputs_of(schema.inputs):
            at = f"inputs.{name.replace('.', '_')}"
            texts |= {f"{at}.name": entry.display_name or entry.id, f"{at}.tooltip": entry.tooltip}
        for number, entry in enumerate(schema.outputs):
            if entry.display_name != entry.io_type:  # else the front end shows its own word for the type
                texts[f"outputs.{number}.name"] = entry.display_name
            texts[f"outputs.{number}.tooltip"] = entry.tooltip
    return found


def translated(language: str) -> dict[str, dict[str, str]]:
    def flat(tree, at=""):
        for key, value in tree.items():
            yield from flat(value, f"{at}{key}.") if isinstance(value, dict) else [(at + key, value)]

    nodes = json.loads((PACK / "locales" / language / "nodeDefs.json").read_text("utf-8"))
    return {node: dict(flat(texts)) for node, texts in nodes.items()}


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_text_is_translated_and_nothing_else(english, language):
    found = translated(language)
    assert {node: list(texts) for node, texts in found.items()} == {
        node: list(texts) for node, texts in english.items()
    }
    untranslated = [
        f"{node}: {at}"
        for node, texts in english.items()
        for at, text in texts.items()
        if found[node][at].strip().lower() in ("", text.lower()) and text not in SAME
    ]
    assert not untranslated


@pytest.mark.parametrize("language", LANGUAGES)
def test_one_nodes_inputs_have_names_that_differ(english, language):
    for node, texts in translated(language).items():
        names = [text for at, text in texts.items() if re.fullmatch(r"inputs\.\w+\.name", at)]
        twice = {name for name in names if names.count(name) > 1}
        assert not twice, node


@pytest.mark.parametrize("language", LANGUAGES)
def test_numbers_and_what_is_typed_literally_are_in_the_translation(schemas, english, language):
    missing = []
    for node, found in translated(language).items():
        entries = {f"inputs.{name.replace('.', '_')}.tooltip": entry for name, entry in inputs_of(schemas[node].inputs)}
        names = {name: found[f"inputs.{name.replace('.', '_')}.name"] for name, _ in inputs_of(schemas[node].inputs)}
        for at, text in english[node].items():
            if at.endswith(".name") or at == "display_name":
                continue
            words = [re.sub(r"(?<=[A-Z])s$", "", each.strip("().,;:")) for each in LITERAL.findall(text)]
            words += [
                each for each in choices(entries.get(at)) if re.search(rf"(?<!\w){re.escape(each)}(?=[:,]| and )", text)
            ]
            missing += [f"{node}: {at}: {word}" for word in words if names.get(word, word) not in found[at]]
            numbers = set(NUMBER.findall(text)) - set(NUMBER.findall(found[at]))
            missing += [f"{node}: {at}: {number}" for number in sorted(numbers)]
    assert not missing


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_front_end_reads_a_text_as_it_is_written(language):
    """vue-i18n takes these characters for its own; files that are written as one writes them by hand differ little."""
    path = PACK / "locales" / language / "nodeDefs.json"
    told = [
        (node, at)
        for node, texts in translated(language).items()
        for at, text in texts.items()
        if re.search("[{}@|]", text)
    ]
    assert not told
    tree = json.loads(path.read_text("utf-8"))
    assert path.read_bytes().decode() == json.dumps(tree, ensure_ascii=False, indent=2) + "\n"


def test_no_english_text_has_changed_since_it_was_translated(english):
    now = {
        node: {at: hashlib.sha256(text.encode()).hexdigest()[:8] for at, text in texts.items()}
        for node, texts in english.items()
    }
    if os.environ.get("LORA_OPS_TRANSLATED"):
        HASHES.write_text(json.dumps(now, indent=2) + "\n", "utf-8", newline="\n")
    then = json.loads(HASHES.read_text("utf-8"))
    changed = [
        f"{node}: {at}" for node, texts in now.items() for at in texts if then.get(node, {}).get(at) != texts[at]
    ]
    assert not changed, (
        "translate anew in locales/, then: LORA_OPS_TRANSLATED=1 python -m pytest tests/host/test_locales.py"
    )
    assert now == then
