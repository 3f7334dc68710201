"""History: what a run has told step by step, in memory and in a file beside its state.

It is told by step: a step that comes again, because the run went on from an earlier state or began anew, replaces
all that came after it.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from .loop import Progress

FILE = "history.json"
VERSION = 1
COLUMNS = {"step": "q", "loss": "d", "smoothed": "d", "rate": "d", "seconds": "d"}
RECENT = 30  # steps that the speed is measured over


class Validation(NamedTuple):
    step: int
    loss: float
    best: bool


class Save(NamedTuple):
    step: int
    file: str  # its name, without folders
    best: bool


class Sample(NamedTuple):
    """How many pictures a step has: samples/<step>_0.png, …, made at a time in milliseconds."""

    step: int
    pictures: int
    at: int


Mark = TypeVar("Mark", Validation, Save, Sample)


class Ending(NamedTuple):
    how: str  # done, finished (early), cancelled or failed
    message: str
    at: float


@dataclass(eq=False)
class History:
    """node and workflow are the host's names for where it was begun; times are seconds since 1970."""

    name: str
    steps: int
    node: str
    workflow: str | None
    began: float
    ending: Ending | None = None
    memory: int = 0  # bytes in use at the last step
    columns: dict[str, array[Any]] = field(default_factory=lambda: {name: array(of) for name, of in COLUMNS.items()})
    validations: list[Validation] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    resumed: list[int] = field(default_factory=list)  # steps that it went on from
    _said: list[Any] = field(default_factory=list)  # marks since the last step: they may be of the one to come

    @property
    def step(self) -> int:
        """The last step that was done."""
        there = self.columns["step"]
        return there[-1] if there else 0

    @property
    def speed(self) -> float | None:
        """Steps a second, of late."""
        recent = self.columns["seconds"][-RECENT:]
        return len(recent) / total if (total := sum(recent)) > 0 else None

    def stepped(self, done: Progress, memory: int) -> None:
        self._reach(done.step)
        for name, column in self.columns.items():
            column.append(getattr(done, name))
        self.memory = memory
        if done.validation is not None:
            self._add(self.validations, Validation(done.step, done.validation, done.best))
        self._said.clear()

    def went_on(self, step: int) -> None:
        """The steps after this one are of a later sitting."""
        self.resumed = sorted({*self.resumed, step})

    def saved(self, step: int, file: str, best: bool) -> None:
        self._reach(step + 1)
        before = any(each.best for each in self.saves if each.step == step)
        self._add(self.saves, Save(step, file, best or before))

    def sampled(self, step: int, count: int, at: int) -> None:
        self._reach(step + 1)
        self._add(self.samples, Sample(step, count, at))

    def _reach(self, step: int) -> None:
        """Forget this step and what came after it, if that is here."""
        there = self.columns["step"]
        if not there or there[-1] < step:
            return
        kept = bisect_left(there, step)
        for column in self.columns.values():
            del column[kept:]
        self.validations = [each for each in self.validations if each.step < step]
        self.saves = [each for each in self.saves if each.step < step or each in self._said]
        self.samples = [each for each in self.samples if each.step < step or each in self._said]
        self.resumed = [each for each in self.resumed if each < step]

    def _add(self, marks: list[Mark], mark: Mark) -> None:
        """In its place; one of the same step is replaced."""
        marks[:] = [each for each in marks if each.step != mark.step]
        marks.insert(bisect_left([each.step for each in marks], mark.step), mark)
        self._said.append(mark)

    @property
    def best(self) -> int | None:
        """The step that was best by the held-out pictures."""
        return next((each.step for each in reversed(self.validations) if each.best), None)

    def loss_map(self) -> dict[str, Any]:
        """What travels on LOSS_MAP: core's list of losses, and beside it what core does not know."""
        return {
            "loss": self.columns["loss"].tolist(),
            "smoothed": self.columns["smoothed"].tolist(),
            "steps": self.columns["step"].tolist(),
            "validation": [[each.step, each.loss] for each in self.validations],
            "saves": [each.step for each in self.saves],
            "best": self.best,
        }

    def write(self, folder: Path) -> None:
        """Into the run's folder, the whole or nothing. Raises OSError."""
        told = {
            "version": VERSION,
            "name": self.name,
            "steps": self.steps,
            "node": self.node,
            "workflow": self.workflow,
            "began": self.began,
            "ending": self.ending,
            "memory": self.memory,
            "columns": {name: [_plain(each) for each in column] for name, column in self.columns.items()},
            "validations": [(each.step, _plain(each.loss), each.best) for each in self.validations],
            "saves": self.saves,
            "samples": self.samples,
            "resumed": self.resumed,
        }
        path = folder / FILE
        temporary = path.with_name(f".{FILE}.{secrets.token_hex(8)}.lora_ops_tmp")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(told, file, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def read(folder: Path) -> History:
    """Raises OSError where there is none, ValueError for what is no history."""
    told = json.loads((folder / FILE).read_text(encoding="utf-8"))
    try:
        if told["version"] != VERSION:
            raise ValueError(f"{FILE} is of version {told['version']}; this one reads {VERSION}.")
        columns = {name: array(of, map(_number, told["columns"][name])) for name, of in COLUMNS.items()}
        if len({len(column) for column in columns.values()}) != 1:
            raise ValueError(f"The columns of {FILE} are not of one length.")
        return History(
            name=str(told["name"]),
            steps=int(told["steps"]),
            node=str(told["node"]),
            workflow=None if told["workflow"] is None else str(told["workflow"]),
            began=float(told["began"]),
            ending=None if told["ending"] is None else Ending(*told["ending"]),
            memory=int(told["memory"]),
            columns=columns,
            validations=[Validation(int(step), _number(loss), bool(best)) for step, loss, best in told["validations"]],
            saves=[Save(int(step), str(file), bool(best)) for step, file, best in told["saves"]],
            samples=[Sample(int(step), int(count), int(at)) for step, count, at in told["samples"]],
            resumed=[int(each) for each in told["resumed"]],
        )
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{FILE} is no history of a run.") from error


def thinned(values: Sequence[float], most: int) -> list[int]:
    """The places of at most so many of these values, in order: the first, the last, and the lowest and highest of each
    of equal stretches between, so that no peak is lost."""
    count = len(values)
    if count <= most:
        return list(range(count))
    stretches = max(1, (most - 2) // 2)
    found = {0, count - 1}
    for number in range(stretches):
        stretch = range(number * count // stretches, (number + 1) * count // stretches)
        found |= {min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)}
    return sorted(found)


def _plain(value: float) -> float | None:
    """As JSON has it, which knows no NaN."""
    return value if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.nan if value is None else value
