"""Pixels: pictures as files and wires have them, cut to a bucket, and a sheet of what training will see."""

from __future__ import annotations

import hashlib
import io
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..errors import FileError
from ..files.reading import reason
from .buckets import Size, box

LARGEST = 100_000_000  # pixels of a picture
THUMB = 192  # pixels of a thumbnail's side
COLUMNS = 6
SHAPE = 0.02  # by how much the shapes of two pictures that belong together may differ, after rounding
LINES = 2  # of a caption below a thumbnail
DIMMED = 0.25  # how bright a sheet shows what a mask leaves out
ORIENTATION, LYING = 0x0112, (5, 6, 7, 8)  # the EXIF tag, and its values for a picture on its side
GROUND, INK = (24, 24, 26), (200, 200, 205)


@dataclass(frozen=True, eq=False)
class Pixels:
    """A picture that is decoded when it is first looked at: its size upright, and the SHA-256 of what it was read from.

    image is upright, RGB or with transparency RGBA; it raises FileError for what is damaged.
    """

    size: Size
    sha256: str
    decode: Callable[[], Image.Image]

    @cached_property
    def image(self) -> Image.Image:
        return self.decode()


def read_pixels(path: Path) -> Pixels:
    """A picture from a file, which is read once. Raises FileError for what is none, or too large."""
    with _told_of(path):
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as opened:
            if opened.width * opened.height > LARGEST:
                raise FileError(f"has over {LARGEST // 10**6} million pixels.", file=path, remedy="Make it smaller.")
            lies = opened.getexif().get(ORIENTATION, 1) in LYING
            size = Size(opened.width, opened.height) if lies else Size(opened.height, opened.width)

    def decode() -> Image.Image:
        with _told_of(path), Image.open(io.BytesIO(data)) as opened:
            opened.load()
            return _plain(ImageOps.exif_transpose(opened))

    return Pixels(size, hashlib.sha256(data).hexdigest(), decode)


@contextmanager
def _told_of(path: Path) -> Iterator[None]:
    try:
        yield
    except FileError:
        raise
    except Exception as error:  # Pillow's plugins raise what they like on damaged data
        what = "is no picture" if isinstance(error, UnidentifiedImageError) else f"cannot be read: {reason(error)}"
        raise FileError(f"{what}.", file=path, remedy="Replace or remove it.") from error


def of_tensor(image: Tensor) -> Pixels:
    """A picture from one of an IMAGE (height, width, 1, 3 or 4), 0..1."""
    pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).contiguous()
    array = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    plain = _plain(Image.fromarray(array.numpy()))
    sha256 = hashlib.sha256(f"{plain.mode} {plain.size}".encode() + plain.tobytes()).hexdigest()
    return Pixels(Size(plain.height, plain.width), sha256, lambda: plain)


def of_mask(mask: Tensor) -> Pixels:
    """A mask (height, width), 0..1, as a picture."""
    return of_tensor(mask[..., None])


