"""Live mode on the host: equal to patch mode, exact on fp8, beside everybody else's hooks, and gone afterwards."""

from __future__ import annotations

import gc
import time

import pytest
import torch

from harness import inside
from harness.inside import FAMILIES, run

each_family = pytest.mark.parametrize("model", FAMILIES, indirect=True)


def bypass(model, tensors, strength):
    import comfy.sd

    return comfy.sd.load_bypass_lora_for_models(model, None, dict(tensors), strength, 0)[0]


def near(one, other, relative=1e-5):
    return (one - other).norm() <= relative * other.norm()


def footprint(model):
    """Everything that hooks and patches could leave on a model."""
    modules = {name: set(module.__dict__) for name, module in model.model.named_modules()}
    return modules, inside.weights(model)


def unchanged(model, before, *, attributes=True):
    modules, weights = footprint(model)
    same = all(torch.equal(weights[key], before[1][key]) for key in before[1])
    return same and (not attributes or modules == before[0])


@each_family
@pytest.mark.parametrize("number", [0, 2])
def test_live_equals_patch(model, samples, apply, number):
    """kohya names whole weights, diffusers names bands of the fused ones."""
    loras = [(samples(model, number, seed=1), 0.8), (samples(model, number, seed=2), -0.4)]
    plain, before = run(model), footprint(model)
    patched = run(apply(model, *loras, mode="patch"))
    live = run(apply(model, *loras, mode="live"))
    assert near(live, patched) and not near(plain, patched, 1e-3)
    assert torch.equal(run(model), plain) and unchanged(model, before)


@pytest.mark.parametrize("family", sorted(inside.INPUTS.keys() - set(FAMILIES)))
def test_live_equals_patch_in_the_other_families(samples, apply, family):
    model = inside.model(family)
    loras = [(samples(model, 1, seed=1), 0.8), (samples(model, 1, seed=2), -0.4)]
    plain = inside.answer(model, family)
    patched = inside.answer(apply(model, *loras, mode="patch"), family)
    live = inside.answer(apply(model, *loras, mode="live"), family)
    assert near(live, patched) and not near(plain, patched, 1e-3)


@each_family
def test_a_chain_of_live_nodes_is_one_hook_per_module_and_adds_up(model, samples, apply):
    loras = [(samples(model, 0, seed=seed), strength) for seed, strength in ((1, 0.8), (2, -0.4), (3, 0.3))]
    chain = model
    for each in loras:
        chain = apply(chain, each, mode="live")
    assert list(chain.injections) == ["lora_ops_live"] and len(chain.injections["lora_ops_live"]) == 1
    assert near(run(chain), run(apply(model, *loras, mode="patch")))


def test_live_and_patch_and_the_hosts_own_loaders_add_up_in_any_order(models, samples, apply):
    from tests.host.test_patching import host_apply

    model = models["sd15"]
    tensors = [samples(model, 0, seed=seed) for seed in range(1, 5)]
    truth = run(apply(model, *((each, 0.3) for each in tensors), mode="patch"))
    run(model)
    before = footprint(model)
    steps = [
        lambda m: apply(m, (tensors[0], 0.3), mode="live"),
        lambda m: apply(m, (tensors[1], 0.3), mode="patch"),
        lambda m: host_apply(m, tensors[2], 0.3),
        lambda m: bypass(m, tensors[3], 0.3),
    ]
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)):
        mixed = model
        for number in order:
            mixed = steps[number](mixed)
        for _ in range(2):
            assert near(run(mixed), truth), order
        mixed.detach()
        # the host's bypass leaves a bound `forward` on its modules
        assert unchanged(model, before, attributes=False)
        assert near(run(model), run(model.clone()), 0)


def foreign(model, tensors, strength, ours):
    """What another pack may register: full differences, as the host's own ("diff", (tensor,)) patches."""
    from tests.host.test_patching import exact

    weights = inside.weights(model)
    changed = exact(model, tensors, 1.0, ours)
    clone = model.clone()
    differences = {key: (changed[key] - weights[key].double()).float() for key in changed}
    clone.add_patches({key: ("diff", (difference,)) for key, difference in differences.items()}, strength)
    return clone


