"""The rows of a stack in the browser: they read what the server reads, and nothing is lost on the way back."""

from __future__ import annotations

import json
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode

import pytest
import torch

from harness.server import MOUNT
from lora_ops.errors import StackError
from lora_ops.files import write
from lora_ops.select import parse_selectors
from lora_ops.stack import parse

ROWS = f"/extensions/{MOUNT}/rows.js"
TEXTS = (
    "",
    " \n",
    "<lora:ink>",
    "<lora:style/ink:0.8>\n<lora:style/ink:0.8:0.6>",
    "<lora:ink:.5>, <lora:ink::0.4> <lora: ink : 1e-3 >",
    "<lora:ink:-2.>",
    "<lora:a\\b\\ink:1>",
    '{"version":1,"rows":[]}',
    '{"version":1,"rows":[{"lora":"ink"}]}',
    '\n {"version": 1, "rows": [{"lora": "ink", "on": false, "strength": -0.5, "clip": 0}]}',
    '{"version":1,"rows":[{"lora":"a:\\"b\\":c","clip":null,"start":0.25,"end":0.5,"schedule":[[0.3,1],[0.4,0]]}]}',
)
REFUSED = (
    "ink",
    "<lora:ink:0.8> and more",
    "<lora:ink:much>",
    "<lora:ink:inf>",
    "<lora:ink:0,8>",
    "<lora:ink:1_000>",
    "<lora::1>",
    "{",
    "[]",
    '{"rows":[]}',
    '{"version":2,"rows":[]}',
    '{"version":1,"rows":[],"more":1}',
    '{"version":1,"rows":[7]}',
    '{"version":1,"rows":[{"strength":1}]}',
    '{"version":1,"rows":[{"lora":" "}]}',
    '{"version":1,"rows":[{"lora":"ink","on":1}]}',
    '{"version":1,"rows":[{"lora":"ink","strength":"1"}]}',
    '{"version":1,"rows":[{"lora":"ink","strength":true}]}',
    '{"version":1,"rows":[{"lora":"ink","strength":NaN}]}',
    '{"version":1,"rows":[{"lora":"ink","strength":1e999}]}',
    '{"version":1,"rows":[{"lora":"ink","clip":[]}]}',
    '{"version":1,"rows":[{"lora":"ink","start":"0"}]}',
    '{"version":1,"rows":[{"lora":"ink","strength":1,"strength":2}]}',
)
NAMES = ["style/ink.safetensors", "a/twin.safetensors", "b/twin.safetensors", "old\\win.safetensors"]
CASES = ["x/Nib.safetensors", "y/NIB.safetensors", "z/nib.SAFETENSORS", "y/Caf\u00e9 Stra\u00dfe.safetensors"]

LANDINGS = """
    const find = rows.finder(given[2]);
    return rows.landings(given[0], {rows: given[1]}, (row) => find(row.lora));
"""


@pytest.fixture(scope="module")
def rows(browser, server):
    """Calls a function of rows.js: on a page without the front end, which it does not need."""
    browser.get(f"{server.url}{ROWS}")

    def call(body: str, *given: Any) -> Any:
        script = f"const [given, done] = arguments; import('{ROWS}').then((rows) => {{ {body} }})"
        answer = browser.execute_async_script(f"{script}.then(done, (error) => done({{error: error.name}}))", given)
        assert not isinstance(answer, dict) or "error" not in answer, answer
        return answer

    return call


@pytest.fixture(scope="module")
def cases(server):
    """Names that differ in case, as files of the server."""
    folder = server.base / "models/loras"
    for name in CASES:
        (folder / name).parent.mkdir(exist_ok=True)
        shapes = {"lora_unet_out_2.lora_up.weight": (4, 1), "lora_unet_out_2.lora_down.weight": (1, 4)}
        write(folder / name, {key: torch.ones(shape) for key, shape in shapes.items()}, overwrite=True)
    yield
    for name in CASES:
        (folder / name).unlink()


def meaning(text: str) -> list[Any]:
    return list(parse(text))


