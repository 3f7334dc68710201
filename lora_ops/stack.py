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
from .select import Selector, decimal, parse_selectors

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
    """A line of a stack as written: a LoRA by name; clip is None where it follows strength.

    sha256, that of its file's tensors, finds a file that has another name here; "" where the writer knew none.
    """

    name: str
    strength: float = 1.0
    clip: float | None = None
    on: bool = True
    schedule: Schedule = Schedule()
    blocks: str = ""
    sha256: str = ""

    @property
    def strengths(self) -> Mapping[str, float]:
        return {"model": self.strength, "clip": self.strength if self.clip is None else self.clip}


@dataclass(frozen=True, eq=False)
class Entry:
    """A LoRA in a stack, its strength per model part, how that changes while the model samples, and in which blocks.

    asked is the name it was asked for, "" where that is its own; other_tensors if they are not those asked for.
    sha256 is that of its file's tensors, "" where nobody has computed it.
    """

    lora: Lora
    strengths: Mapping[str, float]
    schedule: Schedule = Schedule()
    blocks: tuple[Selector, ...] = ()
    asked: str = ""
    other_tensors: bool = False
    sha256: str = ""


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
    may have `start` and `end` (percent of sampling, 0 to 1), `schedule` ([[percent, factor], …]), `blocks` (selectors)
    and `sha256` (64 hex digits); or tags `<lora:name:strength:clip>`, one or more to a line. Empty text is an empty
    stack.

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
            value = _from_python(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            raise StackError("The stack's text is no valid JSON.", remedy="Write rows or <lora:…> tags.") from error
    if not isinstance(value, dict) or not _current(value.get("version")) or not isinstance(value.get("rows"), list):
        raise StackError('The stack\'s text should be {"version": 1, "rows": [...]}.')
    if unknown := value.keys() - {"version", "rows"}:
        raise StackError(f"The stack's text has unknown fields: {shown(', '.join(sorted(map(str, unknown))))}.")
    return tuple(_row(number, row) for number, row in enumerate(value["rows"], 1))


def _current(version: object) -> bool:
    return version == VERSION and not isinstance(version, bool)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    _require_unique(len(fields), len(pairs))
    return fields


def _from_python(text: str) -> object:
    tree = ast.parse(text, mode="eval")
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            _require_unique(len(ast.literal_eval(node)), len(node.keys))
    return ast.literal_eval(tree)


def _require_unique(fields: int, given: int) -> None:
    if fields != given:
        raise StackError("The stack's text gives a field twice.", remedy="Keep one of them.")


def _row(number: int, row: object) -> Row:
    if not isinstance(row, dict) or not isinstance(row.get("lora"), str) or not row["lora"].strip():
        raise StackError(f"Row {number} of the stack names no LoRA.")
    if unknown := row.keys() - {"lora", "on", "strength", "clip", "start", "end", "schedule", "blocks", "sha256"}:
        names = shown(", ".join(sorted(map(str, unknown))))
        raise StackError(f"Row {number} of the stack has fields this version does not know: {names}.")
    if not isinstance(row.get("on", True), bool):
        raise StackError(f"Row {number} of the stack: on should be true or false.")
    sha256 = row.get("sha256", "")
    if not isinstance(sha256, str) or not re.fullmatch(r"([0-9a-fA-F]{64})?", sha256):
        raise StackError(f"Row {number} of the stack: sha256 should be 64 hex digits.")
    clip = row.get("clip")
    return Row(
        row["lora"].strip(),
        finite(row.get("strength", 1.0), f"The strength of row {number}"),
        None if clip is None else finite(clip, f"The CLIP strength of row {number}"),
        row.get("on", True),
        _schedule(number, row.get("start", 0.0), row.get("end", 1.0), row.get("schedule", [])),
        _blocks(number, row.get("blocks", "")),
        sha256.lower(),
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


def _blocks(number: int, text: object) -> str:
    if not isinstance(text, str):
        raise StackError(f"Row {number} of the stack: blocks should be a text.", remedy="Write role:mlp=0.5, say.")
    try:
        parse_selectors(text)
    except StackError as error:
        raise StackError(f"Row {number} of the stack: {error.what}", remedy=error.remedy) from error
    return text.strip()


_TAG = re.compile(r"<lora:([^<>:]+)(?::([^<>:]*))?(?::([^<>:]*))?>")


def _from_tags(text: str) -> tuple[Row, ...]:
    if rest := _TAG.sub("", text).strip(" \t\r\n,"):
        raise StackError(f"The stack's text has something that is no <lora:name:strength> tag: {shown(rest)}.")
    return tuple(
        Row(
            name.strip(),
            _strength(strength, row) if strength else 1.0,
            _strength(clip, row) if clip else None,
        )
        for row, (name, strength, clip) in enumerate(_TAG.findall(text), 1)
    )


def _strength(text: str, row: int) -> float:
    return finite(decimal(text), f"A strength of tag {row}, '{shown(text)}',")
