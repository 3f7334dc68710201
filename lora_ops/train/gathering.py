"""Gathering: from a folder or from wires to what is to be encoded, and from what was to a Dataset."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import TrainingError, shown
from .buckets import Size
from .captions import orders, triggered
from .cutting import Control, Raw
from .folder import read_folder
from .pixels import of_mask, of_tensor, read_pixels


@dataclass(frozen=True)
class Wording:
    """What captions become: with a trigger word, in so many orders of tags, the first ones kept in place."""

    trigger: str = ""
    orders: int = 1
    keep: int = 1

    def texts(self, caption: str | None) -> tuple[str, ...]:
        return orders(triggered(caption or "", self.trigger), self.orders, self.keep)


class Gathered(NamedTuple):
    raws: tuple[Raw, ...]
    left_out: tuple[tuple[str, str], ...] = ()


class Entry(NamedTuple):
    """A picture in one size, as latents. Its caption is told, or its conditioning is there already."""

    name: str
    latents: tuple[Tensor, ...]
    masks: tuple[Tensor, ...]
    size: Size | None
    caption: str | None
    condition: Any | None = None
    repeats: int = 1
    regularisation: bool = False
    controls: tuple[tuple[Tensor, ...], ...] = ()  # those of each latent
    seen: tuple[Control, ...] = ()  # what the text encoder is shown, instead


def of_folder(folder: Path, before: str = "", controls: Path | None = None) -> Gathered:
    """The pictures of a folder; before is put before their names. Raises TrainingError where there is none, and like
    read_folder."""
    found = read_folder(folder, controls)
    if not found.sources:
        what = f"The folder '{shown(folder.name)}' holds no picture."
        if found.left_out:
            what += f" It holds {', '.join(shown(name) for name, _ in found.left_out[:5])}."
        remedy = "Put pictures (.png, .jpg, .webp, …) into it, or into folders in it like 10_name."
        raise TrainingError(what, remedy=remedy, left_out=found.left_out)
    raws = tuple(
        Raw(
            before + each.name,
            partial(read_pixels, each.path),
            each.caption,
            each.repeats,
            partial(read_pixels, each.mask) if each.mask else None,
            tuple(partial(read_pixels, control) for control in each.controls),
        )
        for each in found.sources
    )
    return Gathered(raws, tuple((before + name, why) for name, why in found.left_out))


def of_images(
    images: Sequence[Tensor],
    captions: Sequence[str] | None,
    masks: Sequence[Tensor] | None,
    controls: Sequence[Tensor] | None = None,
) -> Gathered:
    """The pictures of IMAGEs (batch, height, width, channels), with one caption, mask and control picture each, or one
    for all.

    Raises TrainingError for another number of them.
    """
    every = [image for batch in images for image in batch]
    texts = each_its_own(captions, len(every), "captions")
    masked = each_its_own(None if masks is None else [mask for batch in masks for mask in batch], len(every), "masks")
    before = None if controls is None else [control for batch in controls for control in batch]
    paired = each_its_own(before, len(every), "control pictures")
    raws = (
        Raw(
            f"image {n + 1}",
            partial(of_tensor, image),
            text,
            mask=None if mask is None else partial(of_mask, mask),
            controls=() if control is None else (partial(of_tensor, control),),
        )
        for n, (image, text, mask, control) in enumerate(zip(every, texts, masked, paired, strict=True))
    )
    return Gathered(tuple(raws))


def each_its_own(values: Sequence[Any] | None, count: int, what: str) -> Sequence[Any]:
    """Values, one for each picture; one is for all, none is None for each. Raises TrainingError for another number."""
    if values is None:
        return [None] * count
    if len(values) not in (1, count):
        found = f"There are {count} pictures and {len(values)} {what}."
        raise TrainingError(found, remedy=f"Connect as many {what} as pictures, or one for all.")
    return [*values] * (count if len(values) == 1 else 1)


def of_latents(
    latents: Sequence[Mapping[str, Any]],
    captions: Sequence[str] | None,
    conditioning: Sequence[Any] | None,
    controls: Sequence[Mapping[str, Any]] | None = None,
) -> list[Entry]:
    """What LATENTs bring, with a conditioning or caption each, or one for all, and so the latents of control pictures.
    A noise mask is a mask.

    conditioning may be CONDITIONINGs, or lists of them as core's Resolution Bucket gives. Raises TrainingError for
    another number of them, and for neither or both.
    """
    if (captions is None) == (conditioning is None):
        what = "Latents come with captions or with conditionings."
        raise TrainingError(what, remedy="Connect one of the two.")
    flat = None if conditioning is None else [each for wire in conditioning for each in _conditionings(wire)]
    every = [(sample, _noise_mask(wire, n)) for wire in latents for n, sample in enumerate(wire["samples"])]
    texts = each_its_own(captions, len(every), "captions")
    conditions = each_its_own(flat, len(every), "conditionings")
    before = None if controls is None else [sample for wire in controls for sample in wire["samples"]]
    paired = each_its_own(before, len(every), "control latents")
    return [
        Entry(
            f"latent {n + 1}",
            (latent,),
            () if mask is None else (mask,),
            None,
            text,
            condition,
            controls=() if control is None else ((control,),),
        )
        for n, ((latent, mask), text, condition, control) in enumerate(
            zip(every, texts, conditions, paired, strict=True)
        )
    ]


def _conditionings(wire: Any) -> Sequence[Any]:
    """A CONDITIONING is a list of [tensor, options]; core's Resolution Bucket gives lists of those."""
    return [wire] if wire and isinstance(wire[0][0], Tensor) else wire


def _noise_mask(wire: Mapping[str, Any], number: int) -> Tensor | None:
    mask, samples = wire.get("noise_mask"), wire["samples"]
    if mask is None:
        return None
    every = mask.reshape(-1, 1, *mask.shape[-2:]).float()
    small = torch.nn.functional.adaptive_avg_pool2d(every[number % len(every)], samples.shape[-2:])
    return small.reshape(1, *(1 for _ in samples.shape[4:]), *samples.shape[-2:])


def masked(masks: Iterable[Tensor], unmasked: float) -> tuple[Tensor, ...]:
    """Masks whose places outside count unmasked instead of nothing."""
    return tuple(unmasked + (1 - unmasked) * mask.float() for mask in masks)


def held_out(names: Iterable[str], share: float) -> set[str]:
    """The pictures that are only looked at: a share of them, one at least, never all. A name's place does not depend on
    the others', so that more pictures hold out mostly the same ones."""
    order = sorted(set(names), key=lambda name: hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest())
    count = min(max(1, round(share * len(order))), len(order) - 1) if share else 0
    return set(order[: max(0, count)])
