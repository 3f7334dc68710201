"""What a layout is, and a module as it is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..alpha import ADAPTER_CONFIG


@dataclass(frozen=True)
class Layout:
    """A kind of file. It writes the names of the dialect that is called like it, a component's first prefix."""

    name: str
    up: str  # suffixes of the factors
    down: str
    alpha: str  # suffix of the alpha tensor; "" where a configuration says alpha
    implementation: str  # whose names these are, in ModelSpec's words
    folder: bool = False  # PEFT's: a file and its configuration, for one network

    @property
    def alpha_in(self) -> str:
        """Where alpha stands, for people."""
        return f"{self.alpha} tensors" if self.alpha else ADAPTER_CONFIG if self.folder else "lora_adapter_metadata"


class Factors(NamedTuple):
    """ΔW = alpha / rank · up · down."""

    up: Tensor  # (out, rank, 1…)
    down: Tensor  # (rank, in, kernel…)
    alpha: float
    folded: bool = False  # parts of different scales: their ratio is in up, in float32

    @property
    def rank(self) -> int:
        return self.down.shape[0]


class Module(NamedTuple):
    network: str  # which network of the family: its prefix in the model's keys
    prefix: str
    name: str
    factors: Factors

    @property
    def full_name(self) -> str:
        return self.prefix + self.name
