"""Unmerging: a recorded recipe subtracted again, and how far rounding leaves the result from the model before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..adapters import Additive
from ..errors import AdapterError, FileError, shown
from ..files import read_rows
from ..landing import Landing, land
from ..lora import TargetMap
from ..recipe import Ingredient, Recipe
from ..stack import Entry
from . import quantised
from .disk import Checkpoint
from .quantised import Where, number_of

BLOCK = 16 << 20  # bytes of a tensor compared at a time


def subtract(
    held: Recipe,
    names: Sequence[str],
    entry_of: Callable[[Ingredient], Entry],
    targets: TargetMap,
    file: str,
) -> tuple[Landing, Recipe]:
    """A landing that takes these LoRAs of a recipe off again (none named: all), and the recipe that is left.

    entry_of reads the LoRA of an ingredient. Raises FileError for a file without a recipe or a name that is not in it,
    AdapterError for what depends on the weight it was put on, and for what came before such a thing: only sums can be
    taken apart.
    """
    if not held.loras:
        raise FileError("has no recipe: nobody can tell what was merged.", file=file, remedy="Use the base itself.")
    wanted = _wanted(held, names, file)
    entries = {number: entry_of(held.loras[number]) for number in range(min(wanted), len(held.loras))}
    for number, entry in entries.items():
        landing = land([entry], targets)
        bent = [(key, piece) for (_, key), there in landing.pieces.items() for piece in there]
        bent = [(key, piece) for key, piece in bent if not isinstance(piece.adapter, Additive)]
        if bent:
            key, piece = bent[0]
            what = f"is {piece.adapter.ALGEBRA}, which changes a weight by what it was: it cannot be subtracted."
            if number not in wanted:
                what = f"was merged after what is to be taken off, and {what}"
            raise AdapterError(what, file=entry.lora.name, module=key, remedy="Use the base itself.")
    negative = [
        replace(entries[number], strengths={part: -each for part, each in entries[number].strengths.items()})
        for number in sorted(wanted)
    ]
    left = tuple(each for number, each in enumerate(held.loras) if number not in wanted)
    return land(negative, targets), Recipe(left)


def _wanted(held: Recipe, names: Sequence[str], file: str) -> set[int]:
    wanted = set() if names else set(range(len(held.loras)))
    for name in names:
        found = {number for number, each in enumerate(held.loras) if name in (each.lora, Path(each.lora).stem)}
        found = found or {number for number, each in enumerate(held.loras) if Path(name).stem == Path(each.lora).stem}
        if not found:
            listed = ", ".join(shown(each.lora) for each in held.loras)
            raise FileError(f"its recipe has no '{shown(name)}'.", file=file, remedy=f"It has {listed}.")
        wanted |= found
    return wanted


class Bound(NamedTuple):
    """How far rounding may leave a value from the one before merging: by this share of the largest that it was on the
    way, or by least, whichever is more."""

    share: float
    least: float


def bounds(merged: Checkpoint, unmerged: Checkpoint, landing: Landing) -> dict[str, Bound]:
    """dtype -> the bound of the changed weights that are stored so. Each was rounded twice, by half a unit in the last
    place, which gets no smaller below the dtype's normal numbers; a scale stretches that."""
    changed = {key for _, key in landing.pieces}
    found: dict[str, Bound] = {}
    for checkpoint in (merged, unmerged):
        for file, all_of in checkpoint.stored.items():
            where = checkpoint.beside(file)
            for name, entry, _, target in all_of:
                if target and target.key in changed:
                    info, kind = torch.finfo(entry.dtype), str(entry.dtype).removeprefix("torch.")
                    least = info.smallest_normal * info.eps * number_of(where, name)
                    found[kind] = Bound(info.eps, max(least, found[kind].least if kind in found else 0.0))
    return found


@dataclass(frozen=True)
class Distance:
    """How far two checkpoints are from each other: ‖A - B‖ / ‖B‖ over the weights of the model, the worst weight with
    its own, and how many weights differ."""

    relative: float
    worst: float
    worst_name: str
    different: int
    weights: int


def distance(one: Checkpoint, other: Checkpoint) -> Distance:
    """Compare the weights of two checkpoints of the same names, a block at a time.

    Raises FileError where the names or shapes differ.
    """
    theirs = {
        (_folder(file), stored.name): (where, stored.entry)
        for file, all_of in other.stored.items()
        for where in [other.beside(file)]
        for stored in all_of
    }
    wrong = whole = worst = 0.0
    worst_name, different, weights = "", 0, 0
    for file, all_of in one.stored.items():
        where = one.beside(file)
        for name, entry, part, _ in all_of:
            if not part or not entry.dtype.is_floating_point or quantised.beside(name):
                continue
            place, their = theirs.get((_folder(file), name), ({}, None))
            if their is None or their.shape != entry.shape:
                what = f"has no weight '{shown(name)}' of the shape {entry.shape}."
                raise FileError(what, file=other.path, remedy="Name the checkpoint that was merged into.")
            there = size = 0.0
            for mine, base in zip(_doubles(where, name), _doubles(place, name), strict=True):
                there += float((mine - base).square().sum())
                size += float(base.square().sum())
            wrong, whole, weights, different = wrong + there, whole + size, weights + 1, different + (there > 0)
            relative = (there / size) ** 0.5 if size else float(there > 0)
            if relative > worst:
                worst, worst_name = relative, name
    return Distance((wrong / whole) ** 0.5 if whole else 0.0, worst, worst_name, different, weights)


def _folder(file: str) -> str:
    return file.rpartition("/")[0]


def _doubles(where: Where, name: str) -> Iterator[Tensor]:
    """Blocks of as many rows, whatever they are stored as."""
    number, header = number_of(where, name), where[name]
    for rows in read_rows(header, name, BLOCK // 8 * header.entries[name].dtype.itemsize):
        yield rows.to(torch.float64) * number
