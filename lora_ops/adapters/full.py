"""Full: ΔW itself, for a weight or bias of any shape; what trainers learn for norms and biases, and LyCORIS's "full".

Its scale is 1, also beside an alpha: LyCORIS, ComfyUI and A1111 agree in that. The bias that PEFT gives to a LoRA
(lora_bias) is one too, at its LoRA's scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import Self

from .. import algebra
from ..errors import AdapterError, ShapeError
from .base import Additive


@dataclass(frozen=True, eq=False)
class Full(Additive):
    ALGEBRA = "full"
    REQUIRED = frozenset({"diff"})
    OPTIONAL = frozenset({"alpha", "scale"})

    diff: Tensor  # as the weight, perhaps without its 1×1 kernel
    of_lora: float = 1.0  # the scale of the LoRA that this is the bias of
    alpha: float | None = None

    @classmethod
    def build(cls, factors: Mapping[str, Tensor]) -> Self:
        diff = factors["diff"]
        if not diff.is_floating_point():
            raise AdapterError(f"diff is {diff.dtype}, not a float type", remedy="Convert the file.")
        if not diff.ndim or 0 in diff.shape:
            raise ShapeError(f"diff has the shape {tuple(diff.shape)}, which no weight has")
        return cls(diff, float(factors.get("scale", 1.0)))

    @property
    def scale(self) -> float:
        return self.of_lora

    @property
    def rank(self) -> int:
        return min(self.diff.shape[0], math.prod(self.diff.shape[1:]))

    def require_fit(self, shape: tuple[int, ...]) -> None:
        found = tuple(self.diff.shape)
        if _without_point(found) != _without_point(shape):
            raise ShapeError(f"is a difference of {found}, the weight has {shape}", found=found, expected=shape)

    def delta(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return (self.scale * self.diff.to(dtype)).reshape(shape)

    def add_(self, rows: Tensor, strength: float) -> None:
        rows.add_(self.diff.to(rows.dtype).reshape(rows.shape), alpha=strength * self.scale)

    def factors(self, shape: tuple[int, ...]) -> Mapping[str, Tensor]:
        """At the scale of its LoRA, which no file of differences says: rounded where that is not exact."""
        return {"diff": algebra.scaled_rows(self.diff, torch.tensor([self.scale], dtype=torch.float64)).reshape(shape)}

    def packed(self) -> tuple[Tensor, float]:
        return self.diff, self.of_lora

    def energy(self) -> float:
        return self.scale**2 * float(self.diff.float().square().sum(dtype=torch.float64))

    @property
    def idle(self) -> bool:
        return not self.diff.any()

    @property
    def swapped(self) -> Self:
        return self._swapped

    @cached_property
    def _swapped(self) -> Self:
        return replace(self, diff=algebra.swap_halves(self.diff))

    def narrowed(self, start: int, length: int) -> Self:
        return self._narrowed.setdefault((start, length), replace(self, diff=self.diff.narrow(0, start, length)))

    @cached_property
    def _narrowed(self) -> dict[tuple[int, int], Self]:
        return {}

    def scaled(self, rows: Tensor) -> Mapping[str, Tensor]:
        diff = algebra.scaled_rows(self.diff, rows)
        if not torch.isfinite(diff.double()).all():
            raise AdapterError("would hold infinities", remedy="Use smaller factors.")
        return {"diff": diff}


def _without_point(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without a 1×1 kernel."""
    return shape[:2] if math.prod(shape[2:]) == 1 else shape
