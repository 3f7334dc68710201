"""What a picture of the small world shows, read by comparing it with what could be drawn; no network takes part."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d

from . import pictures
from .pictures import BLACK, CELL, CELLS, COLOURS, ORANGE, PLACES, RADIUS, SHAPES, TEXTURES, Scene

WIDE = int(2 * RADIUS)  # cells
DIFFERENT = 0.3  # distance in RGB from the ground, from which on a cell belongs to the figure
ALIKE = 0.7  # least share of cells that a figure and a shape have in common, of those of either
HALF = 0.2  # share of a figure that is black, and that is orange, to call it halved
NOTHING = "nothing"


class Found(NamedTuple):
    scene: Scene  # the nearest one; its shape is NOTHING where the figure is like none
    likeness: float  # of the figure and its shape: common cells (intersection over union), 0..1


def look(picture: Tensor) -> Found:
    """At a picture (3, SIDE, SIDE)."""
    cells = avg_pool2d(picture, CELL)
    texture, ground, empty = _ground(cells)
    figure = (cells - empty).square().sum(0).sqrt() > DIFFERENT
    shape, column, likeness = _figure(figure.float())
    colour = _colour(cells[:, figure], ground)
    place = min(PLACES, key=lambda name: abs(PLACES[name] - column))
    scene = Scene(colour, shape, place, texture, ground)
    return Found(scene if likeness >= ALIKE else scene._replace(shape=NOTHING), likeness)


def read(picture: Tensor) -> Scene:
    return look(picture).scene


def agreement(shown: Sequence[Tensor], meant: Sequence[Scene]) -> dict[str, float]:
    """The share of pictures that show what they were meant to, for each property and (`all`) in every property."""
    pairs = [(read(picture), scene) for picture, scene in zip(shown, meant, strict=True)]
    each = {name: [getattr(a, name) == getattr(b, name) for a, b in pairs] for name in Scene._fields}
    each["all"] = [a == b for a, b in pairs]
    return {name: sum(right) / len(right) for name, right in each.items()}


def share(shown: Sequence[Tensor], meant: Sequence[Scene], *properties: str) -> float:
    """Of pictures that are right in all of these properties."""
    pairs = zip(map(read, shown), meant, strict=True)
    return sum(all(getattr(a, name) == getattr(b, name) for name in properties) for a, b in pairs) / len(shown)


def _ground(cells: Tensor) -> tuple[str, str, Tensor]:
    """The texture and colour of the ground that most cells are like: no figure hides half of it."""
    names, grounds = _grounds()
    best = int(((grounds - cells).square().sum(1).sqrt() <= DIFFERENT).sum((1, 2)).argmax())
    return *names[best], grounds[best]


def _figure(mask: Tensor) -> tuple[str, int, float]:
    """Shape and column of the figure that has most in common with a mask, and how much, at any height."""
    names, stencils = _stencils()
    middle = WIDE // 2
    common = conv2d(mask[None, None], stencils, padding=middle)[0]  # at [row, column] of the figure's middle
    union = mask.sum() + stencils.sum((1, 2, 3))[:, None, None] - common
    likeness = common / union
    best = int(likeness.argmax())
    return names[best // common[0].numel()], best % common.shape[-1], float(likeness.max())


def _colour(pixels: Tensor, ground: str) -> str:
    """The commonest colour among a figure's cells (3, N), or `halved`."""
    names = [name for name in COLOURS if name != ground]
    paints = torch.tensor([*(COLOURS[name] for name in names), BLACK, ORANGE])
    nearest = (pixels.T[:, None] - paints).square().sum(-1).argmin(-1)
    share = torch.bincount(nearest, minlength=len(paints)) / max(1, len(nearest))
    if share[-1] > HALF and share[-2] > HALF:
        return "halved"
    return names[int(share[:-2].argmax())]


@cache
def _grounds() -> tuple[list[tuple[str, str]], Tensor]:
    names = [(texture, colour) for texture in TEXTURES for colour in COLOURS]
    return names, torch.stack([pictures.ground(*name) for name in names])


@cache
def _stencils() -> tuple[list[str], Tensor]:
    """(names, 1, WIDE, WIDE)."""
    names = [*SHAPES, pictures.ZORP[0]]
    around = slice((CELLS - WIDE) // 2, (CELLS + WIDE) // 2)
    whole = torch.stack([pictures.figure(name, CELLS // 2) for name in names])
    return names, whole[:, None, around, around].float()