@pytest.mark.parametrize(("family", "cycles"), [("flux", 50), ("sd15", 2)])  # the UNets are not as small
def test_fifty_cycles_of_a_chain_of_six_leave_the_base_bit_identical(models, samples, apply, ours, family, cycles):
    """Ours, a merge with another model, core's LoraLoader, another pack's patch, core's bypass, ours live."""
    import comfy.model_management

    from tests.host.test_patching import host_apply

    model = models[family]
    plain, before = run(model), footprint(model)
    tensors = [samples(model, 0, seed=seed) for seed in range(1, 7)]
    mixed = apply(model, (tensors[0], 0.4), mode="patch")
    other = host_apply(model, tensors[1], 0.8)
    mixed = mixed.clone()  # as ModelMergeSimple does it
    mixed.add_patches(dict(other.get_key_patches("diffusion_model.")), 0.25, 0.75)
    mixed = host_apply(mixed, tensors[2], 0.2)
    mixed = foreign(mixed, tensors[3], 0.3, ours)
    mixed = bypass(mixed, tensors[4], 0.2)
    mixed = apply(mixed, (tensors[5], 0.2), mode="live")
    first = run(mixed)
    written = zip(tensors, (0.75 * 0.4, 0.25 * 0.8, 0.2, 0.3, 0.2, 0.2), strict=True)
    assert near(first, run(apply(model, *written, mode="patch"))) and not near(first, plain, 1e-3)
    for _ in range(cycles):
        comfy.model_management.load_models_gpu([mixed])
        comfy.model_management.load_models_gpu([model])
    assert torch.equal(run(mixed), first) and torch.equal(run(model), plain)
    mixed.detach()
    assert unchanged(model, before, attributes=False)


@pytest.mark.parametrize("mode", ["patch", "live"])
def test_a_hook_lora_comes_on_top_of_ours_and_goes_again(models, samples, apply, mode):
    """Core's CreateHookLora changes the loaded weights for some conditionings and some steps only."""
    import comfy.hooks
    import comfy.model_management

    model = models["sd15"]
    plain, before = run(model), footprint(model)
    ours, hooked = samples(model, 0, seed=1), samples(model, 0, seed=2)
    patcher = apply(model, (ours, 0.6), mode=mode)
    alone = run(patcher)
    both = run(apply(model, (ours, 0.6), (hooked, 0.5), mode="patch"))
    hooks = comfy.hooks.create_hook_lora(dict(hooked), 0.5, 0)
    target = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
    comfy.model_management.load_models_gpu([patcher])
    patcher.register_all_hook_patches(hooks, target)
    for _ in range(2):
        patcher.patch_hooks(hooks)
        assert near(inside.call(patcher), both)
        patcher.patch_hooks(None)
        assert torch.equal(inside.call(patcher), alone)
    patcher.clean_hooks()
    assert torch.equal(run(model), plain)
    assert unchanged(model, before, attributes=False)  # other tests' bypass may have left bound forwards, which go now


def test_a_row_that_is_switched_off_compiles_nothing_again(models, samples, apply):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    model = models["flux"]
    one, two = ((samples(model, 0, seed=seed), 0.5) for seed in (1, 2))
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    def compiled(*loras):
        patcher = apply(model, *loras, mode="live").clone()
        patcher.add_wrapper_with_key("apply_model", "torch.compile", wrapper)
        patcher.model_options["torch_compile_kwargs"] = {}
        return patcher

    whole = model.clone()
    # Once: a second call would make another compiled model. Not the attention: it asks how much memory is free.
    keys = [f"diffusion_model.double_blocks.0.{name}" for name in ("img_mlp", "txt_mlp", "img_attn")]
    set_torch_compile_wrapper(whole, backend=backend, keys=keys)
    (wrapper,) = whole.get_wrappers("apply_model", "torch.compile")
    both = run(compiled(one, two))
    count = len(compilations)
    for rows in ((one,), (one, two), (two,), ((one[0], 0.0), two), ((one[0], -0.3), two)):
        assert near(run(compiled(*rows)), run(apply(model, *(row for row in rows if row[1]), mode="patch")))
        assert torch.equal(run(compiled(one, two)), both)
    assert count >= 1 and len(compilations) == count
    assert torch.equal(run(apply(model, one, mode="live")), run(apply(model.clone(), one, mode="live")))


def test_a_changed_strength_touches_no_weight_and_takes_under_a_millisecond(models, samples, apply):
    import comfy.model_management

    model = models["sd15"]
    tensors = samples(model, 0, seed=1)
    first, second = (apply(model, (tensors, strength), mode="live") for strength in (0.5, 0.9))
    run(first)
    places = {key: tensor.data_ptr() for key, tensor in model.model.state_dict().items()}
    hooks = model.model.diffusion_model.middle_block[1].proj_in.forward.__self__.hook
    comfy.model_management.load_models_gpu([second])
    assert {key: tensor.data_ptr() for key, tensor in model.model.state_dict().items()} == places
    assert model.model.diffusion_model.middle_block[1].proj_in.forward.__self__.hook is hooks
    assert near(run(second), run(apply(model, (tensors, 0.9), mode="patch")))
    (injection,) = second.injections["lora_ops_live"]
    second.eject_model()
    times = []
    for _ in range(100):  # the least of many: the machine may be busy
        start = time.perf_counter()
        injection.inject(second)
        times.append(time.perf_counter() - start)
        injection.eject(second)
    assert min(times) < 1e-3


