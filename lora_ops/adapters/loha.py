"""LoHa: ΔW = scale · (w1_a · w1_b) ∘ (w2_a · w2_b), two low-rank products multiplied entry by entry.

Hyeon-Woo et al. 2021 (FedPara, https://arxiv.org/abs/2108.06098); factors, Tucker form and scale as LyCORIS' forward
has them (its `get_merged_weight` applies the scale twice). PEFT and ComfyUI agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import Self

from .. import algebra
from ..errors import AdapterError, ShapeError
from .base import Additive, Product, alpha_of, named, require_matrices, require_shape

LARGEST = 1 << 28  # entries of ΔW whose energy is worth the time
GRAM = 8  # the largest rank whose Gram matrices are taken
CHUNK = 1 << 21  # entries of ΔW that its energy is taken from at a time


@dataclass(frozen=True, eq=False)
class LoHa(Additive):
    ALGEBRA = "LoHa"
    REQUIRED = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
    OPTIONAL = frozenset({"hada_t1", "hada_t2", "alpha"})

    hada_w1_a: Tensor  # (out, rank); (rank, out) with cores
    hada_w1_b: Tensor  # (rank, in·kernel…); (rank, in) with cores
    hada_w2_a: Tensor
    hada_w2_b: Tensor
    hada_t1: Tensor | None = None  # (rank, rank, kernel…)
    hada_t2: Tensor | None = None
    alpha: float | None = None

    @classmethod
    def build(cls, factors: Mapping[str, Tensor]) -> Self:
        require_matrices(factors)
        made = cls(**{**factors, "alpha": alpha_of(factors)})  # pyright: ignore[reportArgumentType]
        for half, other in (("hada_t1", "hada_t2"), ("hada_t2", "hada_t1")):
            if half in factors and other not in factors:
                raise AdapterError(f"lacks its {other}", remedy="The file is incomplete: get another version.")
        shapes = {name: tuple(factor.shape) for name, factor in factors.items() if name != "alpha"}
        if len({shapes["hada_w1_a"], shapes["hada_w2_a"]}) + len({shapes["hada_w1_b"], shapes["hada_w2_b"]}) != 2:
            raise ShapeError(f"its two halves are of different shapes: {shapes}")
        a, b, core = made.hada_w1_a, made.hada_w1_b, made.hada_t1
        if a.shape[made._inner] != b.shape[0] or math.prod(a.shape[2:]) != 1:
            raise ShapeError(f"w1_a {tuple(a.shape)} and w1_b {tuple(b.shape)} do not share one rank")
        if core is not None and (
            core.shape[:2] != (made.rank,) * 2 or shapes["hada_t1"] != shapes["hada_t2"] or math.prod(b.shape[2:]) != 1
        ):
            raise ShapeError(f"its cores do not fit its other factors: {shapes}")
        return made

    @property
    def rank(self) -> int:
        return self.hada_w1_b.shape[0]

    @property
    def _inner(self) -> int:
        """Which dimension of w1_a and w2_a is the rank's."""
        return 1 if self.hada_t1 is None else 0

    def require_fit(self, shape: tuple[int, ...]) -> None:
        rows, columns = self.hada_w1_a.shape[1 - self._inner], self.hada_w1_b.shape[1]
        if self.hada_t1 is not None:
            require_shape((rows, columns, *self.hada_t1.shape[2:]), shape)
        elif self.hada_w1_b.ndim > 2:
            require_shape((rows, *self.hada_w1_b.shape[1:]), shape)
        else:
            require_shape((rows, columns), (shape[0], math.prod(shape[1:])))

    def delta(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        first, second = self._halves(dtype)
        return first.mul_(second).mul_(self.scale).reshape(shape)

    def add_(self, rows: Tensor, strength: float) -> None:
        first, second = self._halves(rows.dtype)
        rows.addcmul_(first.reshape(rows.shape), second.reshape(rows.shape), value=strength * self.scale)

    def _halves(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The two products as matrices (out, in·kernel…)."""
        return (
            _half(self.hada_w1_a, self.hada_w1_b, self.hada_t1, dtype),
            _half(self.hada_w2_a, self.hada_w2_b, self.hada_t2, dtype),
        )

    def product(self) -> Product | None:
        """The low-rank pair of rank² that is the same (a row-wise and a column-wise Khatri-Rao product), where it is
        less than the whole ΔW."""
        out, inputs = self.hada_w1_a.shape[0], self.hada_w1_b[0].numel()
        if self.hada_t1 is not None or self.rank**2 * (out + inputs) > out * inputs:
            return None
        a1, a2 = self.hada_w1_a.flatten(1).float(), self.hada_w2_a.flatten(1).float()
        b1, b2 = self.hada_w1_b.flatten(1).float(), self.hada_w2_b.flatten(1).float()
        up, down = torch.einsum("oi,oj->oij", a1, a2), torch.einsum("ix,jx->ijx", b1, b2)
        return Product(down.flatten(0, 1), up.flatten(1))

    def factors(self, shape: tuple[int, ...]) -> Mapping[str, Tensor]:
        return named(self, "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")

    def packed(self) -> tuple[Tensor | float | None, ...]:
        halves = (self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b)
        return (*halves, self.hada_t1, self.hada_t2, self.alpha)

    def energy(self) -> float | None:
        """From Gram matrices, of rank² each way, or where those would be larger than what they save from ΔW, some rows
        at a time. None where that would take long: a file of kilobytes can name a ΔW of gigabytes."""
        if self.hada_t1 is None and self.rank <= GRAM:
            outer = _gram(self.hada_w1_a.flatten(1), self.hada_w2_a.flatten(1))
            inner = _gram(self.hada_w1_b.flatten(1).T, self.hada_w2_b.flatten(1).T)
            return self.scale**2 * float((outer * inner).sum(dtype=torch.float64))
        rows, columns = self.hada_w1_a.shape[1 - self._inner], self.hada_w1_b[0].numel()
        if self.hada_t1 is not None:
            columns *= self.hada_t1[0, 0].numel()
            if self.rank * columns > CHUNK:  # a core is folded before the rows are cut
                return None
        if rows * columns > LARGEST:
            return None
        some, found = max(1, CHUNK // columns), 0.0
        for start in range(0, rows, some):
            part = self._of_rows(lambda a, start=start: a[start : start + some])
            first, second = part._halves(torch.float32)
            found += float(torch.linalg.vector_norm(first.mul_(second), dtype=torch.float64)) ** 2
        return self.scale**2 * found

    @property
    def idle(self) -> bool:
        return not all(value.any() for value in self.packed() if isinstance(value, Tensor))

    @property
    def swapped(self) -> Self:
        return self._swapped

    @cached_property
    def _swapped(self) -> Self:
        return self._of_rows(algebra.swap_halves)

    def narrowed(self, start: int, length: int) -> Self:
        if (start, length) not in self._narrowed:
            self._narrowed[start, length] = self._of_rows(lambda rows: rows.narrow(0, start, length))
        return self._narrowed[start, length]

    @cached_property
    def _narrowed(self) -> dict[tuple[int, int], Self]:
        return {}

    def _of_rows(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same with other rows of w1_a and w2_a, whose first dimension they are or, with cores, the second."""
        if self._inner:
            return replace(self, hada_w1_a=change(self.hada_w1_a), hada_w2_a=change(self.hada_w2_a))
        return replace(self, hada_w1_a=change(self.hada_w1_a.T).T, hada_w2_a=change(self.hada_w2_a.T).T)

    def scaled(self, rows: Tensor) -> Mapping[str, Tensor]:
        if self._inner:
            return {"hada_w1_a": algebra.scaled_rows(self.hada_w1_a, rows)}
        return {"hada_w1_a": algebra.scaled_rows(self.hada_w1_a.T, rows).T.contiguous()}


def _gram(first: Tensor, second: Tensor) -> Tensor:
    """PᵀP of the rows that are the products of all entries of one matrix's row with all of the other's."""
    total = torch.zeros((first.shape[1] * second.shape[1],) * 2, device=first.device)
    for one, other in zip(first.split(CHUNK // len(total)), second.split(CHUNK // len(total)), strict=True):
        both = torch.einsum("ri,rj->rij", one.float(), other.float()).flatten(1)
        total += both.T @ both
    return total


def _half(a: Tensor, b: Tensor, core: Tensor | None, dtype: torch.dtype) -> Tensor:
    if core is None:
        return algebra.product(a.to(dtype), b.to(dtype))
    return algebra.product(a.to(dtype).T, algebra.folded(core.to(dtype), b.to(dtype)))
