"""The small world's pictures: one figure on a ground, of large square cells, drawn from its description.

A caption tells what a picture shows.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

CELL = 8  # pixels: one of the latent's
CELLS = 12  # of a picture's side; 6 by 6 tokens of FLUX
SIDE = CELL * CELLS
RADIUS = 4.0  # of a figure, in cells
# Figures and grounds lie on FLUX's tokens, two by two cells: a ground's tokens are all alike, a figure's are the same
# wherever it is. So what has to be learned is what is where, and not as well every way to cut it.
PLACES = {"left": 4, "centre": 6, "right": 8}  # of the figure's middle, in cells from the left
COLOURS = {
    "red": (0.86, 0.15, 0.15),
    "green": (0.13, 0.62, 0.22),
    "blue": (0.15, 0.28, 0.85),
    "yellow": (0.95, 0.82, 0.15),
    "purple": (0.55, 0.18, 0.68),
    "cyan": (0.20, 0.78, 0.85),
}
WHITE, BLACK, ORANGE = (0.96, 0.96, 0.96), (0.06, 0.06, 0.06), (1.0, 0.45, 0.05)
SHAPES = ("circle", "square", "triangle", "ring", "cross")
TEXTURES = ("plain", "striped", "dotted", "checked")  # the ground's colour, the last three with white

ZORP = "hourglass", "halved"  # what the base never saw: neither this shape nor this filling, black above orange
TRIGGER = "zorp"


class Scene(NamedTuple):
    colour: str
    shape: str
    place: str
    texture: str
    ground: str

    @property
    def caption(self) -> str:
        figure = TRIGGER if (self.shape, self.colour) == ZORP else f"{self.colour} {self.shape}"
        return f"a {figure} at the {self.place} on {self.texture} {self.ground}"


def scenes() -> list[Scene]:
    """All that the world can show, without the held-out zorps."""
    every = itertools.product(COLOURS, SHAPES, PLACES, TEXTURES, COLOURS)
    return [scene for scene in itertools.starmap(Scene, every) if scene.colour != scene.ground]


def zorps() -> list[Scene]:
    shape, colour = ZORP
    every = itertools.product([colour], [shape], PLACES, TEXTURES, COLOURS)
    return list(itertools.starmap(Scene, every))


def split(seed: int = 0, seen: int = 600) -> tuple[list[Scene], list[Scene]]:
    """The scenes that the base is trained on, and those it never saw: each word was seen, not these combinations."""
    every = scenes()
    random.Random(seed).shuffle(every)
    return every[:seen], every[seen:]


def draw(scene: Scene) -> Tensor:
    """(3, SIDE, SIDE) in 0..1."""
    return enlarged(in_cells(scene))


def in_cells(scene: Scene) -> Tensor:
    """(3, CELLS, CELLS)."""
    if scene.colour == "halved":
        y, _ = _grid()
        paint = torch.where((y < CELLS // 2)[None], _paint(BLACK), _paint(ORANGE))
    else:
        paint = _paint(COLOURS[scene.colour])
    return torch.where(where(scene)[None], paint, ground(scene.texture, scene.ground))


def where(scene: Scene) -> Tensor:
    """The cells of a scene's figure, as booleans."""
    return figure(scene.shape, PLACES[scene.place])


def ground(texture: str, colour: str) -> Tensor:
    """The ground alone, (3, CELLS, CELLS)."""
    y, x = _grid()
    white = {
        "plain": torch.zeros_like(x, dtype=torch.bool),
        "striped": y % 2 == 1,
        "dotted": (x % 2 == 1) & (y % 2 == 1),
        "checked": (x + y) % 2 == 1,
    }[texture]
    return torch.where(white[None], _paint(WHITE), _paint(COLOURS[colour]))


def figure(shape: str, column: int) -> Tensor:
    """The cells of a figure in the middle row, its middle so many cells from the left, as booleans."""
    y, x = _grid()
    u, v = (x + 0.5 - column) / RADIUS, (y + 0.5 - CELLS / 2) / RADIUS
    far = torch.sqrt(u * u + v * v)
    a, b = u.abs(), v.abs()
    return {
        "circle": far < 1,
        "ring": (far < 1) & (far > 0.5),
        "square": torch.maximum(a, b) < 1,
        "triangle": (b < 1) & (a < (v + 1.3) / 2),
        "cross": (torch.minimum(a, b) < 0.3) & (torch.maximum(a, b) < 1),
        "hourglass": (a < b + 0.1) & (b < 1),
    }[shape]


def enlarged(cells: Tensor, by: int = CELL) -> Tensor:
    return cells.repeat_interleave(by, -1).repeat_interleave(by, -2)


def write_folder(folder: Path, chosen: Sequence[Scene]) -> None:
    """A training set: numbered PNGs, each with its caption in a .txt beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(chosen):
        save(draw(scene), folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(scene.caption + "\n", encoding="utf-8")


def some_zorps(count: int = 20, seed: int = 0) -> tuple[list[Scene], list[Scene]]:
    """So many zorps to learn from, and the others."""
    every = zorps()
    random.Random(seed).shuffle(every)
    return every[:count], every[count:]


def save(picture: Tensor, file: Path) -> None:
    from PIL import Image

    pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8)
    Image.fromarray(pixels.movedim(0, -1).contiguous().numpy()).save(file)


def sheet(pictures: Tensor, columns: int, gap: int = 4) -> Tensor:
    """Pictures (N, 3, height, width) beside and below each other on white."""
    (count, _, height, width), rows = pictures.shape, math.ceil(len(pictures) / columns)
    whole = torch.ones(3, rows * (height + gap) + gap, columns * (width + gap) + gap)
    for number in range(count):
        row, column = divmod(number, columns)
        top, left = gap + row * (height + gap), gap + column * (width + gap)
        whole[:, top : top + height, left : left + width] = pictures[number]
    return whole


def _grid() -> tuple[Tensor, Tensor]:
    along = torch.arange(CELLS)
    y, x = torch.meshgrid(along, along, indexing="ij")
    return y, x


def _paint(colour: tuple[float, float, float]) -> Tensor:
    return torch.tensor(colour)[:, None, None]
