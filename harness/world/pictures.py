"""The small world's pictures: one figure on a ground, drawn from its description and told in a caption."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

SIDE = 64  # pixels; 8 of the latent's, 4 by 4 tokens of FLUX
FINER = 4  # drawn at this many times the size, then averaged
SIZES = {"small": 12.0, "large": 18.0}  # radius in pixels
PLACES = {"left": 22.0, "centre": 32.0, "right": 42.0}  # of the figure's middle, in pixels from the left
JITTER = 2.0  # pixels that a figure may be off its place, in both directions
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
    size: str
    colour: str
    shape: str
    place: str
    texture: str
    ground: str

    @property
    def caption(self) -> str:
        figure = TRIGGER if (self.shape, self.colour) == ZORP else f"{self.colour} {self.shape}"
        return f"a {self.size} {figure} at the {self.place} on a {self.texture} {self.ground} ground"


def scenes() -> list[Scene]:
    """All that the world can show, without the held-out zorps."""
    every = itertools.product(SIZES, COLOURS, SHAPES, PLACES, TEXTURES, COLOURS)
    return [scene for scene in itertools.starmap(Scene, every) if scene.colour != scene.ground]


def zorps() -> list[Scene]:
    shape, colour = ZORP
    every = itertools.product(SIZES, [colour], [shape], PLACES, TEXTURES, COLOURS)
    return list(itertools.starmap(Scene, every))


def split(seed: int = 0, seen: int = 300) -> tuple[list[Scene], list[Scene]]:
    """The scenes that the base is trained on, and those it never saw: each word was seen, not these combinations."""
    every = scenes()
    random.Random(seed).shuffle(every)
    return every[:seen], every[seen:]


def draw(scene: Scene, generator: torch.Generator) -> Tensor:
    """(3, SIDE, SIDE) in 0..1; the generator moves the figure about its place."""
    shift = (torch.rand(2, generator=generator) * 2 - 1) * JITTER
    middle = PLACES[scene.place] + float(shift[0]), SIDE / 2 + float(shift[1])
    y, _ = _grid()
    inside = figure(scene.shape, SIZES[scene.size], middle)
    if scene.colour == "halved":
        paint = torch.where((y < middle[1])[None], _paint(BLACK), _paint(ORANGE))
    else:
        paint = _paint(COLOURS[scene.colour])
    return _smaller(torch.where(inside[None], paint, _ground(scene.texture, scene.ground)))


def ground(texture: str, colour: str) -> Tensor:
    """The ground alone, (3, SIDE, SIDE)."""
    return _smaller(_ground(texture, colour))


def figure(shape: str, radius: float, middle: tuple[float, float]) -> Tensor:
    """Where a figure is, as booleans on the finer grid."""
    y, x = _grid()
    u, v = (x - middle[0]) / radius, (y - middle[1]) / radius
    far = torch.sqrt(u * u + v * v)
    a, b = u.abs(), v.abs()
    return {
        "circle": far < 1,
        "ring": (far < 1) & (far > 0.55),
        "square": torch.maximum(a, b) < 0.85,
        "triangle": (v < 0.8) & (a < (v + 1) / 1.8),
        "cross": (torch.minimum(a, b) < 0.33) & (torch.maximum(a, b) < 1),
        "hourglass": (a < b) & (b < 0.95),
    }[shape]


def write_folder(folder: Path, chosen: list[Scene], seed: int = 0) -> None:
    """A training set: numbered PNGs, each with its caption in a .txt beside it."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(chosen):
        save(draw(scene, generator), folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(scene.caption + "\n", encoding="utf-8")


def write_zorps(folder: Path, count: int = 20, seed: int = 0) -> list[Scene]:
    """A training set of zorps; returns the zorps that it does not show."""
    every = zorps()
    random.Random(seed).shuffle(every)
    write_folder(folder, every[:count], seed)
    return every[count:]


def save(picture: Tensor, file: Path) -> None:
    from PIL import Image

    pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8)
    Image.fromarray(pixels.movedim(0, -1).contiguous().numpy()).save(file)


def sheet(pictures: Tensor, columns: int, scale: int = 2, gap: int = 4) -> Tensor:
    """Pictures (N, 3, SIDE, SIDE) beside and below each other on white, each pixel scale times as large."""
    count, rows = len(pictures), math.ceil(len(pictures) / columns)
    cell = SIDE * scale + gap
    whole = torch.ones(3, rows * cell + gap, columns * cell + gap)
    for number in range(count):
        large = pictures[number].repeat_interleave(scale, -1).repeat_interleave(scale, -2)
        top, left = (gap + cell * at for at in divmod(number, columns))
        whole[:, top : top + SIDE * scale, left : left + SIDE * scale] = large
    return whole


def _ground(texture: str, colour: str) -> Tensor:
    y, x = _grid()
    white = {
        "plain": torch.zeros_like(x, dtype=torch.bool),
        "striped": y // 8 % 2 == 1,
        "dotted": (x % 16 - 8) ** 2 + ((y + 4) % 16 - 8) ** 2 < 4.5**2,
        "checked": (x // 8 + y // 8) % 2 == 1,
    }[texture]
    return torch.where(white[None], _paint(WHITE), _paint(COLOURS[colour]))


def _grid() -> tuple[Tensor, Tensor]:
    along = (torch.arange(SIDE * FINER) + 0.5) / FINER
    y, x = torch.meshgrid(along, along, indexing="ij")
    return y, x


def _paint(colour: tuple[float, float, float]) -> Tensor:
    return torch.tensor(colour)[:, None, None]


def _smaller(fine: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(fine, FINER)
