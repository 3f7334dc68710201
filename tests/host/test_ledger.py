"""The ledger: what our nodes have put on a model, told in order, and taken off again."""

from __future__ import annotations

import json

import pytest
import torch

from harness.inside import run
from tests.host.test_live import bypass, each_family, footprint, unchanged
from tests.host.test_patching import host_apply


def told(ours, patcher):
    return [(each.name, each.strength, each.how) for each in ours("nodes.host.ledger").records(patcher)]


def test_the_ledger_tells_every_lora_in_order_and_earlier_clones_keep_theirs(models, samples, apply, ours):
    model = models["flux"]
    one, two, three = (samples(model, 0, seed=seed) for seed in (1, 2, 3))
    first = apply(model, (one, 0.5), (two, 0.0), mode="patch")
    second = apply(host_apply(first, two, 0.3), (two, -0.4), (three, 0.2), mode="live")
    assert told(ours, model) == []
    assert told(ours, first) == [("test", 0.5, "patch")]
    assert told(ours, second.clone()) == [("test", 0.5, "patch"), ("test", -0.4, "live"), ("test", 0.2, "live")]
    found = ours("nodes.host.ledger").records(second)
    assert len({each.row for each in found}) == 3
    factors = {key: tensor for key, tensor in one.items() if not key.endswith(".alpha")}
    assert found[0].weights == len(first.patches) and found[0].bytes == sum(t.nbytes for t in factors.values())
    assert found[0].file is None and found[0].sha256() == ""  # it came from no file


def test_a_lora_of_a_file_is_told_with_the_hash_of_its_tensors(models, ours, loras):
    ledger, patching = ours("nodes.host.ledger"), ours("nodes.host.patching")
    path = loras / "style" / "ink.safetensors"
    lora = ours("nodes.host.caches").load("style/ink.safetensors", str(path)).lora
    blocks = ours("lora_ops.select").parse_selectors("middle_block=0.5")
    entry = ours("lora_ops.stack").Entry(lora, {"model": 0.5, "clip": 0.7}, blocks=blocks)
    landed = ours("lora_ops.landing").land([entry], patching.targets(models["sd15"], None))
    (record,) = ledger.records(patching.applied(landed, "patch", models["sd15"], None).model)
    assert (record.name, record.part, record.strength) == ("style/ink.safetensors", "model", 0.5)
    assert record.blocks == "middle_block=0.5"
    assert record.sha256() == ours("lora_ops.files").tensor_hash(path) == record.known_hash
    path.unlink()
    assert record.sha256() == record.known_hash


def unload(ours, patcher, which="all"):
    class Hidden:
        class dynprompt:
            all_node_ids = staticmethod(list)

    node = ours("nodes.inspecting").LoraOpsUnload
    return type("Run", (node,), {"hidden": Hidden}).execute(patcher, which).result[0]


def report(ours, patcher):
    return json.loads(ours("nodes.inspecting").LoraOpsPatches.execute(patcher).result[0])["model"]


@each_family
def test_after_any_chain_and_a_run_unloading_leaves_the_fresh_model(model, samples, apply, ours):
    plain, before = run(model), footprint(model)
    tensors = [samples(model, 0, seed=seed) for seed in range(1, 4)]
    for modes in (("patch", "live", "patch"), ("live", "patch", "live")):
        chain = model
        for each, mode in zip(tensors, modes, strict=True):
            chain = apply(chain, (each, 0.4), mode=mode)
        assert not torch.equal(run(chain), plain)
        bare = unload(ours, chain)
        assert torch.equal(run(bare), plain) and unchanged(model, before)
        assert not (bare.patches or bare.injections or bare.attachments or bare.wrappers or bare.callbacks)
        assert not torch.equal(run(chain), plain)
        assert unload(ours, bare) is bare
    run(model)


def test_others_patches_stay_in_place_and_order(models, samples, apply, ours):
    model = models["flux"]
    tensors = [samples(model, 0, seed=seed) for seed in range(1, 5)]
    theirs, mixed = model, model
    for number, each in enumerate(tensors):
        if number % 2:
            theirs, mixed = host_apply(theirs, each, 0.3), host_apply(mixed, each, 0.3)
        else:
            mixed = apply(mixed, (each, 0.3), mode="patch")
    mixed = apply(bypass(mixed, tensors[0], 0.1), (tensors[2], 0.2), mode="live")
    expected = run(bypass(theirs, tensors[0], 0.1))
    run(mixed)
    assert torch.equal(run(unload(ours, mixed)), expected)
    run(mixed).sum()
    mixed.detach()


