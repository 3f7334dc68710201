"""Cutting: which parts of a picture are learned from, and how."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..errors import FileError, TrainingError
from .buckets import Size, bucket, lost
from .pixels import Pixels, alike, cropped, cut, cut_mask, opacity

TRANSPARENCY = "transparency"
MASKS = ("files", TRANSPARENCY, "off")


@dataclass(frozen=True)
class How:
    """mirrored: the mirror image is learned too. masks: from files; from these, else from a picture's transparency; or
    none. The rest: see buckets. Raises TrainingError for a resolution that is smaller than a step."""

    resolutions: tuple[int, ...]
    step: int = 64
    aspects: bool = True
    enlarge: bool = False
    mirrored: bool = False
    masks: str = "files"

    def __post_init__(self) -> None:
        if not self.resolutions or min(self.resolutions) < self.step:
            what = (
                f"The smallest resolution is {min(self.resolutions, default=0)}, the step of the buckets {self.step}."
            )
            raise TrainingError(what, remedy="Give a larger resolution or a smaller step.")


@dataclass(frozen=True)
class Raw:
    """A picture before it is encoded."""

    name: str
    read: Callable[[], Pixels]
    caption: str | None = None
    repeats: int = 1
    mask: Callable[[], Pixels] | None = None
    controls: tuple[Callable[[], Pixels], ...] = ()


class Control(NamedTuple):
    """A picture to edit, by the SHA-256 of what it is read from, and the size that it is cut to."""

    read: Callable[[], Pixels]
    sha256: str
    size: Size

    def pixels(self) -> Tensor:
        """(1, height, width, 3), 0..1, in this size."""
        with _of_control():
            return cut(self.read(), self.size)

    def whole(self) -> Tensor:
        """(1, height, width, 3), 0..1: the same part of it, not scaled."""
        with _of_control():
            return cropped(self.read(), self.size)


@contextmanager
def _of_control() -> Iterator[None]:
    try:
        yield
    except FileError as error:
        raise FileError(f"its control picture {error.what}", remedy=error.remedy) from error


class Part(NamedTuple):
    """A picture as one bucket has it. mask_of tells what its mask is read from ("": it has none)."""

    size: Size
    picture: Pixels
    mask: Pixels | None
    mask_of: str
    controls: tuple[Control, ...] = ()

    @property
    def lost(self) -> float:
        return lost(self.picture.size, self.size)

    def pixels(self) -> Tensor:
        """(1, height, width, 3), 0..1."""
        return cut(self.picture, self.size)

    def shown(self) -> Tensor | None:
        """How much each pixel counts (1, 1, height, width), 0..1; None: all alike."""
        mask = opacity(self.picture) if self.mask_of == TRANSPARENCY else self.mask
        return None if mask is None else cut_mask(mask, self.picture.size, self.size)


def parts(raw: Raw, how: How) -> tuple[Part, ...]:
    """A picture as it is learned from, once for each size that its resolutions come to.

    A control picture of its shape is cut like it, another one to a bucket of its own. Raises FileError for a picture,
    mask or control picture that cannot be used.
    """
    picture = raw.read()
    mask = raw.mask() if raw.mask and how.masks != "off" else None
    mask_of = mask.sha256 if mask else TRANSPARENCY if how.masks == TRANSPARENCY else ""
    with _of_control():
        controls = [(read, read()) for read in raw.controls]

    def control(read: Callable[[], Pixels], found: Pixels, size: Size, resolution: int) -> Control:
        with _of_control():
            own = size if alike(found.size, picture.size) else _size(found, resolution, how)
            return Control(read, found.sha256, own)

    sizes: dict[Size, int] = {}
    for resolution in how.resolutions:
        sizes.setdefault(_size(picture, resolution, how), resolution)
    return tuple(
        Part(size, picture, mask, mask_of, tuple(control(*each, size, resolution) for each in controls))
        for size, resolution in sizes.items()
    )


def _size(picture: Pixels, resolution: int, how: How) -> Size:
    size = bucket(picture.size, resolution, how.step, aspects=how.aspects, enlarge=how.enlarge)
    if size is None:
        what = f"is {picture.size.text} pixels, smaller than {how.step}×{how.step}."
        raise FileError(what, remedy="Use a larger picture, or let it be enlarged.")
    return size


def small(part: Part, how: How) -> bool:
    """Whether a picture has too few pixels for the largest resolution."""
    height, width = part.picture.size
    return height * width < (max(how.resolutions) - how.step) ** 2
