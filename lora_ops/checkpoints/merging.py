"""Merging: a Landing put into a checkpoint on disk, a few rows at a time.

Each weight is read, changed in float32 and rounded once; everything else is copied byte for byte.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial

import torch
from torch import Tensor

from .. import recipe
from ..algebra import swap_halves
from ..errors import AdapterError, FileError, LoraOpsError, StackError, shown
from ..files import Entry, Header, Lazy, Progress, read_rows, read_text, write, write_folder
from ..landing import Landing, Piece, merged, of_rows
from ..layouts.metadata import BASES
from ..recipe import Recipe
from .disk import INDEX, INDEX_LIMIT, Checkpoint, Stored

DTYPES: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
FLOATS = (torch.float64, *DTYPES.values())
ROWS = 8 << 20  # bytes of float32 that are computed at a time: small enough for memory to be used again, not got anew
COPIED = 4 << 20  # bytes that are copied at a time
# Beside a weight that is stored as multiples of something; of which one number for all of fp8 is understood.
_SCALE = ("weight_scale", "scale_weight")
_SCALES = (*_SCALE, "weight_scale_2", "comfy_quant", "weight.absmax", "weight_scale_inv")
_HASHES = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")

Content = dict[str, tuple[dict[str, Lazy], dict[str, str]]]  # file -> tensors and metadata


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
) -> None:
    """Write a checkpoint with a landing in it: a file as a file, a folder as a folder, or as a single file.

    loras is the whole recipe afterwards (None: the checkpoint's own, and then the landing's). dtype rounds all weights
    of the model and its text encoders to one dtype (fp8: the matrices), None each to its own. Memory is bounded.
    Raises FileError like files.write, AdapterError for a weight that cannot be changed as it is stored, StackError for
    a strength that changes while sampling: a file has one.
    """
    if not checkpoint.folder:
        tensors, told = contents(checkpoint, landing, dtype=dtype, device=device, loras=loras)
        write(out, tensors, told, overwrite=overwrite, progress=progress)
        return
    content = _content(checkpoint, landing, dtype, torch.device(device), loras)
    if single:
        write(out, *_joined(checkpoint, content), overwrite=overwrite, progress=progress)
    else:
        texts = _indices(checkpoint, content) if dtype else {}
        copies = {name: path for name, path in checkpoint.copied.items() if name not in texts}
        write_folder(out, content, texts, copies, overwrite=overwrite, progress=progress)


def contents(
    checkpoint: Checkpoint,
    landing: Landing,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    loras: Recipe | None = None,
) -> tuple[Mapping[str, Lazy], Mapping[str, str]]:
    """What merge writes for a single file: tensors and metadata. Raises FileError for a folder."""
    if checkpoint.folder:
        raise FileError("is a folder, not a file.", file=checkpoint.path, remedy="Use `python -m lora_ops merge`.")
    [content] = _content(checkpoint, landing, dtype, torch.device(device), loras).values()
    return content


def _content(
    checkpoint: Checkpoint, landing: Landing, dtype: torch.dtype | None, device: torch.device, loras: Recipe | None
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
    for name, header in checkpoint.files.items():
        try:
            made = [_tensors(header, each, pieces, dtype, device) for each in checkpoint.stored[name]]
            tensors = {key: tensor for each in sorted(made, key=len) for key, tensor in each.items()}  # new scales last
        except LoraOpsError as error:
            error.file = header.path
            raise
        told = metadata(header.metadata, landing.family, loras) if changed else dict(header.metadata)
        content[name] = tensors, told
    return content


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


def _tensors(
    header: Header,
    stored: Stored,
    pieces: Mapping[tuple[str, str], tuple[Piece, ...]],
    dtype: torch.dtype | None,
    device: torch.device,
) -> dict[str, Lazy]:
    """A tensor as it will be written; with a weight that has a scale, the scale."""
    name, entry, part, target = stored
    rounded = _rounded(entry, part, dtype)
    there = pieces.get((target.part, target.key), ()) if target else ()
    if target and target.band:
        there = of_rows(there, target.band.start, target.band.length)
    if not there and rounded == entry.dtype:
        return {name: Lazy(entry.dtype, entry.shape, partial(read_rows, header, name, COPIED), kept=True)}
    scale = _scale(header, name, dtype)
    swap = bool(target and target.swap)
    change = _Change(header, name, there, device, swap, not swap and _splits(there, entry), scale)
    made = {name: Lazy(rounded, entry.shape, partial(change.blocks, rounded))}
    if scale:
        made[scale] = Lazy(torch.float32, header.entries[scale].shape, lambda: [change.scale_of(rounded)])
    return made


@dataclass(frozen=True, eq=False)
class _Change:
    """A weight as stored, and what happens to it."""

    header: Header
    name: str
    pieces: Sequence[Piece]
    device: torch.device
    swap: bool  # stored with its halves exchanged
    splits: bool  # whether its rows can be changed by themselves
    scale: str | None  # the tensor whose one number it is stored in multiples of

    def blocks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """Its rows, changed, in dtype: in multiples of the new scale if there is a scale, as the host's rule is."""
        if not self.scale:
            yield from self._changed(dtype)
            return
        scale = self.scale_of(dtype).to(self.device)
        for rows in self._changed(torch.float32):
            yield (rows / scale).to(dtype)

    def scale_of(self, dtype: torch.dtype) -> Tensor:
        """The scale that lets the largest value be the dtype's largest."""
        assert self.scale
        largest = max((float(rows.abs().amax()) for rows in self._changed(torch.float32)), default=0.0)
        [old] = read_rows(self.header, self.scale, COPIED)
        return torch.full_like(old, largest / torch.finfo(dtype).max) if largest else old

    def _changed(self, dtype: torch.dtype) -> Iterator[Tensor]:
        entry, start = self.header.entries[self.name], 0
        old = next(iter(read_rows(self.header, self.scale, COPIED))).to(self.device) if self.scale else None
        limit = ROWS * entry.dtype.itemsize // 4 if self.splits else 1 << 62
        for rows in read_rows(self.header, self.name, limit):
            length = len(rows) if rows.ndim else 1
            here = self.pieces if not rows.ndim or length == entry.shape[0] else of_rows(self.pieces, start, length)
            weight = rows.to(self.device) if old is None else rows.to(self.device, torch.float32) * old
            start += length
            if self.swap:
                yield swap_halves(merged(swap_halves(weight), here, dtype))
            else:
                yield merged(weight, here, dtype)


