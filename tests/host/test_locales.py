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
    """Where the front end looks for an input's texts -> the input; those within a dynamic combo too."""
    for entry in entries:
        yield f"inputs.{prefix}{entry.id}", entry
        for choice in getattr(entry, "options", None) or ():
            yield from inputs_of(getattr(choice, "inputs", ()), f"{prefix}{entry.id}_")


@pytest.fixture(scope="module")
def schemas(pack):
    nodes = asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())
    return [node.define_schema() for node in nodes]


@pytest.fixture(scope="module")
def english(schemas) -> dict[str, dict[str, str]]:
    """Node -> where the front end looks for a text -> the text."""
    found = {}
    for schema in schemas:
        texts = found[schema.node_id] = {"display_name": schema.display_name, "description": schema.description}
        for at, entry in inputs_of(schema.inputs):
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
    assert not [
        f"{node}: {at}"
        for node, texts in english.items()
        for at, text in texts.items()
        if found[node][at].strip().lower() in ("", text.lower()) and text not in SAME
    ]


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_names_of_nodes_and_inputs_differ_and_tooltips_call_them_by_them(language):
    found = translated(language)
    titles = [texts["display_name"].removesuffix(" (LoRA Ops)") for texts in found.values()]
    assert len(set(titles)) == len(titles)
    for node, texts in found.items():
        names = [text for at, text in texts.items() if re.fullmatch(r"inputs\.\w+\.name", at)]
        assert len(set(names)) == len(names), node
        for at, text in texts.items():
            assert {*re.findall("[“「]([^”」]+)[”」]", text)} <= {*names, *titles}, f"{node}: {at}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_numbers_and_what_is_typed_literally_are_in_the_translation(schemas, english, language):
    missing = []
    for schema in schemas:
        found, inputs = translated(language)[schema.node_id], dict(inputs_of(schema.inputs))
        names = {at.removeprefix("inputs."): found[f"{at}.name"] for at in inputs}
        for at, text in english[schema.node_id].items():
            if at.endswith("name"):
                continue
            words = [re.sub(r"(?<=[A-Z])s$", "", each.strip("().,;:")) for each in LITERAL.findall(text)]
            chosen = [
                getattr(each, "key", each)
                for each in getattr(inputs.get(at.removesuffix(".tooltip")), "options", None) or ()
            ]
            words += [each for each in chosen if re.search(rf"(?<!\w){re.escape(each)}(?=[:,]| and )", text)]
            lost = [word for word in words if names.get(word, word) not in found[at]]
            lost += {*NUMBER.findall(text)} - {*NUMBER.findall(found[at])}
            missing += [f"{schema.node_id}: {at}: {each}" for each in lost]
    assert not missing


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_front_end_reads_a_text_as_it_is_written(language):
    text = (PACK / "locales" / language / "nodeDefs.json").read_bytes().decode()
    assert text == json.dumps(json.loads(text), ensure_ascii=False, indent=2) + "\n"
    special = "[{}@|]"  # to vue-i18n
    found = translated(language)
    assert not [f"{node}: {at}" for node in found for at, each in found[node].items() if re.search(special, each)]


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
