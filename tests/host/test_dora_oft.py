"""DoRA and OFT beside the host: equal where it is right; where it is wrong, the known difference, so that we notice
when it is mended. What is right is told by PEFT and LyCORIS (tests/oracles/test_transforms.py)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from harness.inside import patched_weights, run, weights

SOME = 12  # modules: linear and convolution
MODULES = ("attn1_to_q", "attn2_to_k", "ff_net_2", "proj_in", "in_layers_2")


@pytest.fixture(scope="module")
def sd15(models):
    return models["sd15"]


@pytest.fixture(scope="module")
def base(sd15, samples, ours):
    """Module -> its key, its weight, and the sample LoRA's tensors for it."""
    names, tensors = ours("nodes.host.patching").targets(sd15, None).names, samples(sd15, 0, seed=1)
    before = weights(sd15)
    found = {}
    for key in tensors:
        module = key.removesuffix(".lora_down.weight")
        if module != key and module.endswith(MODULES) and len(found) < SOME:
            there = {name: tensor for name, tensor in tensors.items() if name.rsplit(".lora_", 1)[0] == module}
            there[f"{module}.alpha"] = tensors[f"{module}.alpha"]
            target = names[module].target.key
            found[module] = target, before[target], there
    assert len(found) == SOME and {weight.ndim for _, weight, _ in found.values()} == {2, 4}
    return found


