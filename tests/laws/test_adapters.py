"""What holds for every adapter of every algebra. A new algebra adds its branches to CASES."""

from __future__ import annotations

import pytest
import torch

from lora_ops.adapters import ALGEBRAS, LowRank, build, fused
from lora_ops.errors import AdapterError, ShapeError


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def lora(*, seed: int = 0, alpha: float | None = None, dtype: torch.dtype = torch.float32) -> LowRank:
    return LowRank(rand(12, 3, seed=seed, dtype=dtype), rand(3, 8, seed=seed + 1, dtype=dtype), alpha)


# name of the branch -> (adapter, shape of its weight, ΔW in float64 written out by hand)
def cases():
    linear = lora()
    yield "LoRA linear", linear, (12, 8), linear.up.double() @ linear.down.double()
    scaled = lora(alpha=1.5)
    yield "LoRA alpha", scaled, (12, 8), 0.5 * scaled.up.double() @ scaled.down.double()
    zero = lora(alpha=0.0)
    yield "LoRA alpha 0 means rank", zero, (12, 8), zero.up.double() @ zero.down.double()
    half = lora(alpha=6.0, dtype=torch.bfloat16)
    yield "LoRA bf16", half, (12, 8), 2 * half.up.double() @ half.down.double()
    conv = LowRank(rand(12, 3, 1, 1), rand(3, 8, 3, 3, seed=1), 3.0)
    kernel = torch.einsum("or,rikl->oikl", conv.up.double()[:, :, 0, 0], conv.down.double())
    yield "LoRA conv", conv, (12, 8, 3, 3), kernel
    point = LowRank(rand(12, 3), rand(3, 8, seed=1), None)
    yield "LoRA matrix on a 1x1 conv", point, (12, 8, 1, 1), (point.up.double() @ point.down.double())[..., None, None]
    flat = LowRank(rand(12, 3, 1, 1), rand(3, 8, 1, 1, seed=1), None)
    yield "LoRA 1x1 conv on a linear", flat, (12, 8), flat.up.flatten(1).double() @ flat.down.flatten(1).double()
    video = LowRank(rand(12, 3, 1, 1, 1), rand(3, 8, 1, 3, 3, seed=1), None)
    clip = torch.einsum("or,ritkl->oitkl", video.up.double()[:, :, 0, 0, 0], video.down.double())
    yield "LoRA conv3d", video, (12, 8, 1, 3, 3), clip


CASES = {name: case for name, *case in cases()}
each_branch = pytest.mark.parametrize("name", CASES)
# float32 sums of a few products: some units in the last place (6e-8) of the largest term
NEAR = {"rtol": 1e-5, "atol": 1e-5}


def test_every_algebra_is_held_to_the_laws():
    assert {type(adapter) for adapter, _, _ in CASES.values()} == set(ALGEBRAS)


@each_branch
def test_delta_is_the_formula(name):
    adapter, shape, exact = CASES[name]
    torch.testing.assert_close(adapter.delta(shape).double(), exact, **NEAR)
    torch.testing.assert_close(adapter.delta(shape, torch.float64), exact, rtol=1e-12, atol=1e-12)


@each_branch
@pytest.mark.parametrize("strength", [1.0, 0.37, -2.0])
def test_adding_in_place_is_adding_the_delta(name, strength):
    adapter, shape, exact = CASES[name]
    weight = rand(*shape, seed=7)
    changed = weight.clone()
    adapter.add_(changed, strength)
    torch.testing.assert_close(changed.double(), weight.double() + strength * exact, **NEAR)


@each_branch
def test_adding_works_on_memory_that_is_no_matrix(name):
    adapter, shape, exact = CASES[name]
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shape))
    weight = rand(*shape, seed=7)
    weight = weight.to(memory_format=last) if last else weight.T.contiguous().T
    changed = weight.clone(memory_format=torch.preserve_format)
    adapter.add_(changed, 0.5)
    torch.testing.assert_close(changed.double(), weight.double() + 0.5 * exact, **NEAR)


