"""Algebra of low-rank products: ΔW = up · down, without building ΔW where that can be avoided."""

from __future__ import annotations

import torch
from torch import Tensor


def product(up: Tensor, down: Tensor) -> Tensor:
    """ΔW of a pair of factors, flattened: (out, rank, 1…) · (rank, in, kernel…) -> (out, in·kernel…)."""
    return torch.mm(up.flatten(1), down.flatten(1))


def scaled(factor: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """scale · factor in dtype, multiplied in float64 and rounded once.

    A sum W + up · down with the scale in a factor then comes closer to the truth than W + scale · (up · down) in
    float32, at the price of the smaller tensor; a scale of a power of two rounds nothing in either.
    """
    if scale == 1:
        return factor.to(dtype)
    wide = torch.float32 if factor.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    return (factor.to(wide) * scale).to(dtype)


def energy(up: Tensor, down: Tensor) -> float:
    """‖up · down‖² (Frobenius) from two rank × rank Gram matrices, computed in float32.

    trace((upᵀ up)(down downᵀ)): rank² (out + in) operations where the product would take rank · out · in.
    """
    up, down = up.flatten(1).float(), down.flatten(1).float()
    return float(((up.T @ up) * (down @ down.T)).sum(dtype=torch.float64))


def swap_halves(rows: Tensor) -> Tensor:
    """The tensor with the two halves of its rows exchanged (scale/shift order differs between model formats)."""
    first, second = rows.chunk(2)
    return torch.cat((second, first))
