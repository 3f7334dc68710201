"""Timesteps: how much noise the items of a step get, as each family's trainers recommend it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ..errors import TrainingError, shown
from .objectives import Sampling, coefficients

DRAWS = ("uniform", "logit_normal")


@dataclass(frozen=True)
class ByResolution:
    """A shift whose logarithm grows with the number of tokens, on a line through two points."""

    tokens: tuple[int, int]
    mu: tuple[float, float]
    patch: int  # side of a token in the latent

    def of(self, height: int, width: int) -> float:
        (fewest, most), (low, high) = self.tokens, self.mu
        count = (height // self.patch) * (width // self.patch)
        return math.exp(low + (high - low) * (count - fewest) / (most - fewest))


@dataclass(frozen=True)
class Timesteps:
    """A distribution of the moment, 0 (picture) to 1 (noise), and how it is shifted.

    draw: uniform, or logit_normal, the sigmoid of a normal number of mean and deviation. shift: None is the model's
    own, as it samples; a number s takes t to s·t / (1 + (s - 1)·t). Of a model that is trained on a table of noise
    levels the moment is the place in it, which has no shift but the table's own.
    """

    draw: str = "uniform"
    mean: float = 0.0
    deviation: float = 1.0
    shift: float | ByResolution | None = None

    def __post_init__(self) -> None:
        if self.draw not in DRAWS:
            raise TrainingError(f"'{shown(self.draw)}' draws no timesteps.", remedy=f"Choose {' or '.join(DRAWS)}.")

    def moments(self, count: int, generator: Generator) -> Tensor:
        """One from each of so many equal shares of the distribution, in no order: a step sees all noise levels that it
        can. (count,), in (0, 1)."""
        order = torch.randperm(count, generator=generator)
        uniform = (order + torch.rand(count, generator=generator, dtype=torch.float64)) / count
        uniform = uniform.clamp(1e-6, 1 - 1e-6)
        if self.draw == "uniform":
            return uniform
        return torch.sigmoid(self.mean + self.deviation * torch.special.ndtri(uniform))

    def sigmas(self, sampling: Sampling, moments: Tensor, height: int, width: int) -> Tensor:
        """The noise levels of moments for latents of a size. (count,), float32.

        Raises TrainingError for a shift where there is a table.
        """
        table = sampling.sigmas.detach().cpu().float()
        if not coefficients(sampling, table[len(table) // 2][None]).interpolates:
            if self.shift is not None:
                what = "The model is trained on a table of noise levels, which takes no shift."
                raise TrainingError(what, remedy="Leave the shift to the model.")
            return table[(moments * len(table)).long()]
        if self.shift is None:
            return torch.tensor([float(sampling.percent_to_sigma(1 - float(moment))) for moment in moments])
        shift = self.shift.of(height, width) if isinstance(self.shift, ByResolution) else self.shift
        return (shift * moments / (1 + (shift - 1) * moments)).float()


_FLUX = ByResolution((256, 4096), (0.5, 1.15), 2)

# Family -> what its trainers recommend: diffusers' scripts for those with a table, sd-scripts' and musubi-tuner's
# options of these names for the others (flux_shift, flux2_shift, qwen_shift). Others take the model's own shift.
RECOMMENDED: Mapping[str, Timesteps] = {
    "sd15": Timesteps(),
    "sd2": Timesteps(),
    "sdxl": Timesteps(),
    "cascade_c": Timesteps(),
    "cascade_b": Timesteps(),
    "sd3": Timesteps("logit_normal", shift=3.0),
    "sd35_medium": Timesteps("logit_normal", shift=3.0),
    "flux": Timesteps("logit_normal", shift=_FLUX),
    "chroma": Timesteps("logit_normal", shift=_FLUX),
    "flux2": Timesteps("logit_normal", shift=ByResolution((256, 4096), (0.5, 1.15), 1)),
    "flux2_klein": Timesteps("logit_normal", shift=ByResolution((256, 4096), (0.5, 1.15), 1)),
    "qwen_image": Timesteps("logit_normal", shift=ByResolution((256, 8192), (0.5, 0.9), 2)),
    "z_image": Timesteps("logit_normal", shift=2.0),
    "wan": Timesteps("logit_normal", shift=3.0),
    "lumina2": Timesteps("logit_normal"),
    "anima": Timesteps("logit_normal", shift=1.0),
}


def recommended(family: str, sampling: Sampling) -> Timesteps:
    """A family's timesteps; of one that has none here, the model's own."""
    if family in RECOMMENDED:
        return RECOMMENDED[family]
    middle = sampling.sigmas[len(sampling.sigmas) // 2][None]
    return Timesteps("logit_normal" if coefficients(sampling, middle).interpolates else "uniform")
