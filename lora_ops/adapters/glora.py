"""GLoRA: W' = W + scale · (W · a1 · a2 + b1 · b2): the weight's own inputs mixed anew, and a LoRA beside it.

Chavan et al. 2023 (https://arxiv.org/abs/2306.07967) as LyCORIS has it; a mixes the inputs at each place of a kernel.
LyCORIS' first GLoRA files have each pair the other way round (a2 · a1, b2 · b1), told by their shapes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import linear
from typing_extensions import Self

from .. import algebra
from ..errors import ShapeError
from .base import Transform, Turn, alpha_of, named, require_matrices, require_shape
from .lora import LowRank


@dataclass(frozen=True, eq=False)
class GLoRA(Transform):
    ALGEBRA = "GLoRA"
    REQUIRED = frozenset({"glora_a1", "glora_a2", "glora_b1", "glora_b2"})
    OPTIONAL = frozenset({"glora_bm", "alpha"})

    a1: Tensor  # (in, rank, 1…)
    a2: Tensor  # (rank, in, 1…)
    b1: Tensor  # (out, rank, 1…)
    b2: Tensor  # (rank, in, kernel…); (rank, in, 1…) with a bm
    bm: Tensor | None = None  # (rank, rank, kernel…)
    alpha: float | None = None

    @classmethod
    def build(cls, factors: Mapping[str, Tensor]) -> Self:
        require_matrices(factors)
        a1, a2, b1, b2 = (factors[f"glora_{name}"] for name in ("a1", "a2", "b1", "b2"))
        bm = factors.get("glora_bm")
        shapes = {name: tuple(factor.shape) for name, factor in factors.items()}
        turned = a1.shape[0] == a2.shape[1] == b1.shape[0] == b2.shape[1]
        if turned and (not _share_rank(a1, a2, b1, b2) or a1.shape[0] < a1.shape[1]):
            a1, a2, b1, b2 = a2, a1, b2, b1
        if not _share_rank(a1, a2, b1, b2):
            raise ShapeError(f"its factors do not share one rank: {shapes}")
        made = cls(a1, a2, b1, b2, bm, alpha_of(factors))
        fits = a1.shape[0] == a2.shape[1] == b2.shape[1]
        if not fits or any(math.prod(each.shape[2:]) != 1 for each in (a1, a2, b1)):
            raise ShapeError(f"its factors do not fit each other: {shapes}")
        if bm is not None and (bm.shape[:2] != (made.rank,) * 2 or math.prod(b2.shape[2:]) != 1):
            raise ShapeError(f"bm is no core for b1 and b2: {shapes}")
        return made

    @property
    def rank(self) -> int:
        return self.a2.shape[0]

    def require_fit(self, shape: tuple[int, ...]) -> None:
        core = self.b2 if self.bm is None else self.bm
        require_shape((self.b1.shape[0], self.b2.shape[1], *core.shape[2:]), shape)

    def changed(self, weight: Tensor) -> Tensor:
        a1, a2, b1, b2 = (factor.to(weight.dtype).flatten(1) for factor in (self.a1, self.a2, self.b1, self.b2))
        below = self.b2.to(weight.dtype) if self.bm is None else algebra.folded(self.bm.to(weight.dtype), b2)
        mixed = torch.einsum("or...,ri->oi...", torch.einsum("oi...,ir->or...", weight, a1), a2)
        mixed += algebra.product(b1, below).reshape(weight.shape)
        return torch.add(weight, mixed, alpha=self.scale)

    def turn(self, shape: tuple[int, ...]) -> Turn:
        mix = self.a2.flatten(1).float(), self.scale * self.a1.flatten(1).float()
        return Turn(True, _mixed, mix, beside=LowRank(self.b1, self.b2, self.alpha, self.bm))

    def factors(self, shape: tuple[int, ...]) -> Mapping[str, Tensor]:
        return {f"glora_{name}": factor for name, factor in named(self, "a1", "a2", "b1", "b2", "bm").items()}

    def packed(self) -> tuple[Tensor | float | None, ...]:
        return self.a1, self.a2, self.b1, self.b2, self.bm, self.alpha

    @property
    def idle(self) -> bool:
        below = self.b2.any() and (self.bm is None or self.bm.any())
        return not ((self.a1.any() and self.a2.any()) or (self.b1.any() and below))

    @property
    def swapped(self) -> Self:
        return self._swapped

    @cached_property
    def _swapped(self) -> Self:
        return replace(self, b1=algebra.swap_halves(self.b1))

    def narrowed(self, start: int, length: int) -> Self:
        return self._narrowed.setdefault((start, length), replace(self, b1=self.b1.narrow(0, start, length)))

    @cached_property
    def _narrowed(self) -> dict[tuple[int, int], Self]:
        return {}


def _mixed(inputs: Tensor, a2: Tensor, a1: Tensor) -> Tensor:
    return linear(linear(inputs, a2), a1)


def _share_rank(a1: Tensor, a2: Tensor, b1: Tensor, b2: Tensor) -> bool:
    return a1.shape[1] == a2.shape[0] == b1.shape[1] == b2.shape[0]
