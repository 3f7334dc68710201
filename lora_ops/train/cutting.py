"""Cutting: which parts of a picture are learned from, and how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..errors import FileError, TrainingError
from .buckets import Size, bucket, lost
from .pixels import Pixels, cut, cut_mask, opacity

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


class Part(NamedTuple):
    """A picture as one bucket has it. mask_of tells what its mask is read from ("": it has none)."""

    size: Size
    picture: Pixels
    mask: Pixels | None
    mask_of: str

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

    Raises FileError for a picture or mask that cannot be used.
    """
    picture = raw.read()
    mask = raw.mask() if raw.mask and how.masks != "off" else None
    mask_of = mask.sha256 if mask else TRANSPARENCY if how.masks == TRANSPARENCY else ""
    sizes = (bucket(picture.size, each, how.step, aspects=how.aspects, enlarge=how.enlarge) for each in how.resolutions)
    found = [size for size in dict.fromkeys(sizes) if size is not None]
    if not found:
        what = f"is {picture.size.text} pixels, smaller than {how.step}×{how.step}."
        raise FileError(what, remedy="Use a larger picture, or let it be enlarged.")
    return tuple(Part(size, picture, mask, mask_of) for size in found)


def small(part: Part, how: How) -> bool:
    """Whether a picture has too few pixels for the largest resolution."""
    height, width = part.picture.size
    return height * width < (max(how.resolutions) - how.step) ** 2
