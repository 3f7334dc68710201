"""LoRA: ΔW = scale · up · down, for linear and convolution weights, with LoCon's Tucker form up · mid · down.

Hu et al. 2021 (https://arxiv.org/abs/2106.09685); convolutions as in kohya's LoCon and PEFT: the kernel stays
in `down`, `up` is 1×1. LyCORIS' Tucker form (use_tucker, https://arxiv.org/abs/2309.14859) has it in `mid`.
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
from ..errors import ShapeError
from .base import Additive, Product, Term, alpha_of, require_matrices, require_shape


@dataclass(frozen=True, eq=False)
class LowRank(Additive):
    ALGEBRA = "LoRA"
    REQUIRED = frozenset({"up", "down"})
    OPTIONAL = frozenset({"mid", "alpha"})

    up: Tensor  # (out, rank, 1…)
    down: Tensor  # (rank, in, kernel…); (rank, in, 1…) with a mid
    alpha: float | None = None
    mid: Tensor | None = None  # (rank, rank, kernel…)

    @classmethod
    def build(cls, factors: Mapping[str, Tensor]) -> Self:
        require_matrices(factors)
        up, down, mid = factors["up"], factors["down"], factors.get("mid")
        if up.shape[1] != down.shape[0] or math.prod(up.shape[2:]) != 1:
            raise ShapeError(f"up {tuple(up.shape)} and down {tuple(down.shape)} do not share one rank")
        if mid is not None and (mid.shape[:2] != (up.shape[1],) * 2 or math.prod(down.shape[2:]) != 1):
            raise ShapeError(f"mid {tuple(mid.shape)} is no core for up {tuple(up.shape)} and down {tuple(down.shape)}")
        return cls(up, down, alpha_of(factors), mid)

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def require_fit(self, shape: tuple[int, ...]) -> None:
        core = self.down if self.mid is None else self.mid
        found = (self.up.shape[0], self.down.shape[1], *core.shape[2:])
        flat = found[1:] == (math.prod(shape[1:]),)  # as core's Train LoRA writes kernels
        require_shape(found, (shape[0], *found[1:]) if flat else shape)

    def delta(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return (self.scale * algebra.product(self.up.to(dtype), self._inner(dtype).to(dtype))).reshape(shape)

    def add_(self, rows: Tensor, strength: float) -> None:
        """In one pass over the weight: the product is never built."""
        flat = rows.reshape(rows.shape[0], -1)
        if rows.dtype.itemsize < 4:  # there a scaled factor would be rounded more than the sum is
            up, down = self.up.flatten(1).to(rows.dtype), self._inner(rows.dtype).to(rows.dtype)
            flat.addmm_(up, down, alpha=strength * self.scale)
        else:
            flat.addmm_(*self._scaled(strength, rows.dtype))
        if flat.data_ptr() != rows.data_ptr():  # memory that cannot be seen as a matrix (channels last)
            rows.copy_(flat.reshape(rows.shape))

    @classmethod
    def join(cls, terms: Sequence[Term], dtype: torch.dtype) -> Sequence[Term]:
        """As one LoRA, in one pass over the weight: Σ sᵢ Bᵢ Aᵢ = [s₁B₁ s₂B₂ …] · [A₁; A₂; …]."""
        lows = [(adapter, strength) for adapter, strength in terms if isinstance(adapter, LowRank)]
        if len(lows) < 2:
            return terms
        wide = torch.promote_types(dtype, torch.float32)
        inner = [adapter._inner(wide) for adapter, _ in lows]
        ranks, shape = [len(each) for each in inner], (len(lows[0][0].up), inner[0].shape[1])
        up = inner[0].new_empty((shape[0], sum(ranks)), dtype=wide)
        down = inner[0].new_empty((sum(ranks), shape[1]), dtype=wide)
        places = zip(up.split(ranks, dim=1), down.split(ranks), strict=True)
        for (adapter, strength), below, (left, right) in zip(lows, inner, places, strict=True):
            left.copy_(adapter.up.flatten(1))
            right.copy_(below)
            (left if shape[0] < shape[1] else right).mul_(strength * adapter.scale)
        return [(cls(up, down), 1.0)]

    def _scaled(self, strength: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """up and down as matrices in dtype, scale and strength in the smaller of them."""
        up, down, factor = self.up.flatten(1), self._inner(dtype), strength * self.scale
        if up.numel() < down.numel():
            return algebra.scaled(up, factor, dtype), down.to(dtype)
        return up.to(dtype), algebra.scaled(down, factor, dtype)

    def _inner(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """All below up as a matrix: down in its own dtype, or a mid folded into it in this one, in float32 at least."""
        if self.mid is None:
            return self.down.flatten(1)
        wide = torch.promote_types(dtype, torch.float32)
        return algebra.folded(self.mid.to(wide), self.down.to(wide)).flatten(1)

    def product(self) -> Product:
        return Product(self._inner(), self.up.flatten(1))

    def factors(self, shape: tuple[int, ...]) -> Mapping[str, Tensor]:
        ones = (1,) * len(shape[2:])
        up = self.up.reshape(*self.up.shape[:2], *ones)
        if self.mid is not None:
            return {"up": up, "down": self.down.reshape(*self.down.shape[:2], *ones), "mid": self.mid}
        return {"up": up, "down": self.down.reshape(self.rank, *(shape[1:] or (1,)))}

    def packed(self) -> tuple[Tensor, Tensor, float | None, Tensor | None]:
        return self.up, self.down, self.alpha, self.mid

    def energy(self) -> float:
        return self.scale**2 * algebra.energy(self.up, self.down, self.mid)

    @property
    def idle(self) -> bool:
        return _zero(self.up) or _zero(self.down) or (self.mid is not None and _zero(self.mid))

    @property
    def swapped(self) -> Self:
        return self._swapped

    @cached_property
    def _swapped(self) -> Self:
        return replace(self, up=algebra.swap_halves(self.up))

    def narrowed(self, start: int, length: int) -> Self:
        return self._narrowed.setdefault((start, length), replace(self, up=self.up.narrow(0, start, length)))

    @cached_property
    def _narrowed(self) -> dict[tuple[int, int], Self]:
        return {}

    def scaled(self, rows: Tensor) -> Mapping[str, Tensor]:
        return {"up": algebra.scaled_rows(self.up, rows)}


def _zero(factor: Tensor) -> bool:
    """Whether all of it is zero; its beginning tells mostly that it is not."""
    return not factor[:1].any() and not factor.any()
