"""What a LoRA answers to, and who says so."""

from __future__ import annotations

import json

import pytest

from lora_ops.words import SIDECAR_BYTES, TriggerWords, trigger_words

CAPTIONS = json.dumps({"10_cat": {"zwx": 20, "cat ": 18, "sofa": 3}})
PICTURES = json.dumps({"10_cat": {"n_repeats": 10, "img_count": 20}})
DREAMBOOTH = json.dumps({"10_sks dog": {}})


@pytest.mark.parametrize(
    ("metadata", "words", "source"),
    [
        ({}, (), ""),
        ({"modelspec.trigger_phrase": "ink wash, sumi-e"}, ("ink wash", "sumi-e"), "modelspec.trigger_phrase"),
        ({"modelspec.trigger_phrase": " ", "trigger_words": "zwx"}, ("zwx",), "trigger_words"),
        ({"ss_tag_frequency": CAPTIONS, "ss_dataset_dirs": PICTURES}, ("zwx", "cat"), "ss_tag_frequency"),
        ({"ss_tag_frequency": DREAMBOOTH}, ("sks dog",), "ss_tag_frequency"),
        ({"ss_tag_frequency": "{broken"}, (), ""),
        ({"ss_tag_frequency": "[1]"}, (), ""),
        ({"ss_tag_frequency": json.dumps({"3_a": "text"})}, ("a",), "ss_tag_frequency"),
        ({"ss_tag_frequency": json.dumps({"1_a": {"zwx": 10**400, "cat": -1}})}, ("a",), "ss_tag_frequency"),
        (
            {"ss_tag_frequency": CAPTIONS, "ss_dataset_dirs": json.dumps({"10_cat": {"img_count": 10**400}})},
            ("zwx", "cat"),
            "ss_tag_frequency",
        ),
        ({"trained_words": "zwx, zwx,"}, ("zwx",), "trained_words"),
        ({"activation text": "zwx"}, ("zwx",), "activation text"),
    ],
)
def test_metadata_tells_the_words(metadata, words, source):
    assert trigger_words(metadata) == TriggerWords(words, source)


def test_a_header_of_many_folders_is_parsed_once(monkeypatch):
    parsed, loads = [], json.loads
    monkeypatch.setattr(json, "loads", lambda text: (parsed.append(text), loads(text))[1])
    folders = {f"1_{number}": {} for number in range(9)}
    found = trigger_words({"ss_tag_frequency": json.dumps(folders), "ss_dataset_dirs": PICTURES})
    assert len(found.words) == 9 and parsed.count(PICTURES) == 1


def test_the_author_comes_first_then_captions_then_other_tools_then_the_files_beside_it(tmp_path):
    metadata = {"modelspec.trigger_phrase": "a", "ss_tag_frequency": DREAMBOOTH, "trained_words": "c"}
    (tmp_path / "ink.civitai.info").write_text('{"trainedWords": ["d"]}')
    (tmp_path / "ink.json").write_text('{"activation text": "e"}')
    (tmp_path / "ink.txt").write_text("f")
    found = []
    while (words := trigger_words(metadata, str(tmp_path / "ink.safetensors"))).words:
        found.append((*words.words, words.source))
        metadata.pop(words.source, None)
        (tmp_path / words.source).unlink(missing_ok=True)
    assert found == [
        ("a", "modelspec.trigger_phrase"),
        ("sks dog", "ss_tag_frequency"),
        ("c", "trained_words"),
        ("d", "ink.civitai.info"),
        ("e", "ink.json"),
        ("f", "ink.txt"),
    ]
    assert words == TriggerWords()


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("ink.civitai.info", '{"id": 1, "trainedWords": ["ink wash, sumi-e", "zwx"]}', ("ink wash", "sumi-e", "zwx")),
        ("ink.civitai.info", '{"trainedWords": [], "images": []}', ()),
        ("ink.json", '{"activation text": "ink wash, zwx", "preferred weight": 0.8}', ("ink wash", "zwx")),
        ("ink.json", '\ufeff{"trained words": ["zwx"]}', ("zwx",)),
        ("ink.json", '{"trainedWords": 5, "activation text": [null]}', ()),
        ("ink.txt", " ink wash,\nzwx\r\n", ("ink wash", "zwx")),
        ("other.txt", "zwx", ()),
    ],
)
def test_a_file_beside_it_tells_the_words(tmp_path, name, text, words):
    (tmp_path / name).write_text(text, encoding="utf-8")
    found = trigger_words({}, str(tmp_path / "ink.safetensors"))
    assert found == TriggerWords(words, name if words else "")


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("ink.civitai.info", b"{broken", "ink.civitai.info is no JSON object."),
        ("ink.json", b"[" * 100_000, "ink.json is no JSON object."),
        ("ink.json", b"[]", "ink.json is no JSON object."),
        ("ink.json", b'{"trainedWords": ["\xff"]}', "ink.json is no UTF-8 text."),
        ("ink.civitai.info", b" " * (SIDECAR_BYTES + 1), "ink.civitai.info is over the limit of 1,048,576 bytes."),
        ("ink.civitai.info/x", b"", "ink.civitai.info cannot be read: "),
    ],
)
def test_a_broken_file_is_told_and_the_next_one_read(tmp_path, name, content, fault):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    (tmp_path / "ink.txt").write_text("zwx")
    found = trigger_words({}, str(tmp_path / "ink.safetensors"))
    (told,) = found.faults
    assert found == TriggerWords(("zwx",), "ink.txt", (told,)) and told.startswith(fault)
    assert found.text == f"zwx (from ink.txt)\n{told}"


def test_a_name_as_long_as_a_name_may_be_has_words_too(tmp_path):
    stem = "x" * 243  # with .safetensors the 255 that file systems allow, with .civitai.info one more
    (tmp_path / f"{stem}.txt").write_text("zwx")
    assert trigger_words({}, str(tmp_path / f"{stem}.safetensors")).words == ("zwx",)


@pytest.mark.parametrize("text", ["word " * 201, "a\nb\nc\nd\ne\nf\n"])
def test_a_text_as_long_as_a_readme_is_not_taken_for_words(tmp_path, text):
    (tmp_path / "ink.txt").write_text(text)
    found = trigger_words({}, str(tmp_path / "ink.safetensors"))
    assert found == TriggerWords(faults=("ink.txt is too long for trigger words.",)) and found.text.startswith("none\n")