@each_branch
def test_energy_is_the_squared_norm_of_the_delta(name):
    adapter, _, exact = CASES[name]
    assert adapter.energy() == pytest.approx(float((exact**2).sum()), rel=1e-5)  # float32 Gram matrices


@each_branch
def test_swapping_exchanges_the_halves_of_the_rows(name):
    adapter, shape, exact = CASES[name]
    swapped = torch.cat((exact[6:], exact[:6]))
    torch.testing.assert_close(adapter.swapped.delta(shape, torch.float64), swapped, rtol=1e-12, atol=1e-12)


@each_branch
def test_packing_loses_nothing(name):
    adapter, shape, _ = CASES[name]
    again = type(adapter)(*adapter.packed())
    assert torch.equal(again.delta(shape), adapter.delta(shape))


@each_branch
def test_fused_terms_have_the_same_sum(name):
    adapter, shape, exact = CASES[name]
    weight = rand(*shape, seed=7, dtype=torch.float64)
    changed = weight.clone()
    for term, strength in fused([(adapter, 0.8), (adapter, -0.3), (adapter, 1.0)], torch.float64):
        term.add_(changed, strength)
    torch.testing.assert_close(changed, weight + 1.5 * exact, rtol=1e-12, atol=1e-12)


@each_branch
def test_inputs_are_never_changed(name):
    adapter, shape, _ = CASES[name]
    before = [value.clone() if isinstance(value, torch.Tensor) else value for value in adapter.packed()]
    adapter.add_(rand(*shape), 0.5)
    list(fused([(adapter, 2.0), (adapter, 3.0)], torch.float32))
    assert adapter.swapped is adapter.swapped
    for old, new in zip(before, adapter.packed(), strict=True):
        assert torch.equal(old, new) if isinstance(old, torch.Tensor) else old == new


@each_branch
def test_a_weight_of_another_shape_is_refused_without_multiplying(name):
    adapter, shape, _ = CASES[name]
    adapter.require_fit(shape)
    wrong = [(shape[0] + 1, *shape[1:]), (shape[0], shape[1] + 1, *shape[2:]), (shape[1], shape[0], *shape[2:])]
    wrong += [(shape[0] * 2, shape[1] // 2, *shape[2:]), (*shape[:2], 5, 5)]  # same number of elements; other kernel
    for other in wrong:
        with pytest.raises(ShapeError):
            adapter.require_fit(other)


def test_a_zero_start_changes_no_bit():
    adapter = LowRank(torch.zeros(12, 3), rand(3, 8))
    weight = rand(12, 8)
    changed = weight.clone()
    adapter.add_(changed, 0.7)
    assert torch.equal(changed, weight) and adapter.idle and not lora().idle


@pytest.mark.parametrize(
    ("factors", "error", "words"),
    [
        ({"up": rand(4, 2)}, AdapterError, "lacks its down"),
        ({"alpha": torch.tensor(1.0)}, AdapterError, "lacks its down, up"),
        ({"up": rand(4, 2), "down": rand(3, 4)}, ShapeError, "do not share one rank"),
        ({"up": rand(4, 2, 3, 3), "down": rand(2, 4, 3, 3)}, ShapeError, "do not share one rank"),
        ({"up": rand(4), "down": rand(4)}, ShapeError, "no matrix"),
        ({"up": rand(4, 0), "down": rand(0, 4)}, ShapeError, "no matrix"),
        ({"up": rand(4, 2), "down": rand(2, 4).int()}, AdapterError, "not a float type"),
        ({"up": rand(4, 2), "down": rand(2, 4), "alpha": rand(2)}, ShapeError, "alpha has the shape"),
        ({"up": rand(4, 2), "down": rand(2, 4), "magnitude": rand(4)}, AdapterError, "magnitude"),
        ({"up": rand(4, 2), "down": rand(2, 4), "mid": rand(2, 2, 3, 3)}, AdapterError, "mid"),
        ({"lokr_w1": rand(2, 2), "lokr_w2": rand(2, 2)}, AdapterError, "lokr_w1, lokr_w2"),
    ],
)
def test_factors_that_make_no_adapter_are_refused(factors, error, words):
    with pytest.raises(error, match=words):
        build(factors)
