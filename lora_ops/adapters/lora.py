"""LoRA: ΔW = scale · up · down, for linear and convolution weights, with LoCon's Tucker form up · mid · down.

Hu et al. 2021 (https://arxiv.org/abs/2106.09685); convolutions as in kohya's LoCon and PEFT: the kernel stays
in `down`, `up` is 1×1. LyCORIS' Tucker form (use_tucker, https://arxiv.org/abs/2309.14859) has it in `mid`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from .. import algebra
from ..errors import ShapeError
from .base import Additive, Product, alpha_of, require_matrices, require_shape

BLOCK = 1 << 21  # numbers of a joined left side at a time: fresh memory for all of it would cost more than the copying


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
        self.add_all_(rows, [(self, strength)])

    @classmethod
    def add_all_(cls, rows: Tensor, terms: Sequence[tuple[Any, float]]) -> None:
        """As one LoRA, in one pass over the weight: Σ sᵢ Bᵢ Aᵢ = [s₁B₁ s₂B₂ …] · [A₁; A₂; …]. The product is never
        built, and of the left side no more than a block."""
        wide = torch.promote_types(rows.dtype, torch.float32)
        ups, downs = [each.up.flatten(1) for each, _ in terms], [each._inner(wide) for each, _ in terms]
        scales = [strength * each.scale for each, strength in terms]
        flat = rows.reshape(rows.shape[0], -1)
        if rows.dtype.itemsize < 4 and len(terms) == 1:  # there a scaled factor would be rounded more than the sum is
            flat.addmm_(ups[0].to(rows.dtype), downs[0].to(rows.dtype), alpha=scales[0])
        else:  # the scales go into the smaller side
            left, right = (scales, None) if flat.shape[0] < flat.shape[1] else (None, scales)
            down = algebra.joined(downs, 0, wide, right).to(rows.dtype)
            for block, parts in _blocks(flat, ups):
                block.addmm_(algebra.joined(parts, 1, wide, left).to(rows.dtype), down)
        if flat.data_ptr() != rows.data_ptr():  # memory that cannot be seen as a matrix (channels last)
            rows.copy_(flat.reshape(rows.shape))

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


def _blocks(rows: Tensor, ups: Sequence[Tensor]) -> Iterable[tuple[Tensor, Sequence[Tensor]]]:
    """Rows of a weight with those of the factors, as many at a time as BLOCK allows; one factor is never copied."""
    count = max(1, BLOCK // sum(up.shape[1] for up in ups))
    if len(ups) == 1 or len(rows) <= count:
        return [(rows, ups)]
    return zip(rows.split(count), zip(*(up.split(count) for up in ups), strict=True), strict=True)


def _zero(factor: Tensor) -> bool:
    """Whether all of it is zero; its beginning tells mostly that it is not."""
    return not factor[:1].any() and not factor.any()
