"""Objectives: what a model should answer to a noisy latent, and what its error costs.

The model's own sampling says how it takes noise in and how its answer becomes a picture; what it should have answered
follows from these two alone. So epsilon, v, flow velocity, EDM and Stable Cascade are one computation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import TrainingError, shown


class Sampling(Protocol):
    """What ComfyUI's model_sampling objects have."""

    sigmas: Tensor

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent_image: Tensor, max_denoise: bool = False) -> Tensor:
        """The noisy latent, which the model is given."""
        ...

    def calculate_denoised(self, sigma: Tensor, model_output: Tensor, model_input: Tensor) -> Tensor:
        """The latent that an answer to a noisy latent means."""
        ...

    def percent_to_sigma(self, percent: float) -> float: ...


WEIGHTINGS = ("constant", "min_snr", "debiased")
LOSSES = ("mse", "huber", "l1")
HUBER_SCHEDULES = ("constant", "snr")
_SNR_LIMIT = 1000.0  # debiased's, as in sd-scripts


@dataclass(frozen=True)
class Objective:
    """What an error costs.

    weighting: constant; min_snr (Hang et al. 2023, https://arxiv.org/abs/2303.09556, at gamma) and debiased (Yu et al.
    2023, https://arxiv.org/abs/2310.08442) for models that predict noise or v. loss: mse, l1, or sd-scripts' huber,
    whose bend huber_c grows towards 1 where noise is low if it is scheduled by snr. noise_offset adds to each channel's
    noise a constant of its own (https://www.crosslabs.org/blog/diffusion-with-offset-noise).
    """

    weighting: str = "constant"
    gamma: float = 5.0
    loss: str = "mse"
    huber_c: float = 0.1
    huber_schedule: str = "snr"
    noise_offset: float = 0.0

    def __post_init__(self) -> None:
        for value, known in (
            (self.weighting, WEIGHTINGS),
            (self.loss, LOSSES),
            (self.huber_schedule, HUBER_SCHEDULES),
        ):
            if value not in known:
                raise TrainingError(f"'{shown(value)}' is no objective.", remedy=f"Choose one of {', '.join(known)}.")


class Coefficients(NamedTuple):
    """The noisy latent is noise · n + signal · x; the picture is keep · noisy + gain · answer. Each (batch,), float64.

    Its answer should be to_signal · x + to_noise · n.
    """

    noise: Tensor
    signal: Tensor
    keep: Tensor
    gain: Tensor

    @property
    def to_signal(self) -> Tensor:
        return (1 - self.keep * self.signal) / self.gain

    @property
    def to_noise(self) -> Tensor:
        return -self.keep * self.noise / self.gain

    @property
    def snr(self) -> Tensor:
        return (self.signal / self.noise) ** 2

    @property
    def interpolates(self) -> bool:
        """Whether noise takes the place of the signal (flow), instead of being added to it."""
        return not bool((self.signal == 1).all())

    @property
    def predicts_noise(self) -> bool:
        return not bool(self.to_signal.any())


def coefficients(sampling: Sampling, sigma: Tensor) -> Coefficients:
    """Read off the sampling's own functions. Raises TrainingError for a model that does not denoise."""
    wide = sigma.detach().cpu().double()
    zero, one = torch.zeros(len(wide), 1, 1, 1, dtype=torch.float64), torch.ones(len(wide), 1, 1, 1).double()
    found = Coefficients(
        *(
            value.reshape(-1)
            for value in (
                sampling.noise_scaling(wide, one, zero),
                sampling.noise_scaling(wide, zero, one),
                sampling.calculate_denoised(wide, zero, one),
                sampling.calculate_denoised(wide, one, zero),
            )
        )
    )
    if not (found.noise.any() and found.gain.all()):
        raise TrainingError("The model takes in no noise: it is no diffusion or flow model that this version trains.")
    return found


def noisy(sampling: Sampling, sigma: Tensor, noise: Tensor, latent: Tensor) -> Tensor:
    return sampling.noise_scaling(sigma, noise, latent)


def target(found: Coefficients, noise: Tensor, latent: Tensor) -> Tensor:
    """What the model should answer."""
    shape = (-1, *(1 for _ in latent.shape[1:]))
    signal, noisy = (each.to(latent.device, latent.dtype).reshape(shape) for each in (found.to_signal, found.to_noise))
    return signal * latent + noisy * noise


def noise_of(objective: Objective, latent: Tensor, generator: torch.Generator) -> Tensor:
    """Noise for latents, drawn on the generator's device."""
    draw = {"generator": generator, "device": generator.device}
    noise = torch.randn(latent.shape, **draw)
    if objective.noise_offset:
        noise += objective.noise_offset * torch.randn((*latent.shape[:2], *(1 for _ in latent.shape[2:])), **draw)
    return noise.to(latent)


def losses(
    objective: Objective, found: Coefficients, answer: Tensor, wanted: Tensor, mask: Tensor | None = None
) -> Tensor:
    """The loss of each item (batch,), in float32. mask (batch, 1, height, width) weighs places, 0 to leave them out.

    Raises TrainingError for a weighting that means nothing for the model.
    """
    error = answer.float() - wanted.float()
    shape = (-1, *(1 for _ in error.shape[1:]))
    if objective.loss == "mse":
        each = error**2
    elif objective.loss == "l1":
        each = error.abs()
    else:
        bend = _bend(objective, found).to(error).reshape(shape)
        each = 2 * bend * (torch.sqrt(error**2 + bend**2) - bend)
    if mask is None:
        cost = each.flatten(1).mean(1)
    else:
        weight = mask.to(each).expand_as(each).flatten(1)
        cost = (each.flatten(1) * weight).sum(1) / weight.sum(1)
    return cost * weights(objective, found).to(cost)


def weights(objective: Objective, found: Coefficients) -> Tensor:
    """What each item's loss is multiplied with (batch,), float64.

    A weight w of the loss in the picture is w · gain² of the loss in the answer: min-SNR's min(SNR, γ) becomes
    min(SNR, γ) / SNR where noise is predicted and min(SNR, γ) / (SNR + 1) for v, as diffusers has it.
    """
    if objective.weighting == "constant":
        return torch.ones_like(found.gain)
    if found.interpolates:
        what = f"The weighting {objective.weighting} is for models that predict noise or v; this one is a flow model."
        raise TrainingError(what, remedy="Choose the weighting constant.")
    if objective.weighting == "min_snr":
        return found.snr.clamp(max=objective.gamma) * found.gain**2
    snr = found.snr.clamp(max=_SNR_LIMIT)
    return 1 / snr.sqrt() if found.predicts_noise else 1 / (snr + 1)


def _bend(objective: Objective, found: Coefficients) -> Tensor:
    c = torch.full_like(found.noise, objective.huber_c)
    return c if objective.huber_schedule == "constant" else (1 - c) / (1 + found.noise / found.signal) ** 2 + c
