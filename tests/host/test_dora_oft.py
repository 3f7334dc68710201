"""DoRA and OFT beside the host: equal where it is right; where it is wrong, the known difference, so that we notice
when it is mended. What is right is told by PEFT and LyCORIS (tests/oracles/test_transforms.py)."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from harness import inside
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


# What a file has for a weight (or band) of a shape: each algebra that runs live.
def _factors(kind: str, weight: Tensor, seed: int) -> dict[str, Tensor]:
    rows, inputs, *kernel = weight.shape
    ones, first = [1] * len(kernel), next(n for n in (8, 4, 2, 1) if rows % n == 0)
    pair = {
        "lora_up.weight": 0.3 * noise(rows, 4, *ones, seed=seed),
        "lora_down.weight": 0.3 * noise(4, inputs, *kernel, seed=seed + 1),
    }
    axis = int(kind.endswith("per input"))
    norms = (weight**2).sum([n for n in range(weight.ndim) if n != axis], keepdim=True).sqrt()
    norms = norms * (1 + 0.1 * noise(*norms.shape, seed=seed))
    mix = {"a1": (inputs, 2, *ones), "a2": (2, inputs, *ones), "b1": (rows, 2, *ones), "b2": (2, inputs, *kernel)}
    return {
        "DoRA per output": lambda: pair | {"dora_scale": norms},
        "DoRA per input": lambda: pair | {"dora_scale": norms},
        "DoRA of PEFT": lambda: pair | {"lora_magnitude_vector": norms.flatten()},
        "(IA)3 per output": lambda: {"weight": 0.3 * noise(rows, seed=seed), "on_input": torch.tensor(0)},
        "(IA)3 per input": lambda: {"weight": 0.3 * noise(1, inputs, *ones, seed=seed), "on_input": torch.tensor(1)},
        "Diag-OFT": lambda: {
            "oft_blocks": 0.1 * noise(rows // first, first, first, seed=seed),
            "rescale": 1 + 0.1 * noise(rows, *ones, seed=seed),
        },
        "GLoRA": lambda: {f"{name}.weight": 0.3 * noise(*shape, seed=seed) for name, shape in mix.items()},
    }[kind]()


LIVE = ("DoRA per output", "DoRA per input", "DoRA of PEFT", "(IA)3 per output", "(IA)3 per input", "Diag-OFT", "GLoRA")


def made_of(kinds: Sequence[str], model, ours, tensors: dict[str, Tensor], every: int = 3) -> dict[str, Tensor]:
    """A file of these algebras in turn, for some of the modules that a LoRA file names."""
    names, before = ours("nodes.host.patching").targets(model, None).names, weights(model)
    ends = (".lora_up.weight", ".lora_B.weight")
    modules = [key.removesuffix(end) for key in tensors for end in ends if key.endswith(end)]
    file = {}
    for seed, module in enumerate(modules[::every]):
        target = names[module].target
        weight = before[target.key].float()[target.rows.start : target.rows.end]
        found = _factors(kinds[seed % len(kinds)], weight, seed)
        file |= {f"{module}.{name}": tensor for name, tensor in found.items()}
    return file


def far(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize(("family", "number"), [("sd15", 0), ("sdxl", 0), ("flux", 0), ("flux", 2)])
def test_what_depends_on_its_weight_runs_live_as_it_patches(models, ours, samples, apply, family, number):
    """Between LoRAs that run before and after it; diffusers' names of FLUX are bands of fused weights."""
    model = models[family]
    before, after = ((samples(model, number, seed=seed), 0.6) for seed in (1, 2))
    stack = [before, (made_of(LIVE, model, ours, before[0]), 0.7), after]
    patched, live = (run(apply(model, *stack, mode=mode)) for mode in ("patch", "live"))
    without = run(apply(model, before, after, mode="patch"))
    assert far(live, patched) < 1e-5 < 1e-3 < far(without, patched)


