"""Patching against the host as oracle: the same names, the same bits, nothing left behind."""

from __future__ import annotations

import pytest
import torch

from harness import inside
from harness.inside import FAMILIES, patched_weights

STRENGTHS = (1.0, 0.7, -0.3, 2.5)


each_family = pytest.mark.parametrize("model", FAMILIES, indirect=True)


def host_apply(model, tensors, strength):
    import comfy.sd

    return comfy.sd.load_lora_for_models(model, None, dict(tensors), strength, 0)[0]


def exact(model, tensors, strength, ours):
    """W + strength · scale · up · down in float64, for a file in kohya's spelling."""
    patching = ours("nodes.host.patching")
    names = patching.targets(model, None).names
    base = model.model.state_dict()
    found = {}
    for key, down in tensors.items():
        if key.endswith(".lora_down.weight"):
            module = key.removesuffix(".lora_down.weight")
            scale = float(tensors[f"{module}.alpha"]) / down.shape[0]
            update = tensors[f"{module}.lora_up.weight"].flatten(1).double() @ down.flatten(1).double()
            weight = base[names[module].target.key].double()
            found[names[module].target.key] = weight + strength * scale * update.reshape(weight.shape)
    return found


@each_family
@pytest.mark.parametrize("strength", [1.0, 0.5, -2.0])
def test_one_lora_at_a_power_of_two_is_bit_identical_to_the_hosts(model, samples, apply, strength):
    """Multiplying by a power of two rounds nothing, so both must do the same two roundings."""
    for number in (0, 1):  # kohya and comfy write the same update; alpha / rank is a half
        tensors = samples(model, number)
        theirs = patched_weights(host_apply(model, tensors, strength))
        mine = patched_weights(apply(model, (tensors, strength)))
        assert mine.keys() == theirs.keys() and len(mine) > 10
        assert [key for key in mine if not torch.equal(mine[key], theirs[key])] == []


@each_family
def test_split_projections_are_bit_identical_to_the_hosts(model, samples, apply):
    """diffusers' and the host's names of the bands of fused weights."""
    import comfy.lora

    tensors = samples(model, 2)
    known = comfy.lora.model_lora_keys_unet(model.model, {})
    tensors = {key: t for key, t in tensors.items() if key.rsplit(".lora_", 1)[0] in known}
    assert tensors
    theirs = patched_weights(host_apply(model, tensors, 1.0))
    mine = patched_weights(apply(model, (tensors, 1.0)))
    assert mine.keys() == theirs.keys()
    assert [key for key in mine if not torch.equal(mine[key], theirs[key])] == []


@each_family
@pytest.mark.parametrize("strength", STRENGTHS)
def test_at_any_scale_we_are_no_further_from_float64_than_the_host(model, samples, apply, ours, strength):
    tensors = samples(model, 0, seed=1)
    truth = exact(model, tensors, strength, ours)
    theirs = patched_weights(host_apply(model, tensors, strength))
    mine = patched_weights(apply(model, (tensors, strength)))
    assert mine.keys() == truth.keys()

    def error(found):
        return sum(float(((found[key].double() - truth[key]) ** 2).sum()) for key in truth)

    assert error(mine) <= error(theirs)


@each_family
def test_a_stack_is_one_adapter_per_weight_and_closer_to_float64_than_the_hosts_chain(model, samples, apply, ours):
    loras = [(samples(model, 0, seed=seed), strength) for seed, strength in ((1, 0.8), (2, -0.35), (3, 0.61))]
    base = {key: tensor.double() for key, tensor in model.model.state_dict().items()}
    truth = {key: base[key].clone() for key in exact(model, *loras[0], ours)}
    chain = model
    for tensors, strength in loras:
        for key, changed in exact(model, tensors, strength, ours).items():
            truth[key] += changed - base[key]
        chain = host_apply(chain, tensors, strength)
    stacked = apply(model, *loras)
    chained = model
    for each in loras:
        chained = apply(chained, each)
    theirs = patched_weights(chain)
    for mine in (stacked, chained):
        assert all(len(there) == 1 for there in mine.patches.values())
        found = patched_weights(mine)

        def error(weights):
            return sum(float(((weights[key].double() - truth[key]) ** 2).sum()) for key in truth)

        assert error(found) <= error(theirs)


