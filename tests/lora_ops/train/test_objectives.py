"""Objectives against diffusers' training formulas, in values and in gradients."""

from __future__ import annotations

import math

import pytest
import torch

from lora_ops.errors import TrainingError
from lora_ops.train.objectives import Objective, coefficients, losses, noise_of, noisy, target, weights
from lora_ops.train.randomness import generator
from lora_ops.train.timesteps import RECOMMENDED, ByResolution, Timesteps
from tests.lora_ops.train import small

diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle here; it is in the test environment")


class Variance:
    """Noise added to the signal, as the host's samplings of SD models have it: the noisy latent is not scaled."""

    def __init__(self, kind: str, zero_terminal: bool = False) -> None:
        options = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        self.scheduler = diffusers.DDPMScheduler(
            **options,
            prediction_type="v_prediction" if kind == "v" else "epsilon",
            rescale_betas_zero_snr=zero_terminal,
        )
        cumulative = self.scheduler.alphas_cumprod.double().clamp(min=4.8973451890853435e-08)
        self.sigmas = ((1 - cumulative) / cumulative).sqrt()
        self.kind = kind

    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        return noise * sigma.reshape(-1, 1, 1, 1) + latent_image

    def calculate_denoised(self, sigma, model_output, model_input):
        sigma = sigma.reshape(-1, 1, 1, 1)
        if self.kind == "eps":
            return model_input - model_output * sigma
        return model_input / (sigma**2 + 1) - model_output * sigma / (sigma**2 + 1) ** 0.5

    def percent_to_sigma(self, percent):
        raise AssertionError("a table has no percent")


class Flow(small.Flow):
    def percent_to_sigma(self, percent):
        moment = 1 - percent
        return 3 * moment / (1 + 2 * moment)


STEPS = torch.tensor([0, 20, 400, 999])


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def model(x):
    """A model with one parameter, so that gradients can be compared."""
    return torch.tanh(x * model.weight)


model.weight = torch.tensor(0.7, requires_grad=True)


def gradient(loss):
    (found,) = torch.autograd.grad(loss, model.weight)
    return found


@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_loss_and_gradient_are_diffusers(kind, gamma):
    sampling = Variance(kind)
    latent, noise = rand(4, 4, 8, 8), rand(4, 4, 8, 8, seed=1)
    sigma = sampling.sigmas[STEPS].float()
    found = coefficients(sampling, sampling.sigmas[STEPS])
    x = noisy(sampling, sigma, noise, latent)
    scale = 1 / (sigma**2 + 1).sqrt().reshape(-1, 1, 1, 1)  # as the host scales what the model sees
    theirs = sampling.scheduler.add_noise(latent, noise, STEPS)
    torch.testing.assert_close(x * scale, theirs, rtol=1e-5, atol=1e-5)
    wanted = noise if kind == "eps" else sampling.scheduler.get_velocity(latent, noise, STEPS)
    torch.testing.assert_close(target(found, noise, latent), wanted, rtol=1e-5, atol=1e-5)
    objective = Objective("constant") if gamma is None else Objective("min_snr", gamma)
    ours = losses(objective, found, model(x * scale), target(found, noise, latent)).mean()
    each = ((model(theirs) - wanted) ** 2).mean((1, 2, 3))
    if gamma is not None:  # train_text_to_image.py
        snr = diffusers.training_utils.compute_snr(sampling.scheduler, STEPS)
        each = each * snr.clamp(max=gamma) / (snr if kind == "eps" else snr + 1)
    torch.testing.assert_close(ours, each.mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient(ours), gradient(each.mean()), rtol=1e-5, atol=0)


def test_a_zero_terminal_snr_makes_v_the_negative_picture():
    sampling = Variance("v", zero_terminal=True)
    latent, noise = rand(1, 4, 8, 8), rand(1, 4, 8, 8, seed=1)
    found = coefficients(sampling, sampling.sigmas[-1:])
    torch.testing.assert_close(target(found, noise, latent), -latent, rtol=0, atol=1e-3)
    assert weights(Objective("min_snr"), found).item() < 1e-6


