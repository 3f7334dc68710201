"""Merge and unload on the host: a model of its own that computes what the patched one computes, and nothing else."""

from __future__ import annotations

import gc
import weakref
from types import FunctionType, ModuleType

import pytest
import torch

from harness import inside
from harness.inside import CPU, patched_weights, run
from tests.host.test_live import bypass, each_family, footprint, near, unchanged
from tests.host.test_patching import host_apply


@pytest.fixture
def merge(ours, monkeypatch):
    """merge(model, (tensors, strength), …): our node's result, with what is on the model already."""
    stack, landing, merging = ours("lora_ops.stack"), ours("lora_ops.landing"), ours("nodes.host.merging")
    lora, files, patching = ours("lora_ops.lora"), ours("lora_ops.files"), ours("nodes.host.patching")

    def put(model, *loras):
        entries = [
            stack.Entry(lora.from_file(files.TensorFile("test", tensors)), {"model": strength, "clip": strength})
            for tensors, strength in loras
        ]
        with ours("nodes.host.progress").Meter(None, "Merging LoRAs") as progress:
            return merging.merged(landing.land(entries, patching.targets(model, None)), model, None, progress)

    return put


def bare(patcher):
    """Whether nothing is on a patcher but the ledger."""
    there = patcher.patches, patcher.injections, patcher.wrappers, patcher.callbacks, patcher.object_patches
    return not any(there) and list(patcher.attachments) == ["lora_ops_ledger"]


@each_family
def test_the_merged_weights_are_the_patched_ones_bit_for_bit_and_the_rest_is_shared(model, samples, apply, merge, ours):
    plain, before = run(model), footprint(model)
    loras = [(samples(model, number, seed=seed), strength) for number, seed, strength in ((0, 1, 0.8), (2, 2, -0.4))]
    patched = apply(model, *loras, mode="patch")
    wanted, output = patched_weights(patched), run(patched)
    result = merge(model, *loras).model
    found, base = dict(result.model.named_parameters()), dict(model.model.named_parameters())
    assert found.keys() == base.keys() and bare(result) and wanted
    for key, weight in found.items():
        assert weight is not base[key]
        assert torch.equal(weight, wanted.get(key, before[1][key]))
        assert (weight.data_ptr() == base[key].data_ptr()) == (key not in wanted)
    assert torch.equal(run(result), output)
    assert [record.how for record in ours("nodes.host.ledger").records(result)] == ["merged"] * 2
    assert torch.equal(run(model), plain) and unchanged(model, before)
    assert torch.equal(run(result), output)


@each_family
def test_a_merged_step_has_the_modules_and_attributes_of_the_base(model, samples, merge):
    run(model)
    before = footprint(model)[0]  # loaded
    result = merge(model, (samples(model, 0, seed=1), 0.8)).model
    run(result)
    assert footprint(result)[0] == before
    mine, theirs = dict(result.model.named_modules()), dict(model.model.named_modules())
    assert [type(each) for each in mine.values()] == [type(each) for each in theirs.values()]
    assert not set(map(id, mine.values())) & set(map(id, theirs.values()))
    assert not reachable(result.model) & set(map(id, theirs.values()))


def reachable(root):
    """The ids of all that a model refers to, through its values and closures."""
    seen, left = set(), [root]
    while left:
        value = left.pop()
        if id(value) in seen or isinstance(value, type | ModuleType):
            continue
        seen.add(id(value))
        left += gc.get_referents(value) if not isinstance(value, FunctionType) else value.__closure__ or ()
    return seen


@pytest.mark.parametrize("loaded", [False, True])
def test_all_of_ours_on_the_input_is_merged_and_the_input_stays(models, samples, apply, merge, ours, loaded):
    model = models["flux"]
    plain, before = run(model), footprint(model)
    tensors = [samples(model, 0, seed=seed) for seed in range(1, 5)]
    chain = apply(apply(model, (tensors[0], 0.5), mode="patch"), (tensors[1], -0.3), mode="live")
    chain = apply(chain, (tensors[2], 0.2), mode="patch")
    output = run(chain)
    if not loaded:
        run(model)
    result = merge(chain, (tensors[3], 0.4)).model
    wanted = patched_weights(apply(model, *zip([tensors[n] for n in (0, 2, 1, 3)], (0.5, 0.2, -0.3, 0.4), strict=True)))
    found = dict(result.model.named_parameters())
    for key, weight in wanted.items():
        torch.testing.assert_close(found[key].data, weight, rtol=1e-6, atol=1e-6)  # sums in another order
    assert bare(result)
    assert [each.strength for each in ours("nodes.host.ledger").records(result)] == [0.5, -0.3, 0.2, 0.4]
    merged = run(result)
    assert torch.equal(run(chain), output) and torch.equal(run(model), plain) and unchanged(model, before)
    assert torch.equal(run(result), merged) and not near(merged, output, 1e-3)


