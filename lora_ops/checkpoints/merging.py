"""Merging: a Landing put into a checkpoint on disk, a few rows at a time.

Each weight is read, changed in float32 and rounded once; everything else is copied byte for byte.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from .. import recipe
from ..algebra import swap_halves
from ..errors import AdapterError, FileError, LoraOpsError, StackError, shown
from ..files import Entry, Lazy, Progress, read_rows, read_text, write, write_folder
from ..landing import Landing, Piece, merged, of_rows
from ..layouts.metadata import BASES
from ..recipe import Recipe
from ..survival import Survival, measured
from . import quantised
from .disk import INDEX, INDEX_LIMIT, Checkpoint, Stored
from .quantised import Scale, Where

DTYPES: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
ROWS = 2 << 20  # bytes of float32 that are computed at a time: small enough for memory to be used again, not got anew
COPIED = 2 << 20  # bytes that are copied at a time
_HASHES = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")

Content = dict[str, tuple[dict[str, Lazy], dict[str, str]]]  # file -> tensors and metadata


class Contents(NamedTuple):
    """What is written for a single file. survival fills as the tensors are made: how much of the update there is in
    each weight that is stored as fp8."""

    tensors: Mapping[str, Lazy]
    metadata: Mapping[str, str]
    survival: Mapping[str, Survival]


def merge(
    checkpoint: Checkpoint,
    landing: Landing,
    out: str | os.PathLike[str],
    *,
    loras: Recipe | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    single: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Mapping[str, Survival]:
    """Write a checkpoint with a landing in it: a file as a file, a folder as a folder, or as a single file.

    loras is the whole recipe afterwards (None: the checkpoint's own, and then the landing's). dtype rounds all weights
    of the model and its text encoders to one dtype (fp8: the matrices), None each to its own. Memory is bounded.
    Returns how much of the update there is in each changed weight that is stored as fp8.
    Raises FileError like files.write, AdapterError for a weight that cannot be changed as it is stored, StackError for
    a strength that changes while sampling: a file has one.
    """
    if not checkpoint.folder:
        tensors, told, survival = contents(checkpoint, landing, dtype=dtype, device=device, loras=loras)
        write(out, tensors, told, overwrite=overwrite, progress=progress)
        return survival
    survival = {}
    content = _content(checkpoint, landing, dtype, torch.device(device), loras, survival)
    if single:
        write(out, *_joined(checkpoint, content), overwrite=overwrite, progress=progress)
    else:
        texts = _indices(checkpoint, content) if dtype else {}
        copies = {name: path for name, path in checkpoint.copied.items() if name not in texts}
        write_folder(out, content, texts, copies, overwrite=overwrite, progress=progress)
    return survival


def contents(
    checkpoint: Checkpoint,
    landing: Landing,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    loras: Recipe | None = None,
) -> Contents:
    """What merge writes for a single file. Raises FileError for a folder."""
    if checkpoint.folder:
        raise FileError("is a folder, not a file.", file=checkpoint.path, remedy="Use `python -m lora_ops merge`.")
    survival: dict[str, Survival] = {}
    [content] = _content(checkpoint, landing, dtype, torch.device(device), loras, survival).values()
    return Contents(*content, survival)


def _content(
    checkpoint: Checkpoint,
    landing: Landing,
    dtype: torch.dtype | None,
    device: torch.device,
    loras: Recipe | None,
    survival: dict[str, Survival],
) -> Content:
    for row in landing.rows:
        if not row.entry.schedule.constant:
            what, remedy = (
                "follows a schedule, which no weight can hold.",
                "Take it out of its row, or switch the row off.",
            )
            raise StackError(what, file=row.entry.lora.name, remedy=remedy)
    move = partial(Tensor.to, device=device)
    pieces = {
        place: tuple(Piece.unpacked(piece.packed(), move) for piece in there) if device.type != "cpu" else there
        for place, there in landing.pieces.items()
    }
    held = Recipe.of_metadata(checkpoint.metadata, str(checkpoint.path))
    loras = held.joined(recipe.of(landing)) if loras is None else loras
    changed = dtype is not None or bool(pieces)
    content: Content = {}
    beside: dict[tuple[str, str], Lazy | None] = {}  # (folder, name) -> what becomes of a scale; None: it is left out
    for file, header in checkpoint.files.items():
        tell = survival.__setitem__ if not checkpoint.folder else partial(_tell_of, survival, file)
        where, tensors = checkpoint.beside(file), {}
        try:
            for stored in checkpoint.stored[file]:
                tensors[stored.name], more = _tensor(where, stored, pieces, dtype, device, tell)
                beside |= {(_folder(file), name): tensor for name, tensor in more.items()}
        except LoraOpsError as error:
            error.file = header.path
            raise
        told = metadata(header.metadata, landing.family, loras) if changed else dict(header.metadata)
        content[file] = tensors, told
    return _without_scales(content, beside) if beside else content


def _without_scales(content: Content, beside: Mapping[tuple[str, str], Lazy | None]) -> Content:
    """The content with what becomes of scales; where none is left in a folder, nothing in it speaks of them."""
    found: Content = {}
    for file, (tensors, told) in content.items():
        all_of = {name: beside.get((_folder(file), name), tensor) for name, tensor in tensors.items()}
        found[file] = {name: tensor for name, tensor in all_of.items() if tensor}, told
    left = {_folder(file) for file, (tensors, _) in found.items() if any(map(quantised.scaled, tensors))}
    for file, (tensors, told) in found.items():
        if _folder(file) not in left:
            kept = {name: tensor for name, tensor in tensors.items() if not quantised.marks(name)}
            found[file] = kept, {key: text for key, text in told.items() if key != quantised.FORMATS}
    return found


def _folder(file: str) -> str:
    return file.rpartition("/")[0]


def _tell_of(survival: dict[str, Survival], file: str, name: str, found: Survival) -> None:
    survival[f"{file}: {name}"] = found


def metadata(source: Mapping[str, str], family: str, loras: Recipe) -> dict[str, str]:
    """What a merged file says about itself: all that its source says but hashes, the recipe, and ModelSpec's fields."""
    kept = {key: value for key, value in source.items() if key not in (*_HASHES, recipe.KEY, "modelspec.merged_from")}
    base = BASES.get(family)
    told = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": base.architecture if base else family,
        **kept,
        "modelspec.date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if loras.loras:
        told |= {recipe.KEY: loras.text, "modelspec.merged_from": ", ".join(each.lora for each in loras.loras)}
    return told


