"""Captions: where they come from, and what training makes of them."""

from __future__ import annotations

import pytest

from lora_ops.errors import FileError
from lora_ops.train.captions import orders, read_caption, read_table, triggered


@pytest.mark.parametrize(
    ("caption", "trigger", "wanted"),
    [
        ("a dog", "zorp", "zorp, a dog"),
        ("a Zorp dog", "zorp", "a Zorp dog"),
        ("", "zorp", "zorp"),
        ("a dog", "", "a dog"),
    ],
)
def test_every_caption_has_the_trigger_word_once(caption, trigger, wanted):
    assert triggered(caption, trigger) == wanted


def test_orders_hold_the_same_tags_with_the_first_in_place_and_are_the_same_each_time():
    caption = "zorp, red, large, at the left, on grass"
    found = orders(caption, 6, 2)
    assert found[0] == caption and len(set(found)) == 6
    for each in found:
        tags = each.split(", ")
        assert tags[:2] == ["zorp", "red"] and sorted(tags) == sorted(caption.split(", "))
    assert found == orders(caption, 6, 2)


def test_a_caption_has_no_more_orders_than_there_are():
    assert orders("zorp, red", 10, 1) == ("zorp, red",)
    assert sorted(orders("zorp, red, large", 10, 1)) == ["zorp, large, red", "zorp, red, large"]
    assert orders("", 10, 1) == ("",)


def test_a_captions_lines_are_one(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffa zorp\r\n on  grass\n".encode())
    assert read_caption(file) == "a zorp on grass"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FileError, match="no UTF-8"):
        read_caption(file)


def test_a_table_tells_captions_and_names_the_line_that_is_wrong(tmp_path):
    table = tmp_path / "metadata.jsonl"
    assert read_table(tmp_path) == {}
    table.write_text('{"file_name": "a.png", "text": "a  zorp"}\n\n{"file_name": "b\\\\c.png", "caption": "dog"}\n')
    assert read_table(tmp_path) == {"a.png": "a zorp", "b/c.png": "dog"}
    for line in ('{"file_name": "a.png"}', "[]", "no JSON", '{"file_name": 1, "text": "x"}', "[" * 100_000):
        table.write_text('{"file_name": "a.png", "text": "x"}\n' + line)
        with pytest.raises(FileError, match="line 2 is not like"):
            read_table(tmp_path)