@each_family
def test_patching_and_unpatching_leaves_the_base_bit_identical(model, samples, apply):
    before = inside.weights(model)
    patched = apply(model, (samples(model, 0, seed=1), 0.7))
    for _ in range(3):
        patched.patch_model(inside.CPU)
        changed = model.model.state_dict()
        assert any(not torch.equal(changed[key], before[key]) for key in patched.patches)
        patched.unpatch_model(inside.CPU)
        after = model.model.state_dict()
        assert all(torch.equal(after[key], before[key]) for key in before)
    assert not model.patches


def test_an_earlier_clone_keeps_what_it_had(models, samples, apply):
    model = models["sd15"]
    first = apply(model, (samples(model, 0, seed=1), 1.0))
    before = patched_weights(first)
    second = apply(first, (samples(model, 0, seed=2), 1.0))
    again = patched_weights(first)
    assert first.patches_uuid != second.patches_uuid
    assert all(torch.equal(before[key], again[key]) for key in before)


def test_other_nodes_patches_before_between_and_after_ours_all_count(models, samples, apply):
    model = models["flux"]
    tensors = [samples(model, 0, seed=seed) for seed in range(4)]
    mixed = host_apply(apply(host_apply(model, tensors[0], 0.5), (tensors[1], 0.5)), tensors[2], 0.5)
    mixed = apply(mixed, (tensors[3], 0.5))
    chain = model
    for each in tensors:
        chain = host_apply(chain, each, 0.5)
    mine, theirs = patched_weights(mixed), patched_weights(chain)
    for key in theirs:
        # four float32 sums in another order: a few units in the last place of the largest entries
        torch.testing.assert_close(mine[key], theirs[key], rtol=1e-5, atol=2e-6)


def test_the_host_can_rebuild_and_move_our_patch(models, samples, apply):
    """What its low-VRAM and dynamic paths do: type(p)(p.loaded_keys, p.weights) with every tensor replaced."""
    import comfy.lora

    model = models["flux"]
    patched = apply(model, (samples(model, 2, seed=1), 0.7))
    for key, there in patched.patches.items():
        patch = there[0][1]
        counter = [0]
        comfy.lora.prefetch_prepared_value(patch, counter, None, None, False)
        size = counter[0]
        assert size > 0
        moved = comfy.lora.prefetch_prepared_value(patch, [0], torch.empty(size, dtype=torch.uint8), None, True)
        assert type(moved) is type(patch)
        weight = model.model.state_dict()[key]
        arguments = (key, 1.0, 1.0, None, lambda value: value)
        assert torch.equal(
            moved.calculate_weight(weight.clone(), *arguments), patch.calculate_weight(weight.clone(), *arguments)
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_per_forward_the_incoming_dtype_comes_back(models, samples, apply, dtype):
    """The low-VRAM path asks for the weight's own dtype and must get it, close to the float32 result."""
    model = models["sd15"]
    patched = apply(model, (samples(model, 0, seed=1), 0.7))
    for key, there in patched.patches.items():
        weight = model.model.state_dict()[key]
        low = there[0][1].calculate_weight(weight.to(dtype), key, 1.0, 1.0, None, None, intermediate_dtype=dtype)
        full = there[0][1].calculate_weight(weight.clone(), key, 1.0, 1.0, None, None)
        assert low.dtype == dtype and full.dtype == torch.float32
        # rounding W and the factors to 8 bits: relative to the weight's norm, not entry by entry
        assert (low.float() - full).norm() <= 2 * torch.finfo(dtype).eps * full.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_rounded_once(pack, samples, apply, ours, dtype):
    """W' is the stored dtype's nearest value to the float64 sum, but for ties that float32 cannot see."""
    model = inside.model("flux", dtype)
    tensors = samples(model, 0, seed=1)
    truth = exact(model, tensors, 0.7, ours)
    mine = patched_weights(apply(model, (tensors, 0.7)))
    for key, weight in mine.items():
        assert weight.dtype == dtype
        assert (weight != truth[key].to(dtype)).float().mean() < 1e-3


def test_strength_zero_adds_no_patch(models, samples, apply):
    model = models["sd15"]
    assert apply(model, (samples(model), 0.0)) is model


def test_what_names_mean_is_worked_out_once_for_a_model_and_its_clones(models, ours):
    targets = ours("nodes.host.patching").targets
    found = targets(models["flux"], None)
    assert targets(models["flux"].clone(), None) is found and targets(models["sd15"], None) is not found
    assert targets(inside.model("flux"), None) is found