def _tensor(
    where: Where,
    stored: Stored,
    pieces: Mapping[tuple[str, str], tuple[Piece, ...]],
    dtype: torch.dtype | None,
    device: torch.device,
    tell: Tell,
) -> tuple[Lazy, dict[str, Lazy | None]]:
    """A tensor as it will be written, and what becomes of what is beside it: None, it is left out."""
    name, entry, part, target = stored
    rounded = entry.dtype if quantised.beside(name) else _rounded(entry, part, dtype)
    there = pieces.get((target.part, target.key), ()) if target else ()
    if target and target.band:
        there = of_rows(there, target.band.start, target.band.length)
    if dtype and target and entry.dtype not in quantised.FLOATS:
        quantised.scale_of(where, name)  # says that it cannot be rounded to dtype
    if not there and rounded == entry.dtype:
        return Lazy(entry.dtype, entry.shape, partial(read_rows, where[name], name, COPIED), kept=True), {}
    scale = quantised.scale_of(where, name)
    swap = bool(target and target.swap)
    change = _Change(where, name, there, device, rounded, swap, not swap and _splits(there, entry), scale, tell)
    tensor = Lazy(rounded, entry.shape, change.blocks)
    if not scale:
        return tensor, {}
    if rounded != entry.dtype:
        return tensor, dict.fromkeys((scale.name, *scale.others))
    shape, size = where[scale.name].entries[scale.name].shape, entry.end - entry.start
    return tensor, {scale.name: Lazy(torch.float32, shape, lambda: [change.new_scale], before=size)}


Tell = Callable[[str, Survival], None]  # of a weight


