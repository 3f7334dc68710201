"""LoRA: ΔW = scale · up · down, for linear and convolution weights.

Hu et al. 2021 (https://arxiv.org/abs/2106.09685); convolutions as in kohya's LoCon and PEFT: the kernel stays
in `down`, `up` is 1×1. Scale is alpha / rank; where a file names no alpha it is 1, as in diffusers and ComfyUI.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import Self

from .. import algebra
from ..errors import AdapterError, ShapeError
from .base import Adapter, Term


@dataclass(frozen=True, eq=False)
class LowRank(Adapter):
    ALGEBRA = "LoRA"
    REQUIRED = frozenset({"up", "down"})
    OPTIONAL = frozenset({"alpha"})

    up: Tensor  # (out, rank, 1…)
    down: Tensor  # (rank, in, kernel…)
    alpha: float | None = None

    @classmethod
    def build(cls, factors: Mapping[str, Tensor]) -> Self:
        up, down = factors["up"], factors["down"]
        for name, factor in (("up", up), ("down", down)):
            if not factor.is_floating_point():
                raise AdapterError(f"{name} is {factor.dtype}, not a float type", remedy="Convert the file.")
            if factor.ndim < 2 or 0 in factor.shape:
                raise ShapeError(f"{name} has the shape {tuple(factor.shape)}, which is no matrix")
        if up.shape[1] != down.shape[0] or math.prod(up.shape[2:]) != 1:
            raise ShapeError(f"up {tuple(up.shape)} and down {tuple(down.shape)} do not share one rank")
        return cls(up, down, _alpha(factors.get("alpha")))

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """alpha / rank; an alpha of 0 means "alpha = rank" to the trainers that write it (kohya, LyCORIS)."""
        return 1.0 if not self.alpha else self.alpha / self.rank

    def require_fit(self, shape: tuple[int, ...]) -> None:
        rows, inputs, kernel = shape[0], shape[1] if len(shape) > 1 else 1, shape[2:]
        fits = self.up.shape[0] == rows and self.down.shape[1] == inputs
        # A 1×1 kernel is written as a matrix by some trainers and read as one by others.
        if not fits or _kernel(self.down.shape[2:]) != _kernel(kernel):
            found = (self.up.shape[0], *self.down.shape[1:])
            raise ShapeError(f"makes an update of {found}, the weight has {shape}", found=found, expected=shape)

    def delta(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return (self.scale * algebra.product(self.up.to(dtype), self.down.to(dtype))).reshape(shape)

    def add_(self, rows: Tensor, strength: float) -> None:
        """In one pass over the weight: the product is never built."""
        flat = rows.reshape(rows.shape[0], -1)
        up, down, factor = self.up.flatten(1), self.down.flatten(1), strength * self.scale
        if rows.dtype.itemsize < 4:  # there a scaled factor would be rounded more than the sum is
            flat.addmm_(up.to(rows.dtype), down.to(rows.dtype), alpha=factor)
        else:
            flat.addmm_(algebra.scaled(up, factor, rows.dtype), down.to(rows.dtype))
        if flat.data_ptr() != rows.data_ptr():  # memory that cannot be seen as a matrix (channels last)
            rows.copy_(flat.reshape(rows.shape))

    @classmethod
    def join(cls, terms: Sequence[Term], dtype: torch.dtype) -> Sequence[Term]:
        """One LoRA of all the ranks: Σ sᵢ Bᵢ Aᵢ = [s₁B₁ s₂B₂ …] · [A₁; A₂; …], scales and strengths in up."""
        if len(terms) < 2:
            return terms
        pairs = [(adapter, strength) for adapter, strength in terms if isinstance(adapter, LowRank)]
        up = torch.cat([algebra.scaled(a.up.flatten(1), a.scale * s, dtype) for a, s in pairs], dim=1)
        down = torch.cat([a.down.flatten(1).to(dtype) for a, _ in pairs])
        return [(cls(up, down), 1.0)]

    def packed(self) -> tuple[Tensor, Tensor, float | None]:
        return self.up, self.down, self.alpha

    def energy(self) -> float:
        return self.scale**2 * algebra.energy(self.up, self.down)

    @property
    def idle(self) -> bool:
        return not (self.up.any() and self.down.any())

    @property
    def swapped(self) -> Self:
        return self._swapped

    @cached_property
    def _swapped(self) -> Self:
        return replace(self, up=algebra.swap_halves(self.up))


def _kernel(shape: tuple[int, ...] | torch.Size) -> tuple[int, ...]:
    return () if math.prod(shape) == 1 else tuple(shape)


def _alpha(tensor: Tensor | None) -> float | None:
    if tensor is None:
        return None
    if tensor.numel() != 1 or tensor.is_complex():
        raise ShapeError(f"alpha has the shape {tuple(tensor.shape)}, it should be one number")
    return float(tensor)