def test_a_schedule_runs_what_depends_on_its_weight(sd15, ours, samples, apply):
    """Live in every mode. Off at first, as without it; on, as patched; its norms follow the LoRA before it."""
    landing, stack, patching = ours("lora_ops.landing"), ours("lora_ops.stack"), ours("nodes.host.patching")
    from_file, file = ours("lora_ops.lora").from_file, ours("lora_ops.files").TensorFile
    plain = samples(sd15, 0, seed=1)
    other = made_of(LIVE, sd15, ours, plain)
    loras = [from_file(file("x", tensors)) for tensors in (plain, other)]

    def scheduled(*schedules) -> Tensor:
        one = {"model": 1.0, "clip": 1.0}
        entries = [stack.Entry(*pair) for pair in zip(loras, [one, one], schedules, strict=True)]
        landed = landing.land(entries, patching.targets(sd15, None))
        done = patching.applied(landed, "patch", sd15, None)
        assert done.how == {"model": "live, for the schedule"}
        return run(done.model)

    # the call of `run` is at timestep 0.5, the end of sampling
    on, off = stack.Schedule(start=0.2), stack.Schedule(end=0.2)
    half = stack.Schedule(points=((0.0, 1.0), (1.0, 0.5)))
    sampling, sigma = sd15.model.model_sampling, 0.5
    percent = next(p for p in torch.linspace(0, 1, 1001).tolist() if float(sampling.percent_to_sigma(p)) <= sigma)
    for schedules, strengths in (
        ((on, on), (1.0, 1.0)),
        ((on, off), (1.0, 0.0)),
        ((off, on), (0.0, 1.0)),
        ((half, on), (half.at(percent), 1.0)),
    ):
        patched = run(apply(sd15, *zip((plain, other), strengths, strict=True)))
        assert far(scheduled(*schedules), patched) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_on_an_fp8_base_it_runs_live_within_a_percent_of_what_baking_leaves(pack, ours, apply, dtype):
    model = inside.model("flux", dtype)
    layer = model.model.diffusion_model.single_blocks[0].linear2
    key, module = "diffusion_model.single_blocks.0.linear2.weight", "lora_unet_single_blocks_0_linear2"
    x, exact = noise(3, layer.in_features), layer.weight.double()
    plain = layer(x).double()

    def error(tensors: dict[str, Tensor], mode: str) -> float:
        patcher = apply(model, (tensors, 0.5), mode=mode)
        assert (key in patcher.patches) == (mode == "patch")
        run(patcher)
        return far(layer(x).double() - plain, update)

    for kind in LIVE:
        file = {f"{module}.{name}": tensor for name, tensor in _factors(kind, exact.float(), 1).items()}
        lora, changed = ours("lora_ops.lora").from_file(ours("lora_ops.files").TensorFile("x", file)), exact.clone()
        lora.modules[module].add_(changed, 0.5)
        update = x.double() @ (changed - exact).T
        assert error(file, "auto") < 0.01 * error(file, "patch"), kind
    model.detach()