@dataclass(frozen=True, eq=False)
class _Change:
    """A weight as stored, and what happens to it."""

    where: Where
    name: str
    pieces: Sequence[Piece]
    device: torch.device
    dtype: torch.dtype  # afterwards
    swap: bool  # stored with its halves exchanged
    splits: bool  # whether its rows can be changed by themselves
    scale: Scale | None
    tell: Tell

    def blocks(self) -> Iterator[Tensor]:
        """Its rows, changed and rounded: to multiples of the new scale where it had one and stays what it was."""
        scaled = self.scale and self.dtype == self.where[self.name].entries[self.name].dtype
        scale = self.new_scale.to(self.device) if scaled else None
        counts, found = self.pieces and self.dtype.itemsize == 1, Survival()
        for base, wanted in self._changed():
            stored = (wanted if scale is None else wanted / scale).to(self.dtype)
            if counts:
                back = stored.to(wanted.dtype)
                back = back if scale is None else back * scale
                found = found.and_of(measured(base.to(wanted.dtype), wanted, back))
            yield stored
        if counts:
            self.tell(self.name, found)

    @cached_property
    def new_scale(self) -> Tensor:
        """The scale that lets the largest value be the largest that is read back, as the host's rule is."""
        assert self.scale
        largest = max((float(wanted.abs().amax()) for _, wanted in self._changed() if wanted.numel()), default=0.0)
        return torch.full_like(self._old_scale, largest / self.scale.largest) if largest else self._old_scale

    @cached_property
    def _old_scale(self) -> Tensor:
        assert self.scale
        return quantised.read(self.where, self.scale.name)

    def _changed(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks of its rows as they were and as they are to be, the latter in float32 at least."""
        header, start = self.where[self.name], 0
        entry = header.entries[self.name]
        wide = torch.promote_types(entry.dtype if entry.dtype.itemsize > 1 else torch.float32, torch.float32)
        old = self._old_scale.to(self.device) if self.scale else None
        limit = ROWS * entry.dtype.itemsize // 4 if self.splits else 1 << 62
        for rows in read_rows(header, self.name, limit):
            length = len(rows) if rows.ndim else 1
            here = self.pieces if not rows.ndim or length == entry.shape[0] else of_rows(self.pieces, start, length)
            base = rows.to(self.device) if old is None else rows.to(self.device, torch.float32) * old
            start += length
            if self.swap:
                yield base, swap_halves(merged(swap_halves(base), here, wide))
            else:
                yield base, merged(base, here, wide)


def _rounded(entry: Entry, part: str, dtype: torch.dtype | None) -> torch.dtype:
    """What a tensor is stored as: dtype for a model's floats, of fp8 only for matrices; the VAE keeps its own."""
    small = dtype is not None and dtype.itemsize == 1 and len(entry.shape) < 2
    return entry.dtype if dtype is None or not part or entry.dtype not in quantised.FLOATS or small else dtype


def _splits(pieces: Sequence[Piece], entry: Entry) -> bool:
    """Whether the rows of a weight can be changed by themselves. LoKr's could, each block at the price of all."""
    if len(entry.shape) < 2 or not pieces:
        return True
    try:
        of_rows(pieces, 0, max(entry.shape[0] // 2, 1))
    except AdapterError:
        return False
    return not any(piece.adapter.ALGEBRA == "LoKr" for piece in pieces)


def _joined(checkpoint: Checkpoint, content: Content) -> tuple[dict[str, Lazy], dict[str, str]]:
    """All shards as one file. Raises FileError for a folder that means more than its tensors' names say."""
    if "model_index.json" in checkpoint.copied:
        what = "is a folder of diffusers, of which no single file can be made: its files use the same names."
        raise FileError(what, file=checkpoint.path, remedy="Write it as a folder.")
    tensors: dict[str, Lazy] = {}
    for shard, _ in content.values():
        if twice := tensors.keys() & shard.keys():
            what = f"holds the tensor '{shown(min(twice))}' in two files."
            raise FileError(what, file=checkpoint.path, remedy="Write it as a folder.")
        tensors |= shard
    return tensors, {key: value for _, told in reversed(content.values()) for key, value in told.items()}


def _indices(checkpoint: Checkpoint, content: Content) -> dict[str, str]:
    """The indices of shards, with the size and the tensors that they have now."""
    texts = {}
    for name, path in checkpoint.copied.items():
        if name.endswith(INDEX):
            index = json.loads(read_text(path, INDEX_LIMIT))
            folder = name.rpartition("/")[0]
            shards = [tensors for file, (tensors, _) in content.items() if file.rpartition("/")[0] == folder]
            size = sum(tensor.nbytes for shard in shards for tensor in shard.values())
            there = {name for shard in shards for name in shard}
            found = {name: file for name, file in index["weight_map"].items() if name in there}
            told = {**index, "metadata": {**index.get("metadata", {}), "total_size": size}, "weight_map": found}
            texts[name] = json.dumps(told, indent=2)
    return texts