def _plain(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits, which convert would cut off at 255
        wide = image.convert("I")
        return wide.point(lambda value: value * (1 / 257)).convert("L").convert("RGB")
    clear = "A" in image.getbands() or "transparency" in image.info
    return image.convert("RGBA" if clear else "RGB")


def cut(pixels: Pixels, size: Size) -> Tensor:
    """A picture (1, height, width, 3) of this size, 0..1, from its middle; what is transparent is white."""
    return _tensor(_scaled(_opaque(pixels.image), pixels.size, size))[None]


def cropped(pixels: Pixels, size: Size) -> Tensor:
    """What cut takes of a picture, as large as it is there, to whole pixels."""
    left, top, right, bottom = map(round, box(pixels.size, size))
    return _tensor(_opaque(pixels.image).crop((left, top, right, bottom)))[None]


def _opaque(image: Image.Image) -> Image.Image:
    if image.mode != "RGBA":
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")


def cut_mask(mask: Pixels, picture: Size, size: Size) -> Tensor:
    """What a mask says of each pixel (1, 1, height, width), white is 1, cut like its picture; it may be smaller.

    Raises FileError for one of another shape.
    """
    if not alike(mask.size, picture):
        what = f"the mask is {mask.size.text}, the picture {picture.text}."
        raise FileError(what, remedy="Make a mask of the picture's shape.")
    return _tensor(_scaled(mask.image.convert("L"), mask.size, size))[None, None]


def alike(one: Size, other: Size) -> bool:
    """Whether two pictures are of one shape, but for rounding."""
    return abs(math.log(one.width * other.height / (one.height * other.width))) <= SHAPE


def opacity(pixels: Pixels) -> Pixels | None:
    """The mask that a picture's transparency is; None where nothing of it is transparent."""
    if pixels.image.mode != "RGBA":
        return None
    alpha = pixels.image.getchannel("A")
    return None if alpha.getextrema() == (255, 255) else Pixels(pixels.size, pixels.sha256, lambda: alpha)


def _scaled(image: Image.Image, whole: Size, size: Size) -> Image.Image:
    return image.resize((size.width, size.height), Image.Resampling.LANCZOS, box=box(whole, size))


def _tensor(image: Image.Image) -> Tensor:
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    shape = (image.height, image.width, *((3,) if image.mode == "RGB" else ()))
    return data.view(shape).float() / 255


class Thumb(NamedTuple):
    image: Image.Image
    caption: str


def thumb(picture: Tensor, mask: Tensor | None, caption: str, before: Sequence[Tensor] = ()) -> Thumb:
    """A small one of a cut picture (1, height, width, 3), what its mask (…, h, w) leaves out dimmed; to its left those
    that it is made of."""
    height, width = picture.shape[1:3]
    if mask is not None:
        whole = torch.nn.functional.interpolate(mask.reshape(1, 1, *mask.shape[-2:]), (height, width))
        picture = picture * (DIMMED + (1 - DIMMED) * whole[0, 0, :, :, None])
    for each in reversed(before):
        own = (height, round(each.shape[2] * height / each.shape[1]))
        small = torch.nn.functional.interpolate(each.movedim(-1, 1), own, mode="bilinear", antialias=True)
        picture = torch.cat([small.movedim(1, -1), picture], 2)
    width = picture.shape[2]
    image, larger = of_tensor(picture[0]).image, THUMB // max(height, width)
    if larger > 1:
        image = image.resize((width * larger, height * larger), Image.Resampling.NEAREST)
    image.thumbnail((THUMB, THUMB), Image.Resampling.LANCZOS)
    return Thumb(image, caption)


def sheet(thumbs: Sequence[Thumb]) -> Tensor:
    """Thumbnails with their captions below, as an IMAGE (1, height, width, 3)."""
    font = ImageFont.load_default()
    gap, line = 8, 14
    columns = min(COLUMNS, max(1, math.ceil(math.sqrt(len(thumbs)))))
    cell = Size(THUMB + LINES * line + 2 * gap, THUMB + gap)
    rows = math.ceil(len(thumbs) / columns)
    whole = Image.new("RGB", (columns * cell.width + gap, rows * cell.height + gap), GROUND)
    draw = ImageDraw.Draw(whole)
    for number, (image, caption) in enumerate(thumbs):
        row, column = divmod(number, columns)
        left, top = gap + column * cell.width, gap + row * cell.height
        whole.paste(image, (left + (THUMB - image.width) // 2, top + (THUMB - image.height) // 2))
        for place, text in enumerate(_wrapped(caption, font)):
            draw.text((left, top + THUMB + gap // 2 + place * line), text, INK, font)
    return _tensor(whole)[None]


def _wrapped(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> list[str]:
    """The first lines of a text, each as wide as a thumbnail; … where there is more."""
    lines: list[str] = []
    text = text[: LINES * THUMB]
    rest = text.encode("latin-1", "replace").decode("latin-1") if isinstance(font, ImageFont.ImageFont) else text
    while rest and len(lines) < LINES:
        count = bisect_right(range(len(rest) + 1), THUMB, key=lambda n: font.getlength(rest[:n])) - 1 or 1
        if count < len(rest) and " " in rest[:count].strip() and len(lines) < LINES - 1:
            count = rest[:count].rindex(" ") + 1
        lines.append(rest[:count].rstrip())
        rest = rest[count:]
    if rest:
        lines[-1] = lines[-1][:-1] + "…"
    return lines
