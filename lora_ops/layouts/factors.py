"""The factors of a module, from pieces that were cut otherwise: fused and split, without changing the update.

A part of a fused module has its rows of `up` and the directions that do something there. A fusion has the different
`down`s one below the other, each `up` in its own rows and columns. The two are each other's inverse.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..adapters import Adapter, Full, LowRank
from ..algebra import scaled, swap_halves
from ..errors import AdapterError
from ..landing import Piece
from ..lora import Band, Target
from .base import Factors


class _Part(NamedTuple):
    start: int  # row of the target
    up: Tensor  # (rows, rank)
    down: Tensor  # (rank, in·kernel…)
    scale: float


def factors(pieces: Sequence[Piece], target: Target) -> Factors | None:
    """What a weight's pieces do to a target there; None if that is nothing.

    Only plain LoRA is fused. Raises AdapterError for another algebra that would have to be or cannot be split, and for
    a scale that no alpha says.
    """
    whole = Band(0, target.shape[0])
    there = [piece for piece in pieces if overlap(piece.band or whole, target.rows).length]
    if not all(_plain(piece.adapter) for piece in there):
        return _passed(there, target)
    parts = [part for piece in there if (part := _part(piece.adapter, piece.band or whole, target.rows))]
    if not parts:
        return None
    folded = len({part.scale for part in parts}) > 1
    up, down = _joined(_of_one_scale(parts) if folded else parts, target.rows.length)
    rank, alpha = _rank_and_alpha(parts[0].scale, down.shape[0])
    if extra := rank - down.shape[0]:
        up, down = pad(up, (0, extra)), pad(down, (0, 0, 0, extra))
    if target.swap:
        up = swap_halves(up)
    kernel, inputs = (1,) * len(target.shape[2:]), target.shape[1:] or (1,)
    return Factors({"up": up.reshape(-1, rank, *kernel), "down": down.reshape(rank, *inputs)}, rank, alpha, folded)


def _plain(adapter: Adapter) -> bool:
    return isinstance(adapter, LowRank) and adapter.mid is None


def _passed(pieces: Sequence[Piece], target: Target) -> Factors:
    """Another algebra's factors, or those of some of its rows."""
    (piece, *others), rows = pieces, target.rows
    adapter, have = piece.adapter, piece.band or Band(0, target.shape[0])
    if others or overlap(have, rows) != rows:
        what = f"is {adapter.ALGEBRA} for a part of this layout's module, and only LoRA is fused."
        raise AdapterError(what, remedy="Choose the layout lycoris, which has names for parts.")
    if have != rows:
        adapter = adapter.narrowed(rows.start - have.start, rows.length)
    if target.swap:
        adapter = adapter.swapped
    tensors = adapter.factors(target.delta_shape)
    return Factors(tensors, adapter.rank, adapter.alpha, isinstance(adapter, Full) and adapter.scale != 1)


def overlap(one: Band, other: Band) -> Band:
    start = max(one.start, other.start)
    return Band(start, max(0, min(one.start + one.length, other.start + other.length) - start))


def _part(adapter: object, rows: Band, wanted: Band) -> _Part | None:
    """What an adapter of these rows does to the wanted ones, without the directions that do nothing there."""
    assert isinstance(adapter, LowRank)
    common = overlap(rows, wanted)
    if not common.length:
        return None
    up, down = adapter.up.flatten(1).narrow(0, common.start - rows.start, common.length), adapter.down.flatten(1)
    if common != rows and not adapter.idle:  # an untrained module stays one in all its parts
        active = up.float().any(0)
        if not active.any():
            return None
        if not active.all():
            up, down = up[:, active], down[active]
    return _Part(common.start - wanted.start, up, down, adapter.scale)


def _of_one_scale(parts: Sequence[_Part]) -> list[_Part]:
    """The parts at the first one's scale: the ratio goes into up, multiplied in float64 and rounded to float32."""
    scale = parts[0].scale
    return [part._replace(up=scaled(part.up, part.scale / scale, torch.float32)) for part in parts]


def _joined(parts: Sequence[_Part], rows: int) -> tuple[Tensor, Tensor]:
    """up (rows, rank) and down of parts in different rows; parts with the same down share its directions."""
    first = parts[0]
    if len(parts) == 1 and first.up.shape[0] == rows:
        return first.up, first.down
    downs: list[Tensor] = []
    columns: list[int] = []
    for part in parts:
        known = next((number for number, down in enumerate(downs) if _same(down, part.down)), len(downs))
        columns.append(sum(down.shape[0] for down in downs[:known]))
        if known == len(downs):
            downs.append(part.down)
    down = torch.cat([down.to(_common_dtype(downs)) for down in downs])
    up = torch.zeros(rows, down.shape[0], dtype=_common_dtype([part.up for part in parts]))
    for part, column in zip(parts, columns, strict=True):
        up[part.start : part.start + part.up.shape[0], column : column + part.up.shape[1]] = part.up
    return up, down


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one.float(), other.float())


def _common_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def _rank_and_alpha(scale: float, rank: int) -> tuple[int, float]:
    """The smallest rank from this one on for which an alpha says the scale exactly: at most the next power of two."""
    for enough in range(rank, 2 * rank + 1):
        if alpha := alpha_of(scale, enough):
            return enough, alpha
    raise AdapterError(f"has the scale {scale}, which no alpha says.")


def alpha_of(scale: float, rank: int) -> float | None:
    """An alpha of which alpha / rank is the scale to the bit, a float32 if one does; None if no float64 does."""
    near = scale * rank
    candidates = (float(torch.tensor(near)), near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf))
    return next((alpha for alpha in candidates if alpha / rank == scale), None)
