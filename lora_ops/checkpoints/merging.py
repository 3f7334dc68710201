"""Merging: a Landing put into a checkpoint on disk, a few rows at a time.

Each weight is read, changed in float32 and rounded once; everything else is copied byte for byte.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from functools import partial

import torch
from torch import Tensor

from .. import recipe
from ..algebra import swap_halves
from ..errors import AdapterError, FileError, LoraOpsError, shown
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
# Beside a weight that is stored as multiples of something: without knowing of what nobody can add to it.
_SCALES = ("weight_scale", "scale_weight", "weight_scale_2", "comfy_quant", "weight.absmax", "weight_scale_inv")
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
    Raises FileError like files.write, AdapterError for a weight that cannot be changed as it is stored.
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
            tensors = {each.name: _tensor(header, each, pieces, dtype, device) for each in checkpoint.stored[name]}
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


def _tensor(
    header: Header,
    stored: Stored,
    pieces: Mapping[tuple[str, str], tuple[Piece, ...]],
    dtype: torch.dtype | None,
    device: torch.device,
) -> Lazy:
    name, entry, part, target = stored
    rounded = _rounded(entry, part, dtype)
    there = pieces.get((target.part, target.key), ()) if target else ()
    if target and target.band:
        there = of_rows(there, target.band.start, target.band.length)
    if not there and rounded == entry.dtype:
        return Lazy(entry.dtype, entry.shape, partial(read_rows, header, name, COPIED), kept=True)
    _require_plain(header, name)
    change = partial(_swapped, pieces=there, dtype=rounded) if target and target.swap else None
    change = change or partial(merged, pieces=there, dtype=rounded)
    if not (target and target.swap) and _splits(there, entry):
        return Lazy(rounded, entry.shape, partial(_rows, header, name, there, rounded, device))
    return Lazy(rounded, entry.shape, partial(_whole, header, name, change, device))


def _rounded(entry: Entry, part: str, dtype: torch.dtype | None) -> torch.dtype:
    """What a tensor is stored as: dtype for a model's floats, of fp8 only for matrices; the VAE keeps its own."""
    small = dtype is not None and dtype.itemsize == 1 and len(entry.shape) < 2
    return entry.dtype if dtype is None or not part or entry.dtype not in FLOATS or small else dtype


def _require_plain(header: Header, name: str) -> None:
    """Raises AdapterError for a weight whose numbers are not the weight's values."""
    entry, module = header.entries[name], name.removesuffix("weight")
    scale = next((each for each in _SCALES if module + each in header.entries), None)
    if entry.dtype not in FLOATS or scale:
        how = f"{entry.dtype} with {scale}" if scale else f"{entry.dtype}"
        what = f"is stored as {how}, which is not changed here"
        raise AdapterError(f"{what}.", module=name, remedy="Use the checkpoint in bf16 or fp16, or mode live.")


def _splits(pieces: Sequence[Piece], entry: Entry) -> bool:
    """Whether the rows of a weight can be changed by themselves. LoKr's could, each block at the price of all."""
    if len(entry.shape) < 2 or not pieces:
        return True
    try:
        of_rows(pieces, 0, max(entry.shape[0] // 2, 1))
    except AdapterError:
        return False
    return not any(piece.adapter.ALGEBRA == "LoKr" for piece in pieces)


def _rows(
    header: Header, name: str, pieces: Sequence[Piece], dtype: torch.dtype, device: torch.device
) -> Iterator[Tensor]:
    start = 0
    entry = header.entries[name]
    for rows in read_rows(header, name, ROWS * entry.dtype.itemsize // 4):
        length = len(rows) if rows.ndim else 1
        here = pieces if not rows.ndim or length == entry.shape[0] else of_rows(pieces, start, length)
        yield merged(rows.to(device), here, dtype)
        start += length


def _whole(header: Header, name: str, change: Callable[[Tensor], Tensor], device: torch.device) -> Iterator[Tensor]:
    [weight] = read_rows(header, name, 1 << 62)
    yield change(weight.to(device))


def _swapped(weight: Tensor, pieces: Sequence[Piece], dtype: torch.dtype) -> Tensor:
    """Pieces on a weight that is stored with its halves exchanged."""
    return swap_halves(merged(swap_halves(weight), pieces, dtype))


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