@pytest.mark.parametrize("mode", ["live", "auto"])
def test_what_cannot_run_live_says_so(models, base, apply, ours, mode, monkeypatch):
    """PEFT's OFT rotates inputs and kernels as one, which no module sees."""
    errors, live = ours("lora_ops.errors"), ours("nodes.host.live")
    monkeypatch.setattr(live, "coarse", lambda _, keys: dict.fromkeys(keys, "float8_e4m3fn"))
    rotations = {f"{m}.oft_R.weight": 0.1 * noise(weight[0].numel() // 4, 6) for m, (_, weight, _) in base.items()}
    with pytest.raises(errors.TargetError, match=r"OFT update, which cannot run live.*mode patch"):
        apply(models["sd15"], (rotations, 1.0), mode=mode)


def test_in_a_schedule_what_cannot_run_live_has_another_remedy(sd15, base, ours):
    landing, stack, patching = ours("lora_ops.landing"), ours("lora_ops.stack"), ours("nodes.host.patching")
    rotations = {f"{m}.oft_R.weight": 0.1 * noise(weight[0].numel() // 4, 6) for m, (_, weight, _) in base.items()}
    lora = ours("lora_ops.lora").from_file(ours("lora_ops.files").TensorFile("x", rotations))
    entry = stack.Entry(lora, {"model": 1.0, "clip": 1.0}, stack.Schedule(start=0.2))
    with pytest.raises(ours("lora_ops.errors").TargetError, match="take the schedules out"):
        patching.applied(landing.land([entry], patching.targets(sd15, None)), "patch", sd15, None)


def test_a_patch_below_a_live_dora_is_seen_and_one_after_it_is_refused(sd15, base, apply, ours, samples):
    import comfy.sd

    plain, of_outputs = samples(sd15, 0, seed=2), dora(base, "dora_scale", False)
    error = ours("lora_ops.errors").TargetError
    below = apply(apply(sd15, (plain, 0.8)), (of_outputs, 0.5), mode="live")
    truth = run(apply(sd15, (plain, 0.8), (of_outputs, 0.5)))
    assert far(run(below), truth) < 1e-5
    other = apply(apply(sd15, (plain, -0.4)), (of_outputs, 0.5), mode="live")  # the norms are of other weights now
    assert far(run(other), run(apply(sd15, (plain, -0.4), (of_outputs, 0.5)))) < 1e-5
    assert far(run(below), truth) < 1e-5
    with pytest.raises(error, match="it would see the one that comes after. Put this one before"):
        apply(apply(sd15, (of_outputs, 0.5), mode="live"), (plain, 1.0))
    foreign = comfy.sd.load_lora_for_models(apply(sd15, (of_outputs, 0.5), mode="live"), None, dict(plain), 1.0, 0)[0]
    with pytest.raises(error, match="was patched after .* Put that patch before it"):
        run(foreign)
    sd15.detach()


def test_a_hook_lora_on_a_live_dora_is_refused_as_the_hook_comes(sd15, base, apply, ours, samples):
    """Patched it comes on top; live, the DoRA would stretch it."""
    import comfy.hooks
    import comfy.model_management

    live = apply(sd15, (dora(base, "dora_scale", False), 0.5), mode="live")
    hooks = comfy.hooks.create_hook_lora(dict(samples(sd15, 0, seed=2)), 0.5, 0)
    comfy.model_management.load_models_gpu([live])
    target = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
    with pytest.raises(ours("lora_ops.errors").TargetError, match="by a hook .* Use mode patch"):
        live.register_all_hook_patches(hooks, target)
    live.detach()


def test_a_live_dora_beside_the_bypass_of_the_host_sees_its_own_weight_alone(sd15, base, apply, samples):
    from tests.host.test_live import bypass

    plain, of_outputs = samples(sd15, 0, seed=2), dora(base, "dora_scale", False)
    mixed = run(apply(bypass(sd15, plain, 0.8), (of_outputs, 0.5), mode="live"))
    assert far(mixed, run(apply(sd15, (of_outputs, 0.5), (plain, 0.8)))) < 1e-5


def test_a_dora_patched_after_a_live_lora_would_not_see_it(sd15, base, apply, ours, samples):
    errors, plain, of_outputs = ours("lora_ops.errors"), samples(sd15, 0, seed=2), dora(base, "dora_scale", False)
    with pytest.raises(errors.TargetError, match="would not see the LoRA that runs live"):
        apply(apply(sd15, (plain, 1.0), mode="live"), (of_outputs, 1.0))
    mixed = apply(apply(sd15, (of_outputs, 1.0)), (plain, 1.0), mode="live")
    torch.testing.assert_close(run(mixed), run(apply(sd15, (of_outputs, 1.0), (plain, 1.0))), rtol=1e-3, atol=1e-4)