@pytest.mark.parametrize("text", TEXTS)
def test_rows_mean_in_the_browser_what_they_mean_on_the_server(rows, text):
    found = rows("return rows.parse(given[0]);", text)
    assert [(row["lora"].strip(), row["on"], row["strength"], row["clip"]) for row in found] == [
        (row.name, row.on, row.strength, row.clip) for row in parse(text)
    ]


@pytest.mark.parametrize("text", TEXTS)
def test_written_and_tidied_rows_mean_the_same(rows, text):
    written, tidied = rows("return [rows.serialise(rows.parse(given[0])), rows.tidy(given[0])];", text)
    assert meaning(written) == meaning(tidied) == meaning(text)
    assert rows("return rows.serialise(rows.parse(given[0]));", written) == written


def test_fields_that_rows_do_not_know_are_written_as_they_were(rows):
    row = {
        "lora": "ink",
        "on": True,
        "strength": 1,
        "clip": 0.5,
        "sha256": "ab",
        "blocks": "mid=0",
        "new": {"x": [None]},
    }
    text = json.dumps({"version": 1, "rows": [row]}, separators=(",", ":"))
    assert rows("return rows.serialise(rows.parse(given[0]));", text) == text


@pytest.mark.parametrize("text", REFUSED)
def test_a_text_that_the_server_refuses_has_no_rows(rows, text):
    with pytest.raises(StackError):
        parse(text)
    told = rows("try { return rows.parse(given[0]); } catch (error) { return [error.constructor.name]; }", text)
    assert told == ["StackTextError"]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("style/ink.safetensors", ["style/ink.safetensors"]),
        (r"style\ink.safetensors", ["style/ink.safetensors"]),
        ("style/ink", ["style/ink.safetensors"]),
        (" ink ", ["style/ink.safetensors"]),
        ("moved/to/ink", ["style/ink.safetensors"]),
        ("old/win", ["old/win.safetensors"]),
        ("a/twin", ["a/twin.safetensors"]),
        ("twin", ["a/twin.safetensors", "b/twin.safetensors"]),
        ("in", []),
    ],
)
def test_a_name_is_found_as_the_server_finds_it(rows, name, found):
    assert rows("return rows.finder(given[0])(given[1]);", NAMES, name) == found


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("X/nib", CASES[:1]),
        ("y/nib", CASES[1:2]),
        ("gone/Nib", CASES[:1]),
        ("nIb", CASES[:3]),
        ("Y/CAFE\u0301 STRASSE", CASES[3:]),
        ("cafe\u0301 strasse", CASES[3:]),
        ("cafe strasse", []),
    ],
)
def test_a_name_is_found_without_its_case_as_the_server_finds_it(rows, server, cases, name, found):
    assert rows("return rows.finder(given[0])(given[1]);", CASES, name) == found
    try:
        assert [server.json(f"/lora_ops/lora?{urlencode({'name': name})}")["resolved"]] == found
    except HTTPError as error:
        candidates = json.loads(error.read())["candidates"]
        assert len(found) != 1 and (not found or candidates == found)


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("ink", ["style/ink_wash", "think", "ink/oil"]),
        ("INK WASH", ["style/ink_wash"]),
        ("stw", ["style/ink_wash"]),
        ("oil", ["ink/oil"]),
        ("safe", []),
        ("xyz", []),
        ("", ["think", "ink/oil", "style/ink_wash"]),
    ],
)
def test_a_search_finds_the_file_before_the_folder_and_words_before_letters(rows, query, names):
    given = [f"{name}.safetensors" for name in ("think", "ink/oil", "style/ink_wash")]
    found = rows("return rows.search(given[0], given[1]).map(({name}) => name);", query, given)
    assert [name.removesuffix(".safetensors") for name in found] == names


