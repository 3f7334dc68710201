"""What every adapter can do, whatever its algebra."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self


class Adapter(ABC):
    """The change one LoRA makes to one weight: named factors, a scale and a delta.

    Adapters are values: none of their tensors is ever written to.
    """

    ALGEBRA: ClassVar[str]  # its name in receipts
    REQUIRED: ClassVar[frozenset[str]]  # factors without which there is no adapter
    OPTIONAL: ClassVar[frozenset[str]]

    alpha: float | None  # as stored; None where the file says nothing

    @property
    @abstractmethod
    def rank(self) -> int:
        """How many directions the update has at most."""

    @property
    @abstractmethod
    def scale(self) -> float:
        """What the product of the factors is multiplied with before the user's strength."""

    @classmethod
    @abstractmethod
    def build(cls, factors: Mapping[str, Tensor]) -> Self:
        """From factors by name. Raises ShapeError or AdapterError if they do not fit each other."""

    @abstractmethod
    def require_fit(self, shape: tuple[int, ...]) -> None:
        """Raises ShapeError unless the delta fits a weight (or band) of this shape; multiplies nothing."""

    @abstractmethod
    def delta(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """ΔW at strength 1 for a weight (or band) of this shape, computed in dtype."""

    def add_(self, rows: Tensor, strength: float) -> None:
        """Add strength · ΔW to a weight (or band) in place, computed in its dtype."""
        rows += strength * self.delta(tuple(rows.shape), rows.dtype)

    @classmethod
    def join(cls, terms: Sequence[Term], dtype: torch.dtype) -> Sequence[Term]:
        """Terms (adapter, strength) of this algebra on one weight, as fewer with the same sum where that is cheaper."""
        return terms

    @abstractmethod
    def packed(self) -> tuple[Any, ...]:
        """The arguments that make this adapter again: tensors and numbers."""

    @abstractmethod
    def energy(self) -> float:
        """‖ΔW‖² at strength 1 (Frobenius)."""

    @property
    @abstractmethod
    def idle(self) -> bool:
        """True where ΔW is zero: an untrained module, or the zero tail of an interrupted download."""

    @property
    @abstractmethod
    def swapped(self) -> Self:
        """The adapter whose delta has the two halves of its rows exchanged; the same object every time."""


Term = tuple[Adapter, float]  # an adapter and its strength
