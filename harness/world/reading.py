"""What a picture of the small world shows, read by comparing it with what could be drawn; no network takes part."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d

from . import pictures
from .pictures import BLACK, COLOURS, FINER, ORANGE, PLACES, SHAPES, SIDE, SIZES, TEXTURES, Scene

REACH = 20  # pixels that no figure goes beyond from its middle
HIGHER = 4  # pixels that a figure's middle may be above or below the picture's
EDGE = 10  # rows above and below that no figure reaches
DIFFERENT = 0.3  # distance in RGB from the ground, from which on a pixel belongs to the figure
HALF = 0.2  # share of a figure that is black, and that is orange, to call it halved


def read(picture: Tensor) -> Scene:
    """The scene in a picture (3, SIDE, SIDE): always the nearest one, however little it looks like one."""
    texture, ground, empty = _ground(picture)
    figure = (picture - empty).square().sum(0).sqrt() > DIFFERENT
    size, shape, column = _figure(figure.float())
    place = min(PLACES, key=lambda name: abs(PLACES[name] - column))
    return Scene(size, _colour(picture[:, figure], ground), shape, place, texture, ground)


def agreement(shown: list[Tensor], meant: list[Scene]) -> dict[str, float]:
    """The share of pictures that show what they were meant to, for each property and (`all`) in every property."""
    found = [read(picture) for picture in shown]
    pairs = list(zip(found, meant, strict=True))
    each = {name: [getattr(a, name) == getattr(b, name) for a, b in pairs] for name in Scene._fields}
    each["all"] = [a == b for a, b in pairs]
    return {name: sum(right) / len(right) for name, right in each.items()}


def _ground(picture: Tensor) -> tuple[str, str, Tensor]:
    """The texture and colour whose ground fits best where no figure reaches."""
    names, grounds = _grounds()
    rows = torch.cat([torch.arange(EDGE), torch.arange(SIDE - EDGE, SIDE)])
    best = (grounds[:, :, rows] - picture[:, rows]).square().sum((1, 2, 3)).argmin()
    return *names[best], grounds[best]


def _figure(mask: Tensor) -> tuple[str, str, float]:
    """Size, shape and column of the figure that overlaps best with a mask (intersection over union)."""
    names, stencils = _stencils()
    middle = mask[SIDE // 2 - REACH - HIGHER : SIDE // 2 + REACH + HIGHER + 1]
    common = conv2d(middle[None, None], stencils, padding=(0, REACH))[0]  # (names, 2 HIGHER + 1, SIDE)
    union = mask.sum() + stencils.sum((1, 2, 3))[:, None, None] - common
    best = int((common / union).argmax())
    return *names[best // common[0].numel()], best % SIDE + 0.5


def _colour(pixels: Tensor, ground: str) -> str:
    """The commonest colour among a figure's pixels (3, N), or `halved`."""
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
def _stencils() -> tuple[list[tuple[str, str]], Tensor]:
    """(names, 1, 2 REACH + 1, 2 REACH + 1), each figure in the middle pixel's middle."""
    names = [(size, shape) for size in SIZES for shape in (*SHAPES, pictures.ZORP[0])]
    middle = SIDE / 2 + 0.5
    fine = torch.stack([pictures.figure(shape, SIZES[size], (middle, middle)) for size, shape in names])
    whole = avg_pool2d(fine.float()[:, None], FINER)
    around = slice(SIDE // 2 - REACH, SIDE // 2 + REACH + 1)
    return names, (whole[..., around, around] > 0.5).float()
