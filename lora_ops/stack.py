"""Stacks: LoRAs in order, with strengths per model part, and the text that people and workflows write them in."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .errors import StackError, shown
from .lora import Lora

VERSION = 1
PARTS = ("model", "clip")


@dataclass(frozen=True)
class Row:
    """A line of a stack as written: a LoRA by name; clip is None where it follows strength."""

    name: str
    strength: float = 1.0
    clip: float | None = None
    on: bool = True

    @property
    def strengths(self) -> Mapping[str, float]:
        return {"model": self.strength, "clip": self.strength if self.clip is None else self.clip}


@dataclass(frozen=True, eq=False)
class Entry:
    """A LoRA in a stack and its strength per model part."""

    lora: Lora
    strengths: Mapping[str, float]


def finite(value: object, what: str) -> float:
    """A strength as a float. Raises StackError for NaN, Inf and what is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise StackError(f"{what} is {shown(value)}, it should be a finite number.")
    return float(value)


def parse(text: str) -> tuple[Row, ...]:
    """The rows of a stack's text: JSON `{"version":1,"rows":[{"lora":…,"on":…,"strength":…,"clip":…}]}`, or
    tags `<lora:name:strength:clip>`, one or more to a line. Empty text is an empty stack.

    Raises StackError, naming the row, for anything that would have to be guessed or ignored.
    """
    text = text.strip()
    if not text:
        return ()
    return _from_json(text) if text[0] in "{[" else _from_tags(text)


def dump(rows: Iterable[Row]) -> str:
    """The JSON text of a stack; parse reads it back."""
    listed = [
        {"lora": row.name, "on": row.on, "strength": row.strength} | ({} if row.clip is None else {"clip": row.clip})
        for row in rows
    ]
    return json.dumps({"version": VERSION, "rows": listed}, ensure_ascii=False)


def _from_json(text: str) -> tuple[Row, ...]:
    try:
        value = json.loads(text)
    except ValueError:
        try:  # the host turns a JSON object given to a text input into Python's spelling of it
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise StackError("The stack's text is no valid JSON.", remedy="Write rows or <lora:…> tags.") from error
    if not isinstance(value, dict) or value.get("version") != VERSION or not isinstance(value.get("rows"), list):
        raise StackError('The stack\'s text should be {"version": 1, "rows": [...]}.')
    if unknown := value.keys() - {"version", "rows"}:
        raise StackError(f"The stack's text has unknown fields: {shown(', '.join(sorted(map(str, unknown))))}.")
    return tuple(_row(number, row) for number, row in enumerate(value["rows"], 1))


def _row(number: int, row: object) -> Row:
    if not isinstance(row, dict) or not isinstance(row.get("lora"), str) or not row["lora"].strip():
        raise StackError(f"Row {number} of the stack names no LoRA.")
    if unknown := row.keys() - {"lora", "on", "strength", "clip"}:
        names = shown(", ".join(sorted(map(str, unknown))))
        raise StackError(f"Row {number} of the stack has fields this version does not know: {names}.")
    if not isinstance(row.get("on", True), bool):
        raise StackError(f"Row {number} of the stack: on should be true or false.")
    clip = row.get("clip")
    return Row(
        row["lora"].strip(),
        finite(row.get("strength", 1.0), f"The strength of row {number}"),
        None if clip is None else finite(clip, f"The CLIP strength of row {number}"),
        row.get("on", True),
    )


_TAG = re.compile(r"<lora:([^<>:]+)(?::([^<>:]*))?(?::([^<>:]*))?>")


def _from_tags(text: str) -> tuple[Row, ...]:
    if rest := _TAG.sub("", text).strip(" \t\r\n,"):
        raise StackError(f"The stack's text has something that is no <lora:name:strength> tag: {shown(rest)}.")
    return tuple(
        Row(
            name.strip(),
            _number(strength, number) if strength else 1.0,
            _number(clip, number) if clip else None,
        )
        for number, (name, strength, clip) in enumerate(_TAG.findall(text), 1)
    )


def _number(text: str, row: int) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    return finite(value, f"A strength of tag {row}, '{shown(text)}',")
