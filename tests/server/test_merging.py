"""Merge, Unload and Show Patches through a real server: the pictures and what is told."""

from __future__ import annotations

import copy
import json

import pytest

from harness.server import WorkflowError
from tests.server.test_nodes import FLUX, STACK, node_of, picture, receipts, stacked, without_loras


def behind(prompt: dict, kind: str, node: dict) -> dict:
    """The workflow with another node behind the one of a kind: whoever took its MODEL and CLIP takes the other's."""
    changed = copy.deepcopy(prompt)
    name = next(name for name, each in changed.items() if each["class_type"] == kind)
    for each in changed.values():
        for key, value in each["inputs"].items():
            if isinstance(value, list) and value[0] == name and value[1] < 2:
                each["inputs"][key] = ["80", value[1]]
    changed["80"] = copy.deepcopy(node)
    changed["80"]["inputs"] |= {"model": [name, 0], "clip": [name, 1]}
    return changed


MERGE = {"class_type": "LoraOpsMerge", "inputs": {"strength_model": 1.0, "strength_clip": 1.0, "min_coverage": 0.9}}
UNLOAD = {"class_type": "LoraOpsUnload", "inputs": {"which": "all"}}


@pytest.fixture(scope="module")
def sd15(example):
    return example(STACK)


def test_a_merged_picture_is_the_patched_one_and_unloaded_it_is_the_bare_one(server, sd15):
    patched = stacked(sd15, "<lora:ink_kohya:0.8:0.6>\n<lora:ink_peft:-0.3>")
    bare = picture(server, without_loras(sd15, "LoraOpsStack"))
    wanted = picture(server, patched)
    entry = server.post(behind(patched, "LoraOpsStack", MERGE))
    assert server.images(entry) == [wanted] != [bare]
    (told,) = [found for found in receipts(entry) if "before" in found]
    assert told["mode"] == {"clip": "merged", "model": "merged"} and told["weights"] > 50
    assert [each[1:] for each in told["before"]] == [["model", 0.8], ["model", -0.3], ["clip", 0.6], ["clip", -0.3]]
    assert picture(server, behind(patched, "LoraOpsStack", UNLOAD)) == bare
    assert picture(server, patched) == wanted
    assert picture(server, without_loras(sd15, "LoraOpsStack")) == bare


def test_rows_and_a_lora_are_merged_as_a_stack_would_patch_them(server, sd15):
    wanted = picture(server, stacked(sd15, "<lora:ink_peft:0.4>\n<lora:ink_kohya:0.5>"))
    prompt = behind(stacked(sd15, ""), "LoraOpsStack", MERGE)
    rows = {"stack": "<lora:ink_peft:0.8>", "min_coverage": 0.9, "mode": "auto"}
    prompt["81"] = {"class_type": "LoraOpsStack", "inputs": rows}
    prompt["82"] = {"class_type": "LoraOpsLoad", "inputs": {"lora_name": "ink_kohya.safetensors"}}
    prompt["80"]["inputs"] |= {"lora_stack": ["81", 2], "lora": ["82", 0], "strength_model": 0.5, "strength_clip": 0.5}
    assert picture(server, prompt) == wanted
    nothing = behind(stacked(sd15, ""), "LoraOpsStack", MERGE)
    with pytest.raises(WorkflowError, match="There is nothing to merge"):
        server.post(nothing)


def test_a_schedule_is_not_merged_and_the_message_says_how_to_go_on(server, sd15):
    text = json.dumps({"version": 1, "rows": [{"lora": "ink_kohya", "end": 0.5}]})
    with pytest.raises(WorkflowError, match="follows a schedule, which weights cannot. Unload it first"):
        server.post(behind(stacked(sd15, text), "LoraOpsStack", MERGE))


def test_the_report_names_the_files_and_core_in_order(server, sd15):
    prompt = stacked(sd15, "<lora:ink_kohya:0.8:0.6>")
    stack = next(name for name, node in prompt.items() if node["class_type"] == "LoraOpsStack")
    core = {"model": [stack, 0], "clip": [stack, 1], "lora_name": "ink_kohya.safetensors"}
    prompt["83"] = {"class_type": "LoraLoader", "inputs": {**core, "strength_model": 0.5, "strength_clip": 0.25}}
    prompt["84"] = {"class_type": "LoraOpsPatches", "inputs": {"model": ["83", 0], "clip": ["83", 1]}}
    outputs = server.post(prompt)["outputs"]["84"]
    found = json.loads(outputs["lora_ops"][0])
    strengths = {part: [each["strength"] for each in found[part]["patches"]] for part in ("model", "clip")}
    assert strengths == {"model": [0.8, 0.5], "clip": [0.6, 0.25]}
    assert found["model"]["patches"][0]["source"] == "ink_kohya.safetensors"
    assert outputs["text"][0].startswith("model: 2 patches\n 1. ink_kohya.safetensors: strength 0.8, patch\n")


@pytest.mark.parametrize("stored", ["fp8_e4m3fn", "fp8_e5m2"])
def test_on_an_fp8_model_apply_warns_and_merge_measures(server, example, stored):
    prompt = example(FLUX)
    node_of(prompt, "UNETLoader")["inputs"]["weight_dtype"] = stored
    node_of(prompt, "LoraOpsApply")["inputs"] |= {"mode": "patch", "strength_model": 0.2}
    patched = server.post(prompt)
    foreseen = next(found["survival"] for found in receipts(patched) if "rows" in found)
    entry = server.post(behind(prompt, "LoraOpsApply", MERGE))
    measured = next(found["survival"] for found in receipts(entry) if "before" in found)
    assert server.images(entry) == server.images(patched)
    assert foreseen["predicted"] and foreseen["little"] and foreseen["layers"] == 4
    assert not measured["predicted"] and measured["little"] and measured["layers"] > 10
    text = next(
        output["text"][0]
        for output in patched["outputs"].values()
        if "lora_ops" in output and "survives" in output["text"][0]
    )
    assert "Use mode live, or bf16." in text
