"""LoKr: ΔW = scale · w1 ⊗ w2, a Kronecker product whose factors are whole, low-rank products or Tucker products.

Yeh et al. 2023 (LyCORIS, https://arxiv.org/abs/2309.14859), as LyCORIS' forward has it. Where both factors are whole
there is no rank, and the scale is 1 whatever alpha says: LyCORIS, diffusers and ComfyUI agree, PEFT divides by its
configuration's rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from .. import algebra
from ..errors import AdapterError, ShapeError
from .base import Additive, Product, alpha_of, named, require_matrices, require_shape

Rows = tuple[tuple[int, int], ...]  # (start, length) of some rows, in order


@dataclass(frozen=True, eq=False)
class LoKr(Additive):
    ALGEBRA = "LoKr"
    REQUIRED = frozenset()  # each factor is w or w_a and w_b
    OPTIONAL = frozenset(f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "t1", "w2", "w2_a", "w2_b", "t2")) | {
        "alpha"
    }

    lokr_w1: Tensor | None = None  # (outer out, outer in)
    lokr_w1_a: Tensor | None = None  # (outer out, rank); (rank, outer out) with a core
    lokr_w1_b: Tensor | None = None  # (rank, outer in)
    lokr_t1: Tensor | None = None  # (rank, rank, 1…)
    lokr_w2: Tensor | None = None  # (inner out, inner in, kernel…)
    lokr_w2_a: Tensor | None = None  # (inner out, rank); (rank, inner out) with a core
    lokr_w2_b: Tensor | None = None  # (rank, inner in·kernel…); (rank, inner in) with a core
    lokr_t2: Tensor | None = None  # (rank, rank, kernel…)
    alpha: float | None = None
    kept: Rows | None = None  # rows of the product that are the update's; None: all

    @classmethod
    def build(cls, factors: Mapping[str, Tensor]) -> Self:
        require_matrices(factors)
        made = cls(**{**factors, "alpha": alpha_of(factors)})  # pyright: ignore[reportArgumentType]
        made._left.require("lokr_w1", "lokr_t1")
        made._right.require("lokr_w2", "lokr_t2")
        if math.prod(made._left.shape[2:]) != 1:
            raise ShapeError(f"its first factor is {made._left.shape}: a kernel belongs in the second")
        if made._left.rank and made._right.rank and made._left.rank != made._right.rank:
            raise ShapeError(f"its factors are of the ranks {made._left.rank} and {made._right.rank}, not of one")
        return made

    @property
    def _left(self) -> _Factor:
        return _Factor(self.lokr_w1, self.lokr_w1_a, self.lokr_w1_b, self.lokr_t1)

    @property
    def _right(self) -> _Factor:
        return _Factor(self.lokr_w2, self.lokr_w2_a, self.lokr_w2_b, self.lokr_t2)

    @property
    def rank(self) -> int:
        """That of the factored ones; of two whole ones how many directions their product has at most."""
        (a, c, *_), (b, *inner) = self._left.shape, self._right.shape
        return self._left.rank or self._right.rank or min(a, c) * min(b, math.prod(inner))

    @property
    def scale(self) -> float:
        return super().scale if self._left.rank or self._right.rank else 1.0

    @property
    def _rows(self) -> Rows:
        return self.kept or ((0, self._left.shape[0] * self._right.shape[0]),)

    def require_fit(self, shape: tuple[int, ...]) -> None:
        outer, (inner, *kernel) = self._left.shape[1], self._right.shape[1:]
        found = (sum(length for _, length in self._rows), outer * inner, *kernel)
        if kernel:
            require_shape(found, shape)
        else:  # the kernel may be in the columns, beside the inputs
            require_shape(found, (shape[0], math.prod(shape[1:])))
            require_shape(found, shape if shape[1:] and shape[1] % outer else found)

    def delta(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return self._matrix(dtype).mul_(self.scale).reshape(shape)

    def _matrix(self, dtype: torch.dtype) -> Tensor:
        """The rows of the product, without the scale: (out, in·kernel…)."""
        left, right = self._left.matrix(dtype), self._right.matrix(dtype)
        whole = (left[:, None, :, None] * right[None, :, None, :]).flatten(2).flatten(0, 1)
        return whole if self.kept is None else torch.cat([whole.narrow(0, *rows) for rows in self.kept])

    def add_(self, rows: Tensor, strength: float) -> None:
        """In one pass over the weight: the product is never built."""
        if self.kept is not None or rows.ndim < 2:
            return super().add_(rows, strength)
        left, right = self._left.matrix(rows.dtype), self._right.matrix(rows.dtype)
        blocks = rows.unflatten(1, (left.shape[1], -1)).unflatten(0, (left.shape[0], -1))
        left = left.reshape(left.shape[0], 1, left.shape[1], *(1 for _ in blocks.shape[3:]))
        right = right.reshape(1, right.shape[0], 1, *blocks.shape[3:])
        blocks.addcmul_(left, right, value=strength * self.scale)
        return None

    def product(self) -> Product | None:
        """The two factors; for some of its rows only there is no such form."""
        if self.kept is not None:
            return None
        left = self._left.matrix(torch.float32) if self.lokr_w1 is None else self.lokr_w1.flatten(1)
        return self._right.product._replace(left=left)

    def factors(self, shape: tuple[int, ...]) -> Mapping[str, Tensor]:
        if self.kept is not None:
            return super().factors(shape)
        return named(self, *sorted(self.OPTIONAL - {"alpha"}))

    def packed(self) -> tuple[Tensor | float | Rows | None, ...]:
        return (*self._left, *self._right, self.alpha, self.kept)

    def energy(self) -> float:
        if self.kept is not None:
            return self.scale**2 * _square(self._matrix(torch.float32))
        return self.scale**2 * self._left.energy() * self._right.energy()

    @property
    def idle(self) -> bool:
        return not all(factor.any() for factor in (*self._left, *self._right) if factor is not None)

    @property
    def swapped(self) -> Self:
        return self._swapped

    @cached_property
    def _swapped(self) -> Self:
        half = sum(length for _, length in self._rows) // 2
        return replace(self, kept=_cut(self._rows, half, half) + _cut(self._rows, 0, half))

    def narrowed(self, start: int, length: int) -> Self:
        if (start, length) not in self._narrowed:
            self._narrowed[start, length] = replace(self, kept=_cut(self._rows, start, length))
        return self._narrowed[start, length]

    @cached_property
    def _narrowed(self) -> dict[tuple[int, int], Self]:
        return {}

    def scaled(self, rows: Tensor) -> Mapping[str, Tensor]:
        """Rows are scaled in the first factor where they are whole blocks of the second, or else in the second."""
        grid = rows.expand(self._rows[0][1]).reshape(self._left.shape[0], -1)
        if self.kept is None and torch.equal(grid, grid[:, :1].expand_as(grid)):
            return self._left.scaled("lokr_w1", grid[:, 0])
        if self.kept is None and torch.equal(grid, grid[:1].expand_as(grid)):
            return self._right.scaled("lokr_w2", grid[0])
        raise AdapterError("is LoKr, which cannot be scaled by these rows", remedy="Set strengths where it is applied.")


class _Factor(NamedTuple):
    """One side of the Kronecker product: whole, or a · b, or a · core · b."""

    whole: Tensor | None
    a: Tensor | None
    b: Tensor | None
    core: Tensor | None

    def require(self, name: str, core: str) -> None:
        """Raises AdapterError unless it is one of the three, ShapeError if its parts do not fit each other."""
        if self.whole is not None:
            if not self.a is self.b is self.core is None:
                raise AdapterError(f"has {name} whole and in parts")
        elif self.a is None or self.b is None:
            missing = f"{name}_a" if self.b is not None else f"{name}_b" if self.a is not None else name
            raise AdapterError(f"lacks its {missing}", remedy="The file is incomplete: get another version.")
        elif self.core is None:
            if self.a.shape[1] != self.b.shape[0] or math.prod(self.a.shape[2:]) != 1:
                raise ShapeError(f"{name}_a {tuple(self.a.shape)} and {name}_b {tuple(self.b.shape)} share no rank")
        elif not self.a.shape[:1] * 2 == self.b.shape[:1] * 2 == self.core.shape[:2] or self.a.ndim + self.b.ndim != 4:
            shapes = ", ".join(str(tuple(each.shape)) for each in (self.a, self.core, self.b))
            raise ShapeError(f"{name}_a, {core} and {name}_b do not share one rank: {shapes}")

    @property
    def rank(self) -> int | None:
        return None if self.b is None else self.b.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in, kernel…), or (out, in·kernel…)."""
        if self.whole is not None:
            return tuple(self.whole.shape)
        a, b = self._parts
        return (a.shape[0], *b.shape[1:]) if self.core is None else (a.shape[1], b.shape[1], *self.core.shape[2:])

    @property
    def _parts(self) -> tuple[Tensor, Tensor]:
        assert self.a is not None and self.b is not None  # what build has made sure of
        return self.a, self.b

    @property
    def product(self) -> Product:
        if self.whole is not None:
            return Product(self.whole.flatten(1))
        a, b = self._parts
        if self.core is None:
            return Product(b.flatten(1), a.flatten(1))
        wide = torch.promote_types(self.core.dtype, torch.float32)
        return Product(algebra.folded(self.core.to(wide), b.to(wide)).flatten(1), a.T)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """(out, in·kernel…) in dtype."""
        if self.core is not None:
            a, b = self._parts
            return algebra.product(a.T.to(dtype), algebra.folded(self.core.to(dtype), b.to(dtype)))
        down, up, _ = self.product
        return down.to(dtype) if up is None else algebra.product(up.to(dtype), down.to(dtype))

    def energy(self) -> float:
        if self.whole is not None:
            return _square(self.whole)
        a, b = self._parts
        return algebra.energy(a if self.core is None else a.T, b, self.core)

    def scaled(self, name: str, rows: Tensor) -> Mapping[str, Tensor]:
        if self.whole is not None:
            return {name: algebra.scaled_rows(self.whole, rows)}
        a, _ = self._parts
        if self.core is None:
            return {f"{name}_a": algebra.scaled_rows(a, rows)}
        return {f"{name}_a": algebra.scaled_rows(a.T, rows).T.contiguous()}


def _cut(rows: Rows, start: int, length: int) -> Rows:
    """These rows of those."""
    found: list[tuple[int, int]] = []
    for first, count in rows:
        low, high = max(start, 0), min(start + length, count)
        if low < high:
            found.append((first + low, high - low))
        start -= count
    return tuple(found)


def _square(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix.float(), dtype=torch.float64)) ** 2
