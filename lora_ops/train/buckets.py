"""Buckets: the sizes that pictures of every shape are cut to, so that several of one size make a batch."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

LONGEST = 2  # a side is at most so many times the resolution, and at least the resolution divided by it


class Size(NamedTuple):
    height: int
    width: int

    @property
    def text(self) -> str:
        return f"{self.width}×{self.height}"


class Box(NamedTuple):
    """What is cut out of a picture, in its pixels; then scaled to the bucket's size."""

    left: float
    top: float
    right: float
    bottom: float


@lru_cache
def sizes(resolution: int, step: int) -> tuple[Size, ...]:
    """Every bucket of a resolution: sides are multiples of step, of at most resolution² pixels and as close to them as
    the step allows."""
    most = LONGEST * resolution
    sides = range(max(step, resolution // LONGEST // step * step), most + 1, step)
    across = ((side, min(resolution**2 // side, most) // step * step) for side in sides)
    return tuple(sorted({Size(*pair) for side, other in across if other for pair in ((side, other), (other, side))}))


def bucket(picture: Size, resolution: int, step: int, *, aspects: bool = True, enlarge: bool = False) -> Size | None:
    """The size that a picture is cut to; None for one that is smaller than a step.

    aspects: that of the shape closest to its own, else a square. A picture that is smaller than that keeps its size,
    but for what is over a step, unless enlarge.
    """
    square = Size(resolution // step * step, resolution // step * step)
    every = sizes(resolution, step) if aspects else (square,)
    wanted = math.log(picture.width / picture.height)
    best = min(every, key=lambda size: (abs(math.log(size.width / size.height) - wanted), -size.height * size.width))
    if enlarge or (picture.height >= best.height and picture.width >= best.width):
        return best
    return _own(picture, resolution, step, aspects)


def _own(picture: Size, resolution: int, step: int, aspects: bool) -> Size | None:
    most = LONGEST * resolution if aspects else min(resolution, *picture)
    height, width = (min(side, most) // step * step for side in picture)
    while height * width > resolution**2:
        height, width = (height - step, width) if height > width else (height, width - step)
    return Size(height, width) if height and width else None


def box(picture: Size, size: Size) -> Box:
    """The largest part of a picture, from its middle, that has the shape of a size."""
    scale = min(picture.height / size.height, picture.width / size.width)
    height, width = size.height * scale, size.width * scale
    top, left = (picture.height - height) / 2, (picture.width - width) / 2
    return Box(left, top, left + width, top + height)


def lost(picture: Size, size: Size) -> float:
    """The share of a picture that is cut off."""
    left, top, right, bottom = box(picture, size)
    return 1 - (right - left) * (bottom - top) / (picture.height * picture.width)
