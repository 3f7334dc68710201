"""Selectors on the host: in patch and live mode, and multiplied into tensors for whoever applies them."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from harness.inside import FAMILIES, patched_weights, run
from harness.server import WorkflowError
from tests.host.test_live import footprint, near, unchanged
from tests.host.test_patching import host_apply
from tests.server.test_nodes import FLUX, STACK, node_of, picture, receipts, stacked

UNET = "role:cross-attn=0.3, input_blocks.0-4=-2, middle_block=0"
BLOCKS = {"sd15": UNET, "sdxl": UNET, "flux": "role:mlp=0.3, *.attn.to_k=0"}
each_family = pytest.mark.parametrize("model", FAMILIES, indirect=True)


@pytest.fixture
def put(ours):
    """put(model, tensors, strength, blocks, mode): a stack's row with blocks on a clone."""
    select, landing, patching = ours("lora_ops.select"), ours("lora_ops.landing"), ours("nodes.host.patching")
    files, lora, stack = ours("lora_ops.files"), ours("lora_ops.lora"), ours("lora_ops.stack")

    parsed = {}  # as the pack's cache has it: the same file is the same Lora

    def put(model, tensors, strength, blocks, mode="patch"):
        if id(tensors) not in parsed:
            parsed[id(tensors)] = tensors, lora.from_file(files.TensorFile("test", tensors))
        strengths = {"model": strength, "clip": strength}
        entry = stack.Entry(parsed[id(tensors)][1], strengths, blocks=select.parse_selectors(blocks))
        return patching.applied(landing.land([entry], patching.targets(model, None)), mode, model, None).model

    return put


@pytest.fixture
def scale(ours):
    """scale(tensors, strength, blocks, model): what Scale LoRA puts out for them."""
    node = ours("nodes.scaling").LoraOpsScale
    return lambda *arguments: node.execute(*arguments).args[0]


@pytest.fixture
def blocks(request):
    return BLOCKS.get(request.node.callspec.params["model"], "role:attn=-2, role:mlp=0.3")


@each_family
@pytest.mark.parametrize("number", [0, 2])
def test_blocks_act_alike_patched_and_live(model, samples, put, blocks, number):
    """kohya names whole weights, diffusers bands of them; both are cut alike."""
    tensors = samples(model, number, seed=1)
    plain, before = run(model), footprint(model)
    patched = run(put(model, tensors, 0.8, blocks))
    live = run(put(model, tensors, 0.8, blocks, "live"))
    whole = run(put(model, tensors, 0.8, ""))
    assert near(live, patched) and not near(patched, plain, 1e-3) and not near(patched, whole, 1e-3)
    assert torch.equal(run(model), plain) and unchanged(model, before)


@each_family
def test_live_hooks_know_one_choice_of_blocks_from_another(model, samples, put, blocks):
    tensors = samples(model, 0, seed=1)
    texts = (blocks, blocks.replace("=0.3", "=0.6"), "")
    clones = [put(model, tensors, 0.8, text, "live") for text in texts]
    expected = [run(put(model, tensors, 0.8, text)) for text in texts]
    for _ in range(2):
        for clone, right in zip(clones, expected, strict=True):
            assert near(run(clone), right)


@each_family
def test_blocks_of_factor_one_are_bit_identical_to_none(model, samples, put):
    tensors = samples(model, 0, seed=1)
    plain, ones = (patched_weights(put(model, tensors, 0.7, text)) for text in ("", "*=1, role:attn=1"))
    assert plain.keys() == ones.keys() and all(torch.equal(plain[key], ones[key]) for key in plain)


@each_family
@pytest.mark.parametrize("connected", [True, False])
def test_a_scaled_lora_is_the_same_in_our_nodes_and_in_the_hosts(model, samples, put, scale, blocks, connected):
    tensors = samples(model, 0, seed=1)
    if not connected:  # published models are larger: their rows are not these
        blocks = blocks.replace("*.attn.to_k", "double_blocks").replace("role:mlp", "double_blocks.*.img_mlp")
    wire = scale(tensors, 0.8, blocks, model if connected else None)
    expected = patched_weights(put(model, tensors, 0.8, blocks))
    mine, theirs = patched_weights(put(model, wire, 1.0, "")), patched_weights(host_apply(model, wire, 1.0))
    base = model.model.state_dict()
    assert {key for key in mine if not torch.equal(mine[key], base[key])} == expected.keys()
    for key, weight in expected.items():
        assert near(mine[key], weight, 1e-6) and near(theirs[key], weight, 1e-6), key


