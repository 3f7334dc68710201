"""Algebra of low-rank products: ΔW = up · down, without building ΔW where that can be avoided."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import AdapterError

IN_CACHE = 1 << 15  # numbers of a factor that are widened at a time: memory for all of them would cost more than that


def product(up: Tensor, down: Tensor) -> Tensor:
    """ΔW of a pair of factors, flattened: (out, rank, 1…) · (rank, in, kernel…) -> (out, in·kernel…)."""
    return torch.mm(up.flatten(1), down.flatten(1))


def folded(core: Tensor, down: Tensor) -> Tensor:
    """A Tucker core and the factor below it as one: (rank, rank', kernel…) · (rank', in, 1…) -> (rank, in, kernel…).

    ΔW = up · core · down is then up · folded: the convolutions behind each other are one with the core's kernel.
    """
    return torch.einsum("ab...,bi->ai...", core, down.flatten(1))


def exact(value: float) -> Tensor:
    """A number as a tensor: a float32 where one says it, else a float64."""
    single = torch.tensor(value, dtype=torch.float32)
    return single if float(single) == value else torch.tensor(value, dtype=torch.float64)


def kernel(shape: Sequence[int]) -> tuple[int, ...]:
    """A kernel without the ones at its end, in which writers differ: a 1×1 convolution is also kept as a matrix, and
    PEFT keeps the Tucker core of a Conv1d with one dimension more."""
    *rest, last = (0, *shape)
    return kernel(rest[1:]) if last == 1 else tuple(shape)


def scaled(factor: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """scale · factor in dtype, multiplied in float64 and rounded once.

    A sum W + up · down with the scale in a factor then comes closer to the truth than W + scale · (up · down) in
    float32, at the price of the smaller tensor; a scale of a power of two rounds nothing in either.
    """
    if scale == 1:
        return factor.to(dtype)
    wide = torch.float32 if factor.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    if factor.device.type != "cpu" or factor.numel() <= IN_CACHE:
        return (factor.to(wide) * scale).to(dtype)
    found = torch.empty_like(factor, dtype=dtype)
    rows = max(1, IN_CACHE * len(factor) // factor.numel())
    for part, to in zip(factor.split(rows), found.split(rows), strict=True):
        to.copy_(part.to(wide) * scale)
    return found


def joined(factors: Sequence[Tensor], dim: int, dtype: torch.dtype, scales: Sequence[float] | None = None) -> Tensor:
    """Factors on top of each other (dim 0) or side by side (1), in dtype, each times its scale."""
    if len(factors) == 1:
        return factors[0].to(dtype) if scales is None else scaled(factors[0], scales[0], dtype)
    alike = len({each.dtype for each in factors}) == 1
    found = torch.cat(list(factors) if alike else [each.to(dtype) for each in factors], dim).to(dtype)
    if scales is not None and len(set(scales)) == 1:
        found.mul_(scales[0])
    elif scales is not None:
        for part, scale in zip(found.split([each.shape[dim] for each in factors], dim), scales, strict=True):
            part.mul_(scale)
    return found


def scaled_rows(factor: Tensor, rows: Tensor) -> Tensor:
    """factor with row r multiplied by rows[r] (float64): in its own dtype if that is exact, else rounded to float32.

    rows may be a single number, for all of them. Raises AdapterError if float32 cannot hold it.
    """
    exact = factor.double() * rows.reshape(-1, *(1 for _ in factor.shape[1:]))
    kept = exact.to(factor.dtype)
    if not torch.equal(kept.double(), exact):
        kept = exact.to(torch.float32)
    if not torch.isfinite(kept.double()).all():
        raise AdapterError("would hold infinities", remedy="Use smaller factors.")
    return kept


def energy(up: Tensor, down: Tensor, core: Tensor | None = None) -> float:
    """‖up · core · down‖² (Frobenius) in float32, with no more memory than the factors take, whatever ΔW would.

    From two rank × rank Gram matrices, trace((upᵀ up) core (down downᵀ) coreᵀ), at each place of a core's kernel: rank²
    (out + in) operations where the product would take rank · out · in. Where the rank is so large that ΔW is less, from
    ΔW.
    """
    up, down = up.flatten(1).float(), down.flatten(1).float()
    if core is None and up.shape[1] ** 2 > up.shape[0] * down.shape[1]:
        return float((up @ down).square().sum(dtype=torch.float64))
    left, right = up.T @ up, down @ down.T
    if core is None:
        return float((left * right).sum(dtype=torch.float64))
    core = core.float().reshape(*core.shape[:2], -1)
    mixed = torch.einsum("bak,ad->bdk", (left @ core.flatten(1)).reshape(core.shape), right)
    return float(mixed.mul_(core).sum(dtype=torch.float64))


def swap_halves(rows: Tensor) -> Tensor:
    """The tensor with the two halves of its rows exchanged (scale/shift order differs between model formats)."""
    first, second = rows.chunk(2)
    return torch.cat((second, first))