def noise(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dora(base, spelling: str, of_inputs: bool) -> dict[str, Tensor]:
    """The sample LoRA, and magnitudes some percent off the weight's own."""
    file = {}
    for module, (_, weight, there) in base.items():
        axis = int(of_inputs)
        norms = (weight**2).sum([n for n in range(weight.ndim) if n != axis], keepdim=True).sqrt()
        norms = norms * (1 + 0.05 * noise(*norms.shape))
        file |= there | {f"{module}.{spelling}": norms if spelling == "dora_scale" else norms.flatten()}
    return file


def oft(base, *, stages: int = 0, alpha: float | None = 0.0, rescale: bool = False) -> dict[str, Tensor]:
    file = {}
    for module, (_, weight, _) in base.items():
        blocks, ones = len(weight) // 4, [1] * (weight.ndim - 1)
        shape = (stages, blocks, 4, 4) if stages else (blocks, 4, 4)
        file[f"{module}.oft_blocks"] = 0.1 * noise(*shape)
        if alpha is not None:
            file[f"{module}.alpha"] = torch.tensor(alpha)
        if rescale:
            file[f"{module}.rescale"] = 1 + 0.1 * noise(len(weight), *ones)
    return file


def updates(base, patched) -> Tensor:
    """All that a patch does to the weights, as one vector."""
    return torch.cat([(patched[key] - weight).flatten() for key, weight, _ in base.values()]).double()


@pytest.fixture
def both(sd15, base, apply):
    def patched(tensors: dict[str, Tensor], strength: float = 1.0) -> tuple[Tensor, Tensor]:
        """Our update and the host's."""
        import comfy.sd

        mine = patched_weights(apply(sd15, (tensors, strength)))
        theirs = patched_weights(comfy.sd.load_lora_for_models(sd15, None, dict(tensors), strength, 0)[0])
        before = {key: weight for key, weight, _ in base.values()}
        assert mine.keys() == before.keys()
        return updates(base, mine), updates(base, before | theirs)

    return patched


def error(mine: Tensor, theirs: Tensor) -> float:
    return float((theirs - mine).norm() / mine.norm())


def gain(mine: Tensor, theirs: Tensor) -> float:
    """How much of our update there is in the host's."""
    return float(mine @ theirs / (mine @ mine))


def test_dora_per_input_at_strength_1_is_the_hosts(base, both):
    assert error(*both(dora(base, "dora_scale", True))) < 1e-5


@pytest.mark.parametrize("stages", [0, 2], ids=["Diag-OFT", "BOFT"])
def test_oft_at_strength_1_without_constraint_and_rescale_is_the_hosts(base, both, stages):
    assert error(*both(oft(base, stages=stages))) < 1e-5


def test_the_host_divides_a_dora_per_output_by_the_norm_of_another_weight(base, both):
    assert 0.01 < error(*both(dora(base, "dora_scale", False))) < 1


@pytest.mark.parametrize("spelling", ["lora_magnitude_vector", "magnitude"])
def test_the_host_drops_the_magnitudes_of_peft_and_ai_toolkit(base, both, spelling):
    mine, theirs = both(dora(base, spelling, False))
    plain = {key: tensor for _, _, there in base.values() for key, tensor in there.items()}
    assert torch.equal(theirs, both(plain)[1]) and error(mine, theirs) > 0.1


def test_the_host_keeps_a_percent_of_a_constrained_oft(base, both):
    """It does not multiply the constraint by the number of outputs."""
    assert 0 < gain(*both(oft(base, alpha=0.01))) < 0.1


def test_the_host_ignores_the_rescaling_of_an_oft(base, both):
    rescaled, plain = both(oft(base, rescale=True)), both(oft(base))
    assert torch.equal(rescaled[1], plain[1]) and error(*rescaled) > 0.05


def test_the_host_does_nothing_for_a_boft_without_alpha(base, both):
    mine, theirs = both(oft(base, stages=2, alpha=None))
    assert not theirs.any() and torch.equal(mine, both(oft(base, stages=2))[0])


def test_what_the_host_drops_lands(sd15, base, apply, ours):
    import comfy.lora

    keys = comfy.lora.model_lora_keys_unet(sd15.model, {})
    ia3, peft = {}, {}
    for module, (_, weight, _) in base.items():
        ia3[f"{module}.weight"] = noise(len(weight)) if weight.ndim == 2 else noise(1, len(weight), 1, 1)
        ia3[f"{module}.on_input"] = torch.tensor(0)
        peft[f"{module}.oft_R.weight"] = 0.1 * noise(weight[0].numel() // 4, 6)
    for file in (ia3, peft):
        assert not comfy.lora.load_lora(dict(file), keys)
        assert updates(base, patched_weights(apply(sd15, (file, 1.0)))).norm() > 1


def test_a_chain_of_nodes_is_a_stack(sd15, base, apply, samples):
    """DoRA after a LoRA sees it, whether one node put them there or two, and the base comes back to the bit."""
    plain, of_outputs = samples(sd15, 0, seed=2), dora(base, "dora_scale", False)
    chain = patched_weights(apply(apply(sd15, (plain, 0.8)), (of_outputs, 0.5)))
    stack = patched_weights(apply(sd15, (plain, 0.8), (of_outputs, 0.5)))
    turned = patched_weights(apply(sd15, (of_outputs, 0.5), (plain, 0.8)))
    assert all(torch.equal(chain[key], stack[key]) for key in stack)
    assert error(updates(base, stack), updates(base, turned)) > 0.01
    before = weights(sd15)
    model = apply(sd15, (of_outputs, 1.0))
    run(model)
    model.detach()
    assert all(torch.equal(tensor, before[key]) for key, tensor in weights(sd15).items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_where_the_host_patches_per_forward_norms_are_taken_in_float32(sd15, base, apply, dtype):
    model = apply(sd15, (dora(base, "dora_scale", False), 1.0))
    for key, weight, _ in base.values():
        (_, patch, *_), *_ = model.patches[key]
        rebuilt = type(patch)(patch.loaded_keys, patch.weights)
        half = weight.to(dtype)
        exact = rebuilt.calculate_weight(half.double(), key, 1.0, 1.0, None, None, torch.float64)
        found = rebuilt.calculate_weight(half.clone(), key, 1.0, 1.0, None, None, dtype)
        assert found.dtype == dtype
        once = (exact.to(dtype).double() - exact).norm()
        assert (found.double() - exact).norm() < 1.001 * once


@pytest.mark.parametrize("mode", ["live", "auto"])
def test_what_cannot_run_live_says_so(models, base, apply, ours, mode, monkeypatch):
    errors, live = ours("lora_ops.errors"), ours("nodes.host.live")
    monkeypatch.setattr(live, "coarse", lambda _, keys: dict.fromkeys(keys, "float8_e4m3fn"))
    for file, words in ((dora(base, "dora_scale", False), "DoRA"), (oft(base), "Diag-OFT")):
        with pytest.raises(errors.TargetError, match=f"{words} update, which cannot run live.*mode patch"):
            apply(models["sd15"], (file, 1.0), mode=mode)


def test_a_dora_patched_after_a_live_lora_would_not_see_it(sd15, base, apply, ours, samples):
    errors, plain, of_outputs = ours("lora_ops.errors"), samples(sd15, 0, seed=2), dora(base, "dora_scale", False)
    with pytest.raises(errors.TargetError, match="would not see the LoRA that runs live"):
        apply(apply(sd15, (plain, 1.0), mode="live"), (of_outputs, 1.0))
    mixed = apply(apply(sd15, (of_outputs, 1.0)), (plain, 1.0), mode="live")
    torch.testing.assert_close(run(mixed), run(apply(sd15, (of_outputs, 1.0), (plain, 1.0))), rtol=1e-3, atol=1e-4)