def test_a_flow_model_should_answer_the_velocity():
    """diffusers' flow scripts: noise - latent, at (1 - sigma) · latent + sigma · noise."""
    latent, noise, sigma = rand(3, 4, 8, 8), rand(3, 4, 8, 8, seed=1), torch.tensor([0.001, 0.5, 1.0])
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    found = coefficients(Flow(), sigma)
    theirs = scheduler.scale_noise(latent, scheduler.timesteps[[-1, 500, 0]], noise)
    sigma_of_theirs = torch.tensor([0.001, 0.5, 1.0])
    torch.testing.assert_close(noisy(Flow(), sigma_of_theirs, noise, latent), theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(target(found, noise, latent), noise - latent, rtol=1e-5, atol=1e-5)
    x = noisy(Flow(), sigma, noise, latent)
    ours = losses(Objective(), found, model(x), target(found, noise, latent)).mean()
    torch.testing.assert_close(
        gradient(ours), gradient(((model(theirs) - (noise - latent)) ** 2).mean()), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("weighting", ["min_snr", "debiased"])
def test_weights_by_snr_are_refused_for_flow(weighting):
    with pytest.raises(TrainingError, match="flow"):
        weights(Objective(weighting), coefficients(Flow(), torch.tensor([0.5])))


def test_debiased_weights_are_those_of_sd_scripts():
    """1 / sqrt(SNR) where noise is predicted, 1 / (SNR + 1) for v, the SNR 1000 at most."""
    snr = 1 / Variance("eps").sigmas[STEPS] ** 2
    snr = snr.clamp(max=1000)
    for kind, expected in (("eps", 1 / snr.sqrt()), ("v", 1 / (snr + 1))):
        sampling = Variance(kind)
        found = weights(Objective("debiased"), coefficients(sampling, sampling.sigmas[STEPS]))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("schedule", ["constant", "snr"])
def test_huber_is_a_square_near_zero_and_straight_far_away(schedule):
    found = coefficients(Variance("eps"), Variance("eps").sigmas[[400]])
    objective = Objective(loss="huber", huber_c=0.1, huber_schedule=schedule)
    sigma = float(found.noise)
    c = 0.1 if schedule == "constant" else 0.9 / (1 + sigma) ** 2 + 0.1
    for error in (1e-3, 50.0):
        loss = losses(objective, found, torch.full((1, 1, 1, 1), error), torch.zeros(1, 1, 1, 1)).item()
        expected = error**2 if error < c else 2 * c * (math.sqrt(error**2 + c**2) - c)
        assert loss == pytest.approx(expected, rel=1e-2)
    one = losses(Objective(loss="l1"), found, torch.full((1, 1, 2, 2), -3.0), torch.zeros(1, 1, 2, 2))
    assert one.item() == 3


def test_what_the_mask_leaves_out_costs_nothing():
    found = coefficients(Flow(), torch.tensor([0.5]))
    answer, wanted = torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)
    answer[..., 0, 0], answer[..., 1, 1] = 2.0, 100.0
    mask = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    assert losses(Objective(), found, answer, wanted, mask).item() == 4


def test_noise_offset_moves_each_channel_by_a_number_of_its_own():
    latent = torch.zeros(2, 4, 64, 64)
    plain = noise_of(Objective(), latent, generator(0))
    moved = noise_of(Objective(noise_offset=0.5), latent, generator(0)) - plain
    assert torch.allclose(moved, moved[..., :1, :1].expand_as(moved), atol=1e-6)
    assert len(set(moved[..., 0, 0].flatten().tolist())) == 8


def test_moments_come_from_every_share_of_the_distribution():
    for count in (1, 4, 16):
        moments = Timesteps().moments(count, generator(count))
        assert sorted((moments * count).long().tolist()) == list(range(count))
    middle = Timesteps("logit_normal").moments(10_000, generator(1))
    logits = torch.logit(middle)
    assert abs(logits.mean()) < 1e-2 and abs(logits.std() - 1) < 1e-2
    assert torch.equal(Timesteps().moments(8, generator(3)), Timesteps().moments(8, generator(3)))


def test_a_table_gives_whole_timesteps_and_a_flow_its_shift():
    sampling = Variance("eps")
    moments = torch.tensor([0.0, 0.4, 0.9999])
    assert torch.equal(Timesteps().sigmas(sampling, moments, 8, 8), sampling.sigmas[[0, 400, 999]].float())
    half = torch.tensor([0.5])
    assert Timesteps().sigmas(Flow(), half, 8, 8).item() == pytest.approx(0.75)  # the model's own shift of 3
    assert Timesteps(shift=1.0).sigmas(Flow(), half, 8, 8).item() == 0.5
    by_resolution = RECOMMENDED["flux"]
    assert isinstance(by_resolution.shift, ByResolution)
    assert by_resolution.sigmas(Flow(), half, 128, 128).item() == pytest.approx(1 / (1 + math.exp(-1.15)))
    with pytest.raises(TrainingError, match="table"):
        Timesteps(shift=3.0).sigmas(sampling, half, 8, 8)