def test_other_nodes_patches_stay_patches_in_their_order(models, samples, apply, merge):
    model = models["flux"]
    tensors = [samples(model, 0, seed=seed) for seed in range(1, 6)]
    chain, theirs = model, model
    for number, each in enumerate(tensors):
        if number % 2:
            chain = apply(chain, (each, 0.3), mode="patch")
        else:
            chain, theirs = host_apply(chain, each, 0.2), host_apply(theirs, each, 0.2)
    output = run(chain)
    result = merge(chain).model
    assert {key: len(there) for key, there in result.patches.items()} == {k: len(v) for k, v in theirs.patches.items()}
    assert near(run(result), output)
    after = host_apply(merge(apply(model, (tensors[0], 0.3))).model, tensors[1], 0.4)
    assert near(run(after), run(apply(model, (tensors[0], 0.3), (tensors[1], 0.4))))


def test_what_cannot_be_merged_rightly_is_refused_with_a_remedy(models, samples, apply, merge, ours):
    model, error = models["flux"], ours("lora_ops.errors")
    one, two = samples(model, 0, seed=1), samples(model, 0, seed=2)
    halved = model.clone()
    halved.add_patches(model.get_key_patches("diffusion_model."), 0.5, 0.5)
    with pytest.raises(error.TargetError, match="the order of the two matters"):
        merge(apply(halved, (one, 0.5), mode="patch"))
    with pytest.raises(error.TargetError, match="the order of the two matters"):
        merge(apply(halved, (one, 0.5), mode="live"))
    later = apply(model, (one, 0.5), mode="patch").clone()
    later.add_patches(model.get_key_patches("diffusion_model."), 0.5, 0.5)
    assert near(run(merge(later).model), run(later))
    with pytest.raises(error.TargetError, match="the injection 'bypass_lora', which stays with the unmerged model"):
        merge(apply(bypass(model, two, 0.5), (one, 0.5), mode="patch"))
    whole = model.clone()
    whole.add_object_patch("diffusion_model.img_in", model.model.diffusion_model.img_in)
    with pytest.raises(error.TargetError, match=r"another diffusion_model.img_in"):
        merge(whole, (one, 0.5))


def test_while_another_clone_runs_with_hooks_of_others_the_base_is_merged(models, samples, merge, apply):
    model = models["flux"]
    one, two = samples(model, 0, seed=1), samples(model, 0, seed=2)
    wanted = run(apply(model, (one, 0.5), mode="patch"))
    loud = bypass(apply(model, (two, 0.5), mode="live"), two, 0.3)
    output = run(loud)
    assert torch.equal(run(merge(model, (one, 0.5)).model), wanted)
    assert torch.equal(run(loud), output)
    loud.detach()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_coarse_weights_are_rounded_as_the_host_rounds_them_and_the_loss_is_told(pack, samples, apply, merge, dtype):
    model = inside.model("flux", dtype)
    loras = (samples(model, 0, seed=1), 0.7)
    patched = apply(model, loras, mode="patch")
    wanted = patched_weights(patched)
    result = merge(model, loras)
    found = dict(result.model.model.named_parameters())
    assert wanted and all(torch.equal(found[key], weight) and weight.dtype == dtype for key, weight in wanted.items())
    assert result.survival.keys() == wanted.keys()
    assert all((each.cosine < 0.99) == (dtype.itemsize == 1) for each in result.survival.values())


@pytest.mark.parametrize("algorithm", ["float8_e4m3fn", "nvfp4"])
def test_the_hosts_quantised_weights_are_merged_by_its_own_scale_rules(pack, samples, apply, merge, algorithm):
    from tests.host.test_live import quantised

    model, layer = quantised(algorithm)
    layer.layout_type = layer.weight._layout_cls  # as the host's loader has it
    tensors = {key: t for key, t in samples(model, 0, seed=1).items() if "single_blocks_0_linear2" in key}
    patched = apply(model, (tensors, 0.5), mode="patch")
    (wanted,) = patched_weights(patched).values()
    before = layer.weight.dequantize().clone()
    result = merge(model, (tensors, 0.5))
    found = result.model.model.diffusion_model.single_blocks[0].linear2.weight
    assert type(found) is type(layer.weight)
    assert torch.equal(found.dequantize(), wanted.dequantize()) and not torch.equal(found.dequantize(), before)
    assert torch.equal(layer.weight.dequantize(), before)
    (survival,) = result.survival.values()
    assert 0 < survival.cosine < 0.999


def test_hooks_that_the_host_does_not_know_of_stay_on_the_input(models, samples, merge, apply, ours):
    model = models["flux"]
    one, two = samples(model, 0, seed=1), samples(model, 0, seed=2)
    wanted = run(apply(model, (one, 0.5), mode="patch"))
    loud = apply(model, (two, 0.5), mode="live")
    run(model)
    loud.inject_model()
    result = merge(model, (one, 0.5)).model
    loud.eject_model()
    assert torch.equal(run(result), wanted)
    module = model.model.diffusion_model.img_in
    module.forward = lambda x: x
    with pytest.raises(ours("lora_ops.errors").TargetError, match="img_in': runs another node's .*<lambda>"):
        merge(model, (one, 0.5))
    del module.forward


