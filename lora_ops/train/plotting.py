"""Plotting: a run's losses as a picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from ..errors import TrainingError, shown
from .history import thinned

FINE = 2  # drawn so many times as large, and then made smaller: lines come out smooth
PAPER, INK, GRID = "#ffffff", "#3c4250", "#e6e9ef"
RAW, SMOOTHED, VALIDATION, BEST, SAVED = "#bcd0ee", "#2563c9", "#d9672a", "#1f9254", "#8b93a3"
PAST = 0.95  # its share in a smoothed loss, where none came

Points = Sequence[tuple[float, float]]


class Curves(NamedTuple):
    """Of a run, by step: what was lost, smoothed, of held-out pictures; the steps of its saves, and the best one."""

    raw: Points
    smoothed: Points
    validation: Points
    saves: Sequence[int]
    best: int | None

    @classmethod
    def of(cls, loss_map: Any) -> Curves:
        """From a LOSS_MAP, core's too, which has losses alone. Raises TrainingError for what is none, or empty."""
        losses = loss_map.get("loss") if isinstance(loss_map, Mapping) else None
        if not losses:
            raise TrainingError("There are no losses to draw.", remedy="Connect the loss_map of a run with a step.")
        steps = loss_map.get("steps") or range(1, len(losses) + 1)
        smoothed = loss_map.get("smoothed") or list(_smoothed(losses))
        if not len(losses) == len(steps) == len(smoothed):
            raise TrainingError(f"The loss map has {len(losses)} losses of {len(steps)} steps: {shown(len(smoothed))}.")
        return cls(
            _finite(zip(steps, losses, strict=True)),
            _finite(zip(steps, smoothed, strict=True)),
            _finite(map(tuple, loss_map.get("validation", ()))),
            loss_map.get("saves", ()),
            loss_map.get("best"),
        )


def plot(curves: Curves, width: int, height: int, *, log_scale: bool = False) -> Image.Image:
    """Raises TrainingError where no loss is a number, or none can be on a logarithmic scale."""
    values = [value for points in curves[:3] for _, value in points if value > 0 or not log_scale]
    if not values:
        raise TrainingError("None of the losses can be drawn.", remedy="Turn log_scale off." if log_scale else "")
    steps = [step for points in curves[:3] for step, _ in points]
    canvas = _Canvas(width, height, (min(steps), max(steps)), (min(values), max(values)), log_scale)
    canvas.axes()
    for step in curves.saves:
        canvas.tick(step, SAVED)
    if curves.best is not None:
        canvas.rule(curves.best, BEST)
    canvas.line(curves.raw, RAW, 1)
    canvas.line(curves.smoothed, SMOOTHED, 2)
    canvas.line(curves.validation, VALIDATION, 1.5, dots=True)
    entries = [("loss", RAW), ("smoothed", SMOOTHED)]
    entries += [("held out", VALIDATION)] if curves.validation else []
    entries += [("best", BEST)] if curves.best is not None else []
    canvas.legend(entries + ([("saved", SAVED)] if curves.saves else []))
    return canvas.image.resize((width, height), Image.Resampling.LANCZOS)


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers between two: 1, 2 or 5 times a power of ten apart."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    apart = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [number * apart for number in range(math.ceil(low / apart), math.floor(high / apart) + 1)]


def decades(low: float, high: float, about: int) -> list[float]:
    """The same on a logarithmic scale: 1, 2 and 5 times powers of ten where these are enough to tell it by."""
    powers = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    found = [power * factor for power in powers for factor in (1, 2, 5) if low <= power * factor <= high]
    if len(found) > 2 * about:
        found = [power for power in powers if low <= power <= high]
    return found if len(found) > 2 else ticks(low, high, about)


@dataclass
class _Canvas:
    width: int
    height: int
    steps: tuple[float, float]
    values: tuple[float, float]
    log: bool

    def __post_init__(self) -> None:
        self.image = Image.new("RGB", (self.width * FINE, self.height * FINE), PAPER)
        self.pen = ImageDraw.Draw(self.image)
        self.font = ImageFont.load_default(size=12 * FINE)
        low, high = map(self._scaled, self.values)
        rim = 0.05 * (high - low) or 0.5
        self.low, self.high = low - rim, high + rim
        self.left, self.right, self.top, self.bottom = 62, self.width - 16, 30, self.height - 34

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def x(self, step: float) -> float:
        first, last = self.steps
        return (self.left + (step - first) / ((last - first) or 1) * (self.right - self.left)) * FINE

    def y(self, value: float) -> float:
        return (
            self.bottom - (self._scaled(value) - self.low) / (self.high - self.low) * (self.bottom - self.top)
        ) * FINE

    def axes(self) -> None:
        about = max(2, (self.bottom - self.top) // 55)
        for value in decades(10**self.low, 10**self.high, about) if self.log else ticks(self.low, self.high, about):
            self._line([(self.left * FINE, self.y(value)), (self.right * FINE, self.y(value))], GRID, 1)
            self._text((self.left - 8) * FINE, self.y(value), f"{value:.3g}", "rm")
        for step in ticks(*self.steps, max(2, (self.right - self.left) // 110)):
            if step == int(step):
                self._line([(self.x(step), self.top * FINE), (self.x(step), self.bottom * FINE)], GRID, 1)
                self._text(self.x(step), (self.bottom + 9) * FINE, f"{int(step)}", "mt")
        self._line([(self.left * FINE, self.bottom * FINE), (self.right * FINE, self.bottom * FINE)], INK, 1)

    def line(self, points: Points, colour: str, thick: float, *, dots: bool = False) -> None:
        there = [point for point in points if point[1] > 0 or not self.log]
        there = [there[place] for place in thinned([value for _, value in there], 4 * self.width)]
        drawn = [(self.x(step), self.y(value)) for step, value in there]
        if len(drawn) > 1:
            self._line(drawn, colour, thick)
        for x, y in drawn if dots or len(drawn) == 1 else ():
            self._dot(x, y, colour)

    def tick(self, step: float, colour: str) -> None:
        self._line([(self.x(step), (self.bottom - 7) * FINE), (self.x(step), self.bottom * FINE)], colour, 1.5)

    def rule(self, step: float, colour: str) -> None:
        self._line([(self.x(step), self.top * FINE), (self.x(step), self.bottom * FINE)], colour, 1.5)

    def legend(self, entries: Sequence[tuple[str, str]]) -> None:
        x = float(self.right * FINE)
        for text, colour in reversed(entries):
            x -= self.pen.textlength(text, font=self.font)
            self._text(x, 15 * FINE, text, "lm")
            x -= 12 * FINE
            self._dot(x, 15 * FINE, colour)
            x -= 22 * FINE

    def _line(self, points: Points, colour: str, thick: float) -> None:
        self.pen.line(points, fill=colour, width=round(thick * FINE), joint="curve")

    def _dot(self, x: float, y: float, colour: str) -> None:
        size = 3 * FINE
        self.pen.ellipse((x - size, y - size, x + size, y + size), fill=colour)

    def _text(self, x: float, y: float, text: str, anchor: str) -> None:
        self.pen.text((x, y), text, fill=INK, font=self.font, anchor=anchor)


def _finite(points: Any) -> Points:
    return [point for point in points if math.isfinite(point[1])]


def _smoothed(losses: Sequence[float]) -> Iterator[float]:
    now = math.nan
    for loss in losses:
        now = loss if math.isnan(now) else PAST * now + (1 - PAST) * loss
        yield now
