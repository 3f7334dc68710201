"""Stacks: LoRAs in order, with strengths per model part, and the text that people and workflows write them in."""

from __future__ import annotations

import ast
import json
import math
import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real

from .errors import StackError, shown
from .lora import Lora

VERSION = 1
PARTS = ("model", "clip")


@dataclass(frozen=True)
class Schedule:
    """How a strength changes while sampling, over percent from 0 (noise) to 1 (done): nothing outside of start to
    end, inside a factor that runs straight from point to point (percent, factor) and stays level beyond them."""

    start: float = 0.0
    end: float = 1.0
    points: tuple[tuple[float, float], ...] = ()

    @property
    def constant(self) -> bool:
        return self == Schedule()

    def at(self, percent: float) -> float:
        """The factor at a percent."""
        if not self.start <= percent <= self.end:
            return 0.0
        if not self.points:
            return 1.0
        after = bisect_right(self.points, percent, key=lambda point: point[0])
        if after in (0, len(self.points)):
            return self.points[min(after, len(self.points) - 1)][1]
        (left, low), (right, high) = self.points[after - 1], self.points[after]
        return low + (high - low) * (percent - left) / (right - left)


@dataclass(frozen=True)
class Row:
    """A line of a stack as written: a LoRA by name; clip is None where it follows strength."""

    name: str
    strength: float = 1.0
    clip: float | None = None
    on: bool = True
    schedule: Schedule = Schedule()

    @property
    def strengths(self) -> Mapping[str, float]:
        return {"model": self.strength, "clip": self.strength if self.clip is None else self.clip}


@dataclass(frozen=True, eq=False)
class Entry:
    """A LoRA in a stack, its strength per model part, and how that changes while the model samples."""

    lora: Lora
    strengths: Mapping[str, float]
    schedule: Schedule = Schedule()


def finite(value: object, what: str) -> float:
    """A strength as a float. Raises StackError for NaN, Inf and what is no number."""
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise StackError(f"{what} is {shown(value)}, it should be a finite number.")
    return number


def parse(text: str) -> tuple[Row, ...]:
    """The rows of a stack's text: JSON `{"version":1,"rows":[{"lora":…,"on":…,"strength":…,"clip":…}]}`, where a row
    may have `start` and `end` (percent of sampling, 0 to 1) and `schedule` ([[percent, factor], …]); or tags
    `<lora:name:strength:clip>`, one or more to a line. Empty text is an empty stack.

    Raises StackError, naming the row, for anything that would have to be guessed or ignored.
    """
    text = text.strip()
    if not text:
        return ()
    return _from_json(text) if text[0] in "{[" else _from_tags(text)


def _from_json(text: str) -> tuple[Row, ...]:
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        try:  # the host turns a JSON object given to a text input into Python's spelling of it
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise StackError("The stack's text is no valid JSON.", remedy="Write rows or <lora:…> tags.") from error
    if not isinstance(value, dict) or value.get("version") != VERSION or not isinstance(value.get("rows"), list):
        raise StackError('The stack\'s text should be {"version": 1, "rows": [...]}.')
    if unknown := value.keys() - {"version", "rows"}:
        raise StackError(f"The stack's text has unknown fields: {shown(', '.join(sorted(map(str, unknown))))}.")
    return tuple(_row(number, row) for number, row in enumerate(value["rows"], 1))


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise StackError("The stack's text gives a field twice.", remedy="Keep one of them.")
    return fields


def _row(number: int, row: object) -> Row:
    if not isinstance(row, dict) or not isinstance(row.get("lora"), str) or not row["lora"].strip():
        raise StackError(f"Row {number} of the stack names no LoRA.")
    if unknown := row.keys() - {"lora", "on", "strength", "clip", "start", "end", "schedule"}:
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
        _schedule(number, row.get("start", 0.0), row.get("end", 1.0), row.get("schedule", [])),
    )


def _schedule(number: int, start: object, end: object, points: object) -> Schedule:
    first, last = finite(start, f"The start of row {number}"), finite(end, f"The end of row {number}")
    if not 0 <= first < last <= 1:
        raise StackError(f"Row {number} of the stack runs from {first:g} to {last:g}, it should be within 0 to 1.")
    if not isinstance(points, list) or not all(isinstance(point, list) and len(point) == 2 for point in points):
        raise StackError(f"Row {number} of the stack: schedule should be [[percent, factor], …].")
    pairs = tuple((finite(p, f"A percent of row {number}"), finite(f, f"A factor of row {number}")) for p, f in points)
    percents = [percent for percent, _ in pairs]
    if percents != sorted(set(percents)) or not all(0 <= percent <= 1 for percent in percents):
        raise StackError(f"Row {number} of the stack: the percents of a schedule should rise, from 0 to 1 at most.")
    return Schedule(first, last, pairs)


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
