"""(IA)³: W' = W ⊙ (1 + w), a factor for each output or each input.

Liu et al. 2022 (https://arxiv.org/abs/2205.05638), as LyCORIS has it: `on_input` says which axis. PEFT stores 1 + w,
and on outputs it multiplies the bias, too. A linear layer's factors are (1, in) or (out, 1); a convolution's are alike
for both axes, and refused.
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
from .base import Transform, Turn, require_floats, times


@dataclass(frozen=True, eq=False)
class IA3(Transform):
    ALGEBRA = "(IA)³"
    REQUIRED = frozenset({"ia3_weight", "ia3_on_input"})
    OPTIONAL = frozenset()

    alpha = None

    weight: Tensor  # (width,)
    on_input: bool

    @classmethod
    def build(cls, factors: Mapping[str, Tensor]) -> Self:
        weight, on_input = factors["ia3_weight"], factors["ia3_on_input"]
        require_floats({"ia3_weight": weight})
        if weight.numel() != max(weight.shape, default=0) or on_input.numel() != 1:
            found = f"{tuple(weight.shape)} and {tuple(on_input.shape)}"
            raise ShapeError(f"weight and on_input have the shapes {found}, they should be a vector and a number")
        return cls(weight.flatten(), bool(on_input))

    @property
    def rank(self) -> int:
        return 1

    def require_fit(self, shape: tuple[int, ...]) -> None:
        if len(shape) < 2 or shape[self.on_input] != len(self.weight):
            axis = "inputs" if self.on_input else "outputs"
            what = f"has factors for {len(self.weight)} {axis}, the weight has {shape}"
            raise ShapeError(what, found=tuple(self.weight.shape), expected=shape)

    def changed(self, weight: Tensor) -> Tensor:
        shape = [len(self.weight) if axis == self.on_input else 1 for axis in range(weight.ndim)]
        return weight * (1 + self.weight.to(weight.dtype)).reshape(shape)

    def turn(self, shape: tuple[int, ...]) -> Turn:
        return Turn(self.on_input, times, (self.weight.float(),))

    def factors(self, shape: tuple[int, ...]) -> Mapping[str, Tensor]:
        weight = self.weight.reshape(1, -1, *(1 for _ in shape[2:])) if len(shape) > 2 else self.weight
        return {"ia3_weight": weight, "ia3_on_input": torch.tensor(self.on_input)}

    def packed(self) -> tuple[Any, ...]:
        return self.weight, self.on_input

    @property
    def idle(self) -> bool:
        return not self.weight.any()

    @property
    def swapped(self) -> Self:
        return self._swapped

    @cached_property
    def _swapped(self) -> Self:
        return self if self.on_input else type(self)(swap_halves(self.weight), False)

    def narrowed(self, start: int, length: int) -> Self:
        if self.on_input:
            return self
        return self._narrowed.setdefault((start, length), type(self)(self.weight.narrow(0, start, length), False))

    @cached_property
    def _narrowed(self) -> dict[tuple[int, int], Self]:
        return {}


class PeftIA3(IA3):
    """On outputs it is of the weight and of the bias."""

    REQUIRED = frozenset({"ia3_l"})

    @classmethod
    def build(cls, factors: Mapping[str, Tensor]) -> Self:
        factor = factors["ia3_l"]
        require_floats({"ia3_l": factor})
        if factor.ndim != 2 or 1 not in factor.shape or 0 in factor.shape:
            what = f"ia3_l has the shape {tuple(factor.shape)}: only that of a linear layer says what it is for"
            raise AdapterError(what, remedy="Merge it into its base with PEFT.")
        return cls(factor.flatten().double() - 1, factor.shape[0] == 1)

    @property
    def with_bias(self) -> bool:
        return not self.on_input

    def require_fit(self, shape: tuple[int, ...]) -> None:
        super().require_fit((*shape, 1) if len(shape) == 1 and self.with_bias else shape)

    def factors(self, shape: tuple[int, ...]) -> Mapping[str, Tensor]:
        return Transform.factors(self, shape) if self.with_bias else super().factors(shape)
