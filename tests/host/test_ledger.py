"""The ledger: what our nodes have put on a model, told in order, and taken off again."""

from __future__ import annotations

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