def test_a_forgotten_clone_takes_nothing_from_the_one_in_use(models, samples, apply):
    model = models["flux"]
    tensors = samples(model, 0, seed=1)
    first = apply(model, (tensors, 0.5), mode="live")
    run(first)
    second = apply(model, (tensors, 0.9), mode="live")
    expected = run(second)
    stray = second.clone()
    del first, stray
    gc.collect()
    assert torch.equal(run(second), expected)


def test_a_chain_grows_while_its_beginning_runs(models, samples, apply):
    """Between prompts the first node's model stays loaded, and the host's clones of it say that they are injected."""
    from tests.host.test_patching import host_apply

    model = models["flux"]
    tensors = [samples(model, 0, seed=seed) for seed in (1, 2, 3)]
    plain = run(model)
    truth = run(apply(model, *((each, 0.4) for each in tensors), mode="patch"))
    for third in ("live", "patch", "host"):
        first = apply(model, (tensors[0], 0.4), mode="live")
        alone = run(first)
        second = apply(first, (tensors[1], 0.4), mode="live")
        last = host_apply(second, tensors[2], 0.4) if third == "host" else apply(second, (tensors[2], 0.4), mode=third)
        assert near(run(last), truth), third
        assert torch.equal(run(first), alone) and torch.equal(run(model), plain), third
        assert near(run(last), truth), third
        del first, second, last
        gc.collect()
        assert torch.equal(run(model), plain), third


def test_a_clone_with_a_copy_of_the_model_runs_its_own_hooks(models, samples, apply):
    """The host swaps models under a patcher: for torch.compile, for several GPUs, for hooks."""
    model, other = models["flux"], inside.model("flux")
    live = apply(model, (samples(model, 0, seed=1), 0.8), mode="live")
    expected, plain = run(live), run(model)
    elsewhere = live.clone(model_override=other.get_clone_model_override())
    assert elsewhere.model is other.model
    assert torch.equal(run(elsewhere), expected) and torch.equal(run(model), plain)
    assert torch.equal(run(other), plain)


def test_loras_that_share_a_factor_are_told_apart(models, samples, apply):
    model = models["flux"]
    tensors = samples(model, 0, seed=1)
    opposite = {key: -tensor if "lora_up" in key else tensor for key, tensor in tensors.items()}
    run(apply(model, (tensors, 0.8), mode="live"))
    live, patched = (run(apply(model, (opposite, 0.8), mode=mode)) for mode in ("live", "patch"))
    assert near(live, patched)


def test_a_clone_that_dies_takes_nothing_from_the_run_it_was_cloned_for(models, samples, apply):
    import comfy.model_management

    model = models["flux"]
    live = apply(model, (samples(model, 0, seed=1), 0.8), mode="live")
    expected = run(live)
    comfy.model_management.load_models_gpu([live])
    stray = live.clone()
    del stray
    gc.collect()
    live.pre_run()  # what the host calls between loading and sampling
    assert torch.equal(inside.call(live), expected)


def test_whoever_injects_takes_out_what_is_there(models, samples, apply):
    model = models["flux"]
    first, second = (apply(model, (samples(model, 0, seed=seed), 0.8), mode="live") for seed in (1, 2))
    expected, plain = run(second), run(model)
    first.inject_model()
    second.inject_model()
    assert torch.equal(inside.call(model), expected)
    second.eject_model()
    assert torch.equal(inside.call(model), plain)
    first.eject_model()
    assert torch.equal(run(model), plain)


def test_a_merge_after_a_live_lora_is_an_error(models, samples, apply):
    model = models["flux"]
    live = apply(model, (samples(model, 0, seed=1), 0.8), mode="live")
    merged = live.clone()
    merged.add_patches(model.get_key_patches("diffusion_model."), 0.5, 0.5)
    with pytest.raises(Exception, match="merged with another one after a LoRA was put on it live"):
        run(merged)
    merged.detach()
    assert torch.equal(run(model), run(model.clone()))


