"""How much of an update is left in a weight of few bits: measured, and foreseen."""

from __future__ import annotations

import pytest
import torch

from lora_ops.survival import Survival, measured, predicted

EIGHT = [torch.float8_e4m3fn, torch.float8_e5m2]


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_chance(values, dtype, seed):
    """Each value at one of its two neighbours in a float8 dtype, with the mean where it was."""
    down = values.to(dtype).float()
    bits = values.to(dtype).view(torch.uint8).int()
    away = (bits + 1).to(torch.uint8).view(dtype).float()  # the next one further from zero
    towards = (bits - 1).to(torch.uint8).view(dtype).float()
    other = torch.where(down.abs() <= values.abs(), away, towards)
    share = (values - down) / (other - down)
    return torch.where(torch.rand(values.shape, generator=torch.Generator().manual_seed(seed)) < share, other, down)


def test_what_is_stored_wholly_survives_wholly_and_what_is_not_stored_not_at_all():
    base, update = randn(8, 8), randn(8, 8, seed=1)
    assert measured(base, base + update, base + update) == pytest.approx(Survival(*[float(update.square().sum())] * 3))
    lost = measured(base, base + update, base)
    assert (lost.cosine, lost.norm, lost.little) == (0, 0, True)
    nothing = measured(base, base, base)
    assert (nothing.cosine, nothing.norm, nothing.little) == (1, 1, False)


def test_the_survival_of_two_weights_is_that_of_both_as_one():
    base, wanted = randn(8, 8), randn(8, 8, seed=1)
    stored = wanted.bfloat16()
    halves = [measured(*(each[rows] for each in (base, wanted, stored))) for rows in (slice(3), slice(3, 8))]
    assert halves[0].and_of(halves[1]) == pytest.approx(measured(base, wanted, stored))


@pytest.mark.parametrize("dtype", EIGHT)
@pytest.mark.parametrize("size", [0.02, 0.1, 1.0])
@pytest.mark.parametrize("range_", [2**-6, 1.0])  # the smaller reaches below the dtype's normal numbers
def test_rounding_by_chance_is_foreseen(dtype, size, range_):
    base = (randn(512, 512) * range_).to(dtype).float()
    wanted = base + size * range_ * randn(512, 512, seed=1)
    found = predicted(base, wanted, dtype)
    truth = measured(base, wanted, by_chance(wanted, dtype, 2))
    assert found.cosine == pytest.approx(truth.cosine, rel=0.03, abs=0.01)
    assert found.norm == pytest.approx(truth.norm, rel=0.03)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wider_floats_are_rounded_to_the_nearest(dtype):
    base = randn(64, 64).to(dtype).float()
    wanted = base + 1e-3 * randn(64, 64, seed=1)
    assert predicted(base, wanted, dtype) == measured(base, wanted, wanted.to(dtype))


@pytest.mark.parametrize("dtype", EIGHT)
def test_a_value_that_the_dtype_has_is_stored_without_noise(dtype):
    base, wanted = torch.ones(4, 4), torch.full((4, 4), 1.5)
    assert predicted(base, wanted, dtype).norm == predicted(base, wanted, dtype).cosine == 1
