"""A stack's text: what people and workflows write, and what is refused."""

from __future__ import annotations

import json

import pytest

from lora_ops.errors import StackError
from lora_ops.stack import Row, parse

INK = Row("style/ink.safetensors", 0.8, 0.6)


@pytest.mark.parametrize(
    "text",
    [
        '{"version":1,"rows":[{"lora":"style/ink.safetensors","on":true,"strength":0.8,"clip":0.6}]}',
        '{"version": 1, "rows": [{"lora": " style/ink.safetensors ", "strength": 0.8, "clip": 0.6}]}',
        "{'version': 1, 'rows': [{'lora': 'style/ink.safetensors', 'on': True, 'strength': 0.8, 'clip': 0.6}]}",
        "<lora:style/ink.safetensors:0.8:0.6>",
        "  <lora: style/ink.safetensors :.8:0.60>\n",
    ],
)
def test_spellings_of_the_same_stack(text):
    assert parse(text) == (INK,)


def test_order_and_rows_that_are_off_are_kept():
    rows = parse('{"version":1,"rows":[{"lora":"b","on":false},{"lora":"a","strength":-1}]}')
    assert rows == (Row("b", on=False), Row("a", -1.0))
    assert parse("<lora:b>\n<lora:a:-1>, <lora:c:2:0>") == (Row("b"), Row("a", -1.0), Row("c", 2.0, 0.0))


def test_without_a_clip_strength_clip_follows_the_model():
    assert Row("a", 0.3).strengths == {"model": 0.3, "clip": 0.3}
    assert INK.strengths == {"model": 0.8, "clip": 0.6}


def test_a_schedule_is_a_line_between_its_points_inside_its_window():
    (row,) = parse('{"version":1,"rows":[{"lora":"a","start":0.1,"end":0.9,"schedule":[[0.2,1],[0.6,0],[0.8,2]]}]}')
    percents = (0.0, 0.1, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95)
    assert [round(row.schedule.at(p), 9) for p in percents] == [0, 1, 1, 0.5, 0, 1, 2, 2, 0]
    assert not row.schedule.constant and Row("a").schedule.constant and Row("a").schedule.at(0.3) == 1


def test_a_row_may_carry_the_hash_of_its_tensors():
    digits = "0123456789ABCDEF" * 4
    text = json.dumps({"version": 1, "rows": [{"lora": "a", "sha256": digits}, {"lora": "b", "sha256": ""}]})
    assert parse(text) == (Row("a", sha256=digits.lower()), Row("b"))


def test_a_row_keeps_the_text_of_its_blocks():
    (row,) = parse('{"version":1,"rows":[{"lora":"a","blocks":" role:mlp=0.5, *.attn=2 "}]}')
    assert row == Row("a", blocks="role:mlp=0.5, *.attn=2") and Row("a").blocks == ""


@pytest.mark.parametrize("text", ["", "  \n"])
def test_no_text_is_an_empty_stack(text):
    assert parse(text) == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a cat <lora:ink:1>", "no <lora:name:strength> tag: a cat"),
        ("<lora:ink:strong>", "finite number"),
        ("<lora:ink:nan>", "finite number"),
        ("<lora:ink:1:inf>", "finite number"),
        ("<lora:ink:1:1:1>", "no <lora:name:strength> tag"),
        ('{"version":2,"rows":[]}', "version"),
        ('{"rows":[]}', "version"),
        ('{"version":1,"rows":[{"strength":1}]}', "Row 1 of the stack names no LoRA"),
        ('{"version":1,"rows":[{"lora":"a","strength":true}]}', "finite number"),
        ('{"version":1,"rows":[{"lora":"a","strength":"1"}]}', "finite number"),
        ('{"version":1,"rows":[{"lora":"a","strength":NaN}]}', "finite number"),
        ('{"version":1,"rows":[{"lora":"a","on":1}]}', "true or false"),
        ('{"version":1,"rows":[{"lora":"a","block":"x"}]}', "does not know: block"),
        ('{"version":1,"rows":[{"lora":"a","sha256":"abc"}]}', "64 hex digits"),
        ('{"version":1,"rows":[{"lora":"a","sha256":"%s"}]}' % ("0" * 65), "64 hex digits"),
        ('{"version":1,"rows":[{"lora":"a","sha256":5}]}', "64 hex digits"),
        ('{"version":1,"rows":[{"lora":"a","start":0.5,"end":0.5}]}', "within 0 to 1"),
        ('{"version":1,"rows":[{"lora":"a","end":1.5}]}', "within 0 to 1"),
        ('{"version":1,"rows":[{"lora":"a","schedule":"0:1"}]}', r"should be \[\[percent, factor\]"),
        ('{"version":1,"rows":[{"lora":"a","schedule":[[0,1,2]]}]}', r"should be \[\[percent, factor\]"),
        ('{"version":1,"rows":[{"lora":"a","schedule":[[0.5,1],[0.2,0]]}]}', "should rise"),
        ('{"version":1,"rows":[{"lora":"a","schedule":[[0,"1"]]}]}', "finite number"),
        ('{"version":1,"rows":[{"lora":"a","blocks":0.5}]}', "blocks should be a text"),
        ('{"version":1,"rows":[{"lora":"b"},{"lora":"a","blocks":"role:x=1"}]}', "Row 2 of the stack: 'x' is no role"),
        ('{"version":1,"rows":[],"more":1}', "unknown fields: more"),
        ('{"version":1,"rows":[{"lora":"a","lora":"b"}]}', "a field twice"),
        ('{"version":1,"rows":[{"lora":"a","strength":1%s}]}' % ("0" * 400), "finite number"),
        ("[" * 100_000, "no valid JSON"),
        ("{broken", "no valid JSON"),
        ("[1,2]", "should be"),
        ("{[1]: 2}", "no valid JSON"),
        ("{{1:2}:2}", "no valid JSON"),
        ("{'version':1,'rows':[{'lora':'a','lora':'b'}]}", "a field twice"),
        ('{"version":true,"rows":[]}', "version"),
        ("<lora:ink:1_0>", "finite number"),
        ("<lora:ink:1:\u0661>", "finite number"),
    ],
)
def test_what_would_have_to_be_guessed_is_refused(text, words):
    with pytest.raises(StackError, match=words):
        parse(text)