@pytest.mark.parametrize("blocks", ["", "*=1"])
def test_a_factor_of_one_passes_the_very_lora_on(ours, models, samples, scale, blocks):
    files, lora, sockets = ours("lora_ops.files"), ours("lora_ops.lora"), ours("nodes.sockets")
    tensors = samples(models["sd15"], 2) | {"stray": torch.ones(1)}
    file = files.TensorFile("ink", tensors)
    for wire in (sockets.LoraModel(file, lora.from_file(file)), tensors):
        assert scale(wire, 1.0, blocks, models["sd15"]) is wire


def test_blocks_that_touch_nothing_are_marked(ours, models, samples):
    node = ours("nodes.scaling").LoraOpsScale
    for blocks, mark in (("role:text=0.5", "!"), ("*=0.5", "✓")):
        shown = node.execute(samples(models["sd15"], 2), 1.0, blocks, models["sd15"]).ui
        assert shown["text"][0].startswith(f"{mark} ")


def test_scaling_keeps_what_a_lora_model_says_of_itself(ours, models, samples, scale):
    files, lora, sockets = ours("lora_ops.files"), ours("lora_ops.lora"), ours("nodes.sockets")
    tensors = {key: t for key, t in samples(models["sd15"], 2).items()}
    file = files.TensorFile("ink", tensors, {"modelspec.trigger_phrase": "ink wash"})
    wire = sockets.LoraModel(file, lora.from_file(file))
    found = scale(wire, 0.5, "", None)
    assert sockets.lora_of(found).metadata == file.metadata and sockets.lora_of(found).name == "ink"
    assert found.keys() == wire.keys() and all(torch.equal(wire[key], tensors[key]) for key in tensors)


@pytest.fixture(scope="module")
def sd15(example):
    return example(STACK)


def with_blocks(prompt: dict, blocks: str) -> dict:
    return stacked(prompt, json.dumps({"version": 1, "rows": [{"lora": "ink_kohya", "blocks": blocks}]}))


def test_a_row_with_blocks_makes_its_own_picture_and_says_so(server, sd15):
    whole, ones = (picture(server, with_blocks(sd15, text)) for text in ("", "*=1"))
    entry = server.post(with_blocks(sd15, "role:text=0, role:mlp=0.5, middle_block=0"))
    (found,) = [told for told in receipts(entry) if "rows" in told]
    counts = found["rows"][0]["blocks"]
    assert list(counts) == ["role:text=0", "role:mlp=0.5", "middle_block=0"] and all(counts.values())
    assert whole == ones and server.images(entry) != [whole]


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        ("double_blocks.0-9=0", "'double_blocks.0-9=0' chooses nothing in the model .Stable Diffusion 1.5"),
        ("role:atn=0", "'atn' is no role"),
    ],
)
def test_blocks_that_mean_nothing_stop_the_prompt(server, sd15, blocks, words):
    with pytest.raises(WorkflowError, match=words):
        server.post(with_blocks(sd15, blocks))


def test_a_row_with_blocks_is_not_lost_on_a_lora_stack_wire(server, sd15):
    prompt = with_blocks(sd15, "role:mlp=0.5")
    name = next(name for name, node in prompt.items() if node["class_type"] == "LoraOpsStack")
    prompt["91"] = {"class_type": "LoraOpsTriggerWords", "inputs": {"lora_stack": [name, 2]}}
    prompt["92"] = {"class_type": "PreviewAny", "inputs": {"source": ["91", 0]}}
    with pytest.raises(WorkflowError, match="has blocks, which LORA_STACK cannot carry"):
        server.post(prompt)


def test_scale_lora_between_load_and_apply(server, example):
    prompt = example(FLUX)
    apply = node_of(prompt, "LoraOpsApply")["inputs"]
    apply |= {"strength_model": 1.0, "strength_clip": 0.0}

    def scaled(strength: float, blocks: str) -> bytes:
        changed = copy.deepcopy(prompt)
        inputs = {"lora": apply["lora"], "strength": strength, "blocks": blocks, "model": apply["model"]}
        changed["90"] = {"class_type": "LoraOpsScale", "inputs": inputs}
        node_of(changed, "LoraOpsApply")["inputs"]["lora"] = ["90", 0]
        return picture(server, changed)

    plain = picture(server, prompt)
    assert scaled(1.0, "") == plain == scaled(2.0, "*=0.5")
    assert len({plain, scaled(0.5, ""), scaled(1.0, "role:mlp=0")}) == 3