def test_gradients_pass_after_a_run_in_inference_mode(models, samples, apply):
    """In which the host reads files, too."""
    from harness.inside import patched_weights

    model, name = models["flux"], "diffusion_model.single_blocks.0.linear2.weight"
    layer = model.model.diffusion_model.single_blocks[0].linear2
    with torch.inference_mode():
        read = {key: tensor.clone() for key, tensor in samples(model, 0, seed=1).items()}
        live = apply(model, (read, 0.8), mode="live")
        run(live)
    x = torch.randn(2, layer.in_features, requires_grad=True)
    layer(x).sum().backward()
    assert near(x.grad, patched_weights(apply(model, (read, 0.8)))[name].sum(0).expand(2, -1))
    live.detach()


def test_what_the_hooks_keep_on_the_device_goes_with_the_model(models, samples, apply):
    model = models["flux"]
    live = apply(model, (samples(model, 0, seed=1), 0.8), mode="live")
    run(live)
    hook = model.model.diffusion_model.single_blocks[0].linear2.forward.__self__.hook
    assert hook.terms
    live.detach()
    assert not hook.terms


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_on_an_fp8_base_auto_is_live_and_exact_where_baking_is_not(pack, ours, samples, apply, dtype):
    """The update that reaches the output: live within one percent of the error that baking it into fp8 leaves."""
    model = inside.model("flux", dtype)
    tensors = samples(model, 0, seed=1)
    auto = apply(model, (tensors, 0.5), mode="auto")
    assert auto.get_attachment("lora_ops_live") is not None and not auto.patches
    baked = apply(model, (tensors, 0.5), mode="patch")
    module = "diffusion_model.single_blocks.0.linear2"
    layer = model.model.diffusion_model.single_blocks[0].linear2
    adapter = ours("lora_ops.lora").from_file(ours("lora_ops.files").TensorFile("x", tensors))
    adapter = adapter.modules["lora_unet_single_blocks_0_linear2"]
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(3))
    exact = 0.5 * x.double() @ adapter.delta((layer.out_features, layer.in_features), torch.float64).T
    base = layer(x)

    def error(patcher):
        run(patcher)
        found = layer(x).double() - base.double()
        return float((found - exact).norm() / exact.norm())

    assert module + ".weight" in baked.patches
    assert error(auto) < 0.01 * error(baked)
    auto.detach()


def test_on_a_bf16_base_auto_is_patch_and_every_mode_runs(pack, samples, apply):
    model = inside.model("sd15", torch.bfloat16)
    tensors = samples(model, 0, seed=1)
    plain = inside.run(model)
    auto, patch, live = (inside.run(apply(model, (tensors, 4.0), mode=mode)) for mode in ("auto", "patch", "live"))
    assert torch.equal(auto, patch) and not torch.equal(patch, live)
    # each rounds the same change another way
    assert (patch - live).norm() < 0.3 * (patch - plain).norm()


def test_on_a_float_base_auto_is_patch(models, samples, apply):
    auto = apply(models["sd15"], (samples(models["sd15"]), 1.0), mode="auto")
    assert auto.patches and auto.get_attachment("lora_ops_live") is None


def quantised(algorithm):
    """A small FLUX model of which one Linear is the host's quantised one, and that Linear."""
    import comfy.ops
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    model = inside.model("flux")
    block = model.model.diffusion_model.single_blocks[0]
    plain, operations = block.linear2, comfy.ops.mixed_precision_ops({}, torch.float32)
    layer = operations.Linear(plain.in_features, plain.out_features, device="cpu", dtype=torch.float32)
    weight = QuantizedTensor.from_float(plain.weight.data, QUANT_ALGOS[algorithm]["comfy_tensor_layout"])
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    layer.bias = torch.nn.Parameter(plain.bias.data, requires_grad=False)
    layer.quant_format = algorithm
    block.linear2 = layer
    return model, layer


@pytest.mark.parametrize("algorithm", ["float8_e4m3fn", "nvfp4"])
def test_on_a_quantised_linear_auto_runs_live_whatever_shape_it_is_stored_in(pack, ours, samples, apply, algorithm):
    model, layer = quantised(algorithm)
    tensors = {key: t for key, t in samples(model, 0, seed=1).items() if "single_blocks_0_linear2" in key}
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        base = layer(x)
        live = apply(model, (tensors, 0.5), mode="auto")
        assert live.get_attachment("lora_ops_live") is not None and not live.patches
        live.inject_model()
        found = layer(x).double() - base.double()
        live.eject_model()
        assert torch.equal(layer(x), base)
    adapter = ours("lora_ops.lora").from_file(ours("lora_ops.files").TensorFile("x", tensors))
    adapter = adapter.modules["lora_unet_single_blocks_0_linear2"]
    exact = 0.5 * x.double() @ adapter.delta((layer.out_features, layer.in_features), torch.float64).T
    assert (found - exact).norm() <= 1e-4 * exact.norm()  # a difference of float32 outputs