def test_fifty_cycles_leave_the_base_bit_identical_and_dropped_models_free_their_memory(models, samples, merge, apply):
    model = models["flux"]
    plain, before = run(model), footprint(model)
    lora = samples(model, 0, seed=1), 0.5
    first, gone = None, []
    for _ in range(50):
        result = merge(model, lora).model
        output = run(result)
        first = output if first is None else first
        assert torch.equal(output, first)
        gone.append(weakref.ref(result.model))
        run(model)
        del result
    gc.collect()
    import comfy.model_management

    comfy.model_management.cleanup_models()
    assert all(each() is None for each in gone)
    assert torch.equal(run(model), plain) and unchanged(model, before)


def test_where_the_host_loads_a_model_anew_the_merged_one_is_rebuilt(models, samples, merge, apply):
    """For another GPU and without dynamic VRAM: the file alone would be without the LoRAs."""
    model = models["flux"]
    theirs, mine = samples(model, 0, seed=2), samples(model, 0, seed=1)
    result = host_apply(merge(model, (mine, 0.5)).model, theirs, 0.3)
    output = run(result)  # now its weights are patched
    deep = result.clone(force_deepcopy=True)
    elsewhere = result.deepclone_multigpu(new_load_device=CPU)
    base = {weight.data_ptr() for weight in result.model.parameters()}
    for fresh in (deep, elsewhere):
        assert fresh.model is not result.model
        assert not base & {weight.data_ptr() for weight in fresh.model.parameters()}
        assert torch.equal(run(fresh), output)
    assert torch.equal(run(result), output)


def test_merging_can_be_cancelled_and_leaves_the_input_as_it_was(models, samples, merge):
    import comfy.model_management as management

    model = models["flux"]
    plain, before = run(model), footprint(model)
    management.interrupt_current_processing(True)
    try:
        with pytest.raises(management.InterruptProcessingException):
            merge(model, (samples(model, 0, seed=1), 0.5))
    finally:
        management.interrupt_current_processing(False)
    assert torch.equal(run(model), plain) and unchanged(model, before)


def test_a_merge_in_inference_mode_runs_outside_of_it_and_the_other_way(pack, samples, merge, apply):
    """The host loads and runs models there; a copy of weights made there cannot be wrapped outside."""
    with torch.inference_mode():
        model = inside.model("flux")
        lora = samples(model, 0, seed=1), 0.5
    result = merge(model, lora).model
    with torch.inference_mode():
        again = merge(model, lora).model
        assert torch.equal(run(again), run(result))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("strength", [0.05, 0.5, 4.0])
def test_the_survival_that_is_foreseen_is_within_five_percent_of_the_measured(pack, ours, dtype, strength):
    """For rows of very different size, in bands, as trained weights have them; a part of the rows is looked at."""
    storing, adapters = ours("nodes.host.storing"), ours("lora_ops.adapters")
    piece, band = ours("lora_ops.landing").Piece, ours("lora_ops.lora").Band
    generator = torch.Generator().manual_seed(5)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    sizes = torch.exp(0.4 * randn(3072, 1)) * torch.tensor([1.0, 0.5, 2.0]).repeat_interleave(1024)[:, None]
    model = torch.nn.Module()
    model.layer = torch.nn.Linear(512, 3072, device="meta")
    weight = (randn(3072, 512) * sizes / 32).to(dtype)
    model.layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    up, down = randn(3072, 8) * torch.exp(0.4 * randn(3072, 1)) / 50, randn(8, 512) / 32
    pieces = [
        piece(adapters.LowRank(up, down), None, strength),
        piece(adapters.LowRank(up[:512], down.flip(0)), band(512, 512), strength),
    ]
    (found,) = storing.foreseen(model, {"layer.weight": pieces}, ["layer.weight"]).values()
    truth = storing.stored(model, "layer.weight", model.layer.weight, pieces, CPU).survival
    assert found.cosine == pytest.approx(truth.cosine, rel=0.05)
    assert found.norm == pytest.approx(truth.norm, rel=0.05)
    assert found.wanted < truth.wanted / 4  # of a sample


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_what_apply_foresees_on_a_float8_model_is_what_merging_measures(pack, ours, samples, apply, merge, dtype):
    model = inside.model("flux", dtype)
    tensors = samples(model, 0, seed=1)
    stack, landing, patching = ours("lora_ops.stack"), ours("lora_ops.landing"), ours("nodes.host.patching")
    lora = ours("lora_ops.lora").from_file(ours("lora_ops.files").TensorFile("test", tensors))
    landed = landing.land([stack.Entry(lora, {"model": 0.5, "clip": 0.0})], patching.targets(model, None))
    foreseen = patching.applied(landed, "patch", model, None).survival
    truth = merge(model, (tensors, 0.5)).survival
    assert len(foreseen) == 4
    for key, survival in foreseen.items():
        assert survival.cosine == pytest.approx(truth[key].cosine, rel=0.05)
        assert survival.norm == pytest.approx(truth[key].norm, rel=0.05)
    assert not patching.applied(landed, "auto", model, None).survival  # it runs live: nothing is lost