def _rounded(entry: Entry, part: str, dtype: torch.dtype | None) -> torch.dtype:
    """What a tensor is stored as: dtype for a model's floats, of fp8 only for matrices; the VAE keeps its own."""
    small = dtype is not None and dtype.itemsize == 1 and len(entry.shape) < 2
    return entry.dtype if dtype is None or not part or entry.dtype not in FLOATS or small else dtype


def _scale(header: Header, name: str, dtype: torch.dtype | None) -> str | None:
    """The scale that a weight has beside it, if any. Raises AdapterError for a weight that is stored in another way."""
    entry, module = header.entries[name], name.removesuffix("weight")
    beside = [each for each in _SCALES if module + each in header.entries and name.endswith("weight")]
    scales = [module + each for each in beside if each in _SCALE]
    fp8 = entry.dtype in FLOATS and entry.dtype.itemsize == 1
    if entry.dtype in FLOATS and not beside:
        return None
    if fp8 and dtype is None and len(scales) == 1 and set(beside) <= {*_SCALE, "comfy_quant"}:
        there = header.entries[scales[0]]
        if there.dtype == torch.float32 and math.prod(there.shape) == 1:
            return scales[0]
    how = " with ".join([str(entry.dtype), *beside])
    remedy = "Use the checkpoint in bf16 or fp16, or mode live."
    raise AdapterError(f"is stored as {how}, which cannot be changed so.", module=name, remedy=remedy)


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
    """The indices of shards, with the size that they have now."""
    texts = {}
    for name, path in checkpoint.copied.items():
        if name.endswith(INDEX):
            index = json.loads(read_text(path, INDEX_LIMIT))
            folder = name.rpartition("/")[0]
            shards = [tensors for file, (tensors, _) in content.items() if file.rpartition("/")[0] == folder]
            size = sum(tensor.nbytes for shard in shards for tensor in shard.values())
            texts[name] = json.dumps({**index, "metadata": {**index.get("metadata", {}), "total_size": size}}, indent=2)
    return texts
