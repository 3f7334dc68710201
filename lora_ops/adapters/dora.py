"""DoRA: W' = m · (W + ΔW) / ‖W + ΔW‖, a magnitude around the ΔW of any additive algebra.

Liu et al. 2024 (https://arxiv.org/abs/2402.09353). The norm is of each output's row, as in PEFT and LyCORIS, or of each
input's column, as OneTrainer and old LyCORIS write it; kernels belong to both. W is the weight with all that came
before in the stack. At strength 1 this is PEFT's and LyCORIS' result; between 0 and 1 those two and ComfyUI differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from ..algebra import swap_halves
from ..errors import AdapterError, ShapeError
from .base import Additive, Transform, Turn, require_floats, times


@dataclass(frozen=True, eq=False)
class DoRA(Transform):
    ALGEBRA = "DoRA"
    FACTORS = frozenset({"dora_scale", "magnitude"})  # LyCORIS'; PEFT's, which is always of the outputs

    inner: Additive
    magnitude: Tensor  # (width,)
    of_inputs: bool = False

    @classmethod
    def around(cls, inner: Additive, name: str, factor: Tensor) -> Self:
        """A factor of FACTORS around an adapter. Raises ShapeError or AdapterError if it is no magnitude."""
        require_floats({name: factor})
        if factor.numel() != max(factor.shape, default=0):
            raise ShapeError(f"{name} has the shape {tuple(factor.shape)}, which is no vector")
        of_inputs = name == "dora_scale" and factor.ndim > 1 and factor.shape[0] == 1
        return cls(inner, factor.flatten(), of_inputs)

    @property
    def alpha(self) -> float | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.alpha

    @property
    def rank(self) -> int:
        return self.inner.rank

    @property
    def scale(self) -> float:
        return self.inner.scale

    def require_fit(self, shape: tuple[int, ...]) -> None:
        self.inner.require_fit(shape)
        if len(shape) <= self.of_inputs or len(self.magnitude) != shape[self.of_inputs]:
            axis = "inputs" if self.of_inputs else "outputs"
            what = f"has a magnitude for {len(self.magnitude)} {axis}, the weight has {shape}"
            raise ShapeError(what, found=tuple(self.magnitude.shape), expected=shape)

    def changed(self, weight: Tensor) -> Tensor:
        """A row of zeros has no direction to be scaled in: it stays zero."""
        total = weight.clone()
        self.inner.add_(total, 1.0)
        return total.mul_(self._stretch(total))

    def _stretch(self, total: Tensor) -> Tensor:
        """What brings each slice to its magnitude."""
        others = [axis for axis in range(total.ndim) if axis != self.of_inputs]
        norm = torch.linalg.vector_norm(total, dim=others, keepdim=True)
        return (self.magnitude.to(total.dtype).reshape(norm.shape) / norm).where(norm > 0, 0)

    def turn(self, shape: tuple[int, ...]) -> Turn:
        def of_weight(weight: Tensor) -> Tensor:
            total = weight.clone()
            self.inner.add_(total, 1.0)
            return self._stretch(total).flatten() - 1

        return Turn(self.of_inputs, times, of_weight=of_weight, inside=self.inner)

    def factors(self, shape: tuple[int, ...]) -> Mapping[str, Tensor]:
        """One output alone has its magnitude as a vector: (1, 1) would be that of an input."""
        ones = (1,) * len(shape[2:])
        magnitude = self.magnitude if shape[0] == 1 else self.magnitude.reshape(-1, 1, *ones)
        magnitude = self.magnitude.reshape(1, -1, *ones) if self.of_inputs else magnitude
        return {**self.inner.factors(shape), "dora_scale": magnitude}

    def packed(self) -> tuple[Any, ...]:
        return type(self.inner), self.inner.packed(), self.magnitude, self.of_inputs

    @classmethod
    def unpacked(cls, packed: tuple[Any, ...]) -> Self:
        algebra, fields, magnitude, of_inputs = packed
        return cls(algebra.unpacked(fields), magnitude, of_inputs)

    @property
    def idle(self) -> bool:
        return self.inner.idle and not self.magnitude.any()

    @property
    def swapped(self) -> Self:
        return self._swapped

    @cached_property
    def _swapped(self) -> Self:
        magnitude = self.magnitude if self.of_inputs else swap_halves(self.magnitude)
        return type(self)(self.inner.swapped, magnitude, self.of_inputs)

    def narrowed(self, start: int, length: int) -> Self:
        if self.of_inputs:
            what = "is DoRA with a magnitude per input, which cannot be cut: its norms are of all rows"
            raise AdapterError(what, remedy="Select whole weights.")
        inner = self.inner.narrowed(start, length)
        found = type(self)(inner, self.magnitude.narrow(0, start, length))
        return self._narrowed.setdefault((start, length), found)

    @cached_property
    def _narrowed(self) -> dict[tuple[int, int], Self]:
        return {}