def test_a_search_tells_which_letters_it_found(rows):
    [found] = rows("return rows.search('ink wa', ['style/Ink_Wash']).map(({at}) => [...at]);")
    assert found == [6, 7, 8, 10, 11]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[
            ("0.8", 0.8),
            ("0,8", 0.8),
            (" -1 ", -1),
            (".5", 0.5),
            ("1.", 1),
            ("1e2", 100),
            (",5", 0.5),
            ("-1,25", -1.25),
        ],
        *[(text, None) for text in ("", "1 2", "1e999", "1,000", "1,2,3", "1,5e3", "1_000", ",")],
    ],
)
def test_a_number_is_typed_with_either_decimal_sign(rows, text, value):
    assert rows("return rows.typed(given[0]);", text) == value


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.8, "0.80"), (-1, "-1.00"), (0.125, "0.125"), (0.1 + 0.2, "0.3"), (100, "100.00"), (1 / 3, "0.3333")],
)
def test_a_number_is_shown_with_two_decimals_or_up_to_four(rows, value, text):
    assert rows("return rows.format(given[0]);", value) == text


def test_a_drag_leaves_no_dust_of_binary_fractions(rows):
    assert rows("return [rows.moved(0.1, 20, 0.01), rows.moved(0.3, -30, 0.01), rows.moved(0.8, 1, 0.001)];") == [
        0.3,
        0,
        0.801,
    ]


@pytest.mark.parametrize(
    ("blocks", "line"), [("a=1\nb=0", "a=1, b=0"), (" a=1,\r\n\n b=0\n", "a=1, b=0"), ("a=1,b=0", "a=1,b=0")]
)
def test_blocks_in_one_line_mean_the_same(rows, blocks, line):
    assert rows("return rows.oneLine(given[0]);", blocks) == line
    assert parse_selectors(line) == parse_selectors(blocks)


def test_a_receipts_lines_go_to_the_rows_that_were_on(rows):
    """An incoming `ink` comes first in the receipt; `twin` names two files; `oil` was added after the run."""
    lines = [
        {"lora": "style/ink.safetensors", "n": 1},
        {"lora": r"style\ink.safetensors", "n": 2},
        {"lora": "b/twin.safetensors"},
    ]
    given = [{"lora": name, "on": on} for name, on in [("oil", True), ("ink", False), ("ink", True), ("twin", True)]]
    assert rows(LANDINGS, given, lines, NAMES) == [None, None, lines[1], None]


def test_a_receipts_line_goes_to_the_row_that_asked_for_it_by_another_name(rows):
    lines = [{"lora": "style/ink.safetensors", "asked": "gone"}, {"lora": "style/ink.safetensors", "asked": None}]
    given = [{"lora": " gone ", "on": True}, {"lora": "style/ink", "on": True}, {"lora": "lost", "on": True}]
    assert rows(LANDINGS, given, lines, NAMES) == [*lines, None]


def test_a_line_tells_what_landed_in_short_and_in_full(rows):
    refused = [{"reason": "no such weight", "count": 2}]
    line = {
        "matched": 4,
        "total": 6,
        "parts": {"model": {"matched": 4, "total": 6}, "clip": {"matched": 0, "total": 0}},
        "refused": refused,
        "idle": 1,
        "blocks": {"role:mlp=0": 2},
    }
    told = rows("return rows.told(given[0]);", {**line, "unconnected": {"clip": 3}})
    assert (told["good"], told["short"]) == (False, "! 4/6")
    assert told["full"] == [
        "4 of 6 modules landed (model 4/6)",
        "3 for clip, which is not connected",
        "2 refused: no such weight",
        "1 of the landed are all zero",
    ]
    whole = {**line, "total": 4, "unconnected": {}}
    assert rows("return rows.told(given[0]).short;", whole) == "✓ 4"
    told = rows("return rows.told(given[0]);", {**whole, "blocks": {"role:text=0": 0}})
    assert told["short"] == "! 4/4" and "role:text=0 touches no module" in told["full"]


def test_what_is_told_of_a_file_leaves_out_what_is_not_known(rows):
    told = rows(
        "return given.map(rows.about);", None, {}, {"family": "SDXL", "rank": {"16": 9}, "trigger_words": ["a", "b"]}
    )
    assert told == [[], [], ["SDXL, rank 16", "trigger words: a, b"]]