def test_one_lora_of_a_chain_goes_as_if_it_had_never_been_there(models, samples, apply, ours):
    """Also between others whose change depends on the weight they find: what remains is computed in its order."""
    stack, landing = ours("lora_ops.stack"), ours("lora_ops.landing")
    lora, files = ours("lora_ops.lora"), ours("lora_ops.files")
    patching, model = ours("nodes.host.patching"), models["flux"]

    def entry(name, seed, dora):
        tensors = samples(model, 0, seed=seed)
        if dora:
            for key in [key for key in tensors if key.endswith(".lora_up.weight")]:
                tensors[key.replace(".lora_up.weight", ".dora_scale")] = torch.full((len(tensors[key]), 1), 1.3)
        return stack.Entry(lora.from_file(files.TensorFile(name, tensors)), {"model": 0.5, "clip": 0.5})

    entries = [entry(name, seed, name in "ac") for seed, name in enumerate("abcde", 1)]

    def put(chain, some, mode):
        if not some:
            return chain
        return patching.applied(landing.land(some, patching.targets(model, None)), mode, chain, None).model

    whole = put(put(put(model, entries[:1], "patch"), entries[1:3], "patch"), entries[3:], "live")
    for gone, left in (("b", "acde"), ("c\na", "bde"), ("d", "abce"), ("e\nd", "abc"), ("a\nd", "bce")):
        kept = [each for each in entries if each.lora.name in left]
        wanted = put(model, [each for each in kept if each.lora.name in "abc"], "patch")
        wanted = put(wanted, [each for each in kept if each.lora.name in "de"], "live")
        found = unload(ours, whole, gone)
        assert "".join(name for name, _, _ in told(ours, found)) == left
        assert torch.equal(run(found), run(wanted)), gone


def test_a_name_that_is_not_there_is_an_error_that_lists_what_is(models, samples, apply, ours):
    chain = apply(models["flux"], (samples(models["flux"], 0, seed=1), 0.5), mode="patch")
    error = ours("lora_ops.errors").StackError
    with pytest.raises(error, match=r"'ink' is not on this model. There are: test."):
        unload(ours, chain, "test\nink")
    with pytest.raises(error, match="No LoRA is named"):
        unload(ours, chain, " \n")
    with pytest.raises(error, match="No LoRA of LoRA Ops is on it"):
        unload(ours, models["flux"], "test")


def test_the_report_tells_everything_on_a_model_in_order(models, samples, apply, ours):
    model = models["flux"]
    tensors = [samples(model, 0, seed=seed) for seed in range(1, 5)]
    chain = apply(host_apply(model, tensors[0], 0.3), (tensors[1], 0.4), mode="patch")
    chain = host_apply(host_apply(chain, tensors[2], 0.3), tensors[3], 0.3).clone()
    chain.add_patches(model.get_key_patches("diffusion_model."), 0.25, 0.75)
    chain = bypass(apply(chain, (tensors[2], -1.0), mode="live"), tensors[0], 0.1)
    chain.add_object_patch("model_sampling", object())
    found = report(ours, chain)
    ours_and_theirs = [(each["source"], each["strength"], each["ours"]) for each in found["patches"]]
    core = ("LoRAAdapter (core LoRA)", 0.3, False)
    merge = ("model merge", 0.25, False)
    assert [each for each in ours_and_theirs if each[0] != "test"] == [core, core, core, merge]
    assert ours_and_theirs.index(("test", 0.4, True)) == 1
    assert ("test", -1.0, True) in ours_and_theirs
    assert all(each["weights"] > 10 and each["bytes"] > 0 for each in found["patches"])
    assert found["others"]["injections"] == ["bypass_lora"]
    assert found["others"]["object patches"] == ["model_sampling (object)"]
    assert report(ours, model) == {"patches": [], "others": {}}
