"""What a layout is, and a module as it is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..alpha import ADAPTER_CONFIG

RANKED = ("down", "hada_w1_b", "lokr_w1", "lokr_w1_b", "glora_a2")  # of factors that an alpha scales
_MAGNITUDE = ".lora_magnitude_vector"
# LyCORIS' words, which kohya's scripts and ComfyUI know
_WORDS = {
    "mid": ".lora_mid.weight",
    **{name: f".{name}" for name in ("dora_scale", "oft_blocks", "rescale", "diff")},
    **{f"hada_{name}": f".hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{name}": f".lokr_{name}" for name in ("w1", "w1_a", "w1_b", "t1", "w2", "w2_a", "w2_b", "t2")},
    **{f"glora_{name}": f".{name}.weight" for name in ("a1", "a2", "b1", "b2", "bm")},
    "oft_R": ".oft_R.weight",
    "oft_scaled": ".oft_R.scaled_oft",
    "ia3_weight": ".weight",
    "ia3_on_input": ".on_input",
}


@dataclass(frozen=True)
class Layout:
    """A kind of file. It writes the names of the dialect that is called like it, a component's first prefix."""

    name: str
    up: str  # suffixes of the factors
    down: str
    alpha: str  # suffix of the alpha tensor; "" where a configuration says alpha
    implementation: str  # whose names these are, in ModelSpec's words
    folder: bool = False  # PEFT's: a file and its configuration, for one network
    alpha_needed: bool = False  # its readers fail without an alpha wherever there is a rank

    @property
    def words(self) -> Mapping[str, str]:
        """Factor -> suffix, of all factors that it has words for."""
        halves = {"up": self.up, "down": self.down}
        return {**_WORDS, **halves, "alpha": self.alpha} if self.alpha else {**halves, "magnitude": _MAGNITUDE}

    @property
    def alpha_in(self) -> str:
        """Where alpha stands, for people."""
        return f"{self.alpha} tensors" if self.alpha else ADAPTER_CONFIG if self.folder else "lora_adapter_metadata"


class Factors(NamedTuple):
    """What makes a change: LoRA's ΔW = alpha / rank · up · down, another algebra's as its adapter builds it."""

    tensors: Mapping[str, Tensor]  # by factor: up (out, rank, 1…), down (rank, in, kernel…)
    rank: int
    alpha: float | None  # None where none is written
    folded: bool = False  # a scale is in a factor, in float32: parts of different scales, the bias of a LoRA

    @property
    def up(self) -> Tensor:
        return self.tensors["up"]

    @property
    def down(self) -> Tensor:
        return self.tensors["down"]


class Module(NamedTuple):
    network: str  # which network of the family: its prefix in the model's keys
    prefix: str
    name: str
    factors: Factors

    @property
    def full_name(self) -> str:
        return self.prefix + self.name
