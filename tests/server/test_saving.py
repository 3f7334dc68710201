"""The saving nodes on a real server: files that paint the same picture, and what goes wrong while saving."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch

from harness import small
from harness.server import WorkflowError
from lora_ops.files import read, read_header, read_tensors
from lora_ops.recipe import Recipe
from tests.server.test_nodes import STACK, node_of, picture, without_loras

BASE = Path(small.FILES["sd15"][0])  # checkpoints/…
ASKED = {
    "filename_prefix": "saved/%CheckpointLoaderSimple.ckpt_name%",
    "layout": "full checkpoint",
    **dict.fromkeys(("dtype_model", "dtype_clip", "dtype_vae"), "keep"),
    "destination": "models",
    "if_exists": "number",
}


def number_of(prompt: dict, kind: str) -> str:
    return next(number for number, node in prompt.items() if node["class_type"] == kind)


def saving(prompt: dict, **inputs) -> dict:
    """The prompt with a Save Checkpoint node of the model as it is sampled."""
    changed = copy.deepcopy(prompt)
    stack, loader = number_of(changed, "LoraOpsStack"), number_of(changed, "CheckpointLoaderSimple")
    wires = {"model": [stack, 0], "clip": [stack, 1], "vae": [loader, 2]}
    return changed | {"save": {"class_type": "LoraOpsSaveCheckpoint", "inputs": ASKED | wires | inputs}}


def only_saving(prompt: dict, **inputs) -> dict:
    """The same without painting a picture."""
    changed = saving(prompt, **inputs)
    for kind in ("SaveImage", "VAEDecode", "KSampler"):
        del changed[number_of(changed, kind)]
    return changed


def told(entry, node: str = "save") -> dict:
    return json.loads(entry["outputs"][node]["lora_ops"][0])


def values(path) -> dict[str, torch.Tensor]:
    header = read_header(path)
    return dict(read_tensors(header, header.entries))


def test_the_saved_checkpoint_paints_the_picture_that_was_sampled(server, example):
    entry = server.post(saving(example(STACK), dtype_model="fp32"))  # as it was sampled; the others are fp16 live, too
    (pixels,) = server.images(entry)
    (file,) = told(entry)["files"]
    assert file["verified"]["ulps"] <= 1 and Path(file["path"]).name == f"{BASE.name}_00001_.safetensors"
    assert entry["outputs"]["save"]["text"][0].startswith("✓")
    bare = without_loras(example(STACK), "LoraOpsStack")
    plain = picture(server, bare)
    node_of(bare, "CheckpointLoaderSimple")["inputs"]["ckpt_name"] = f"saved/{Path(file['path']).name}"
    assert picture(server, bare) == pixels != plain


def test_a_merged_file_holds_what_a_saved_model_holds(server, example):
    """With the model in memory or without: the same recipe, and the same weights but where a product that is computed
    in other blocks of rows falls to the other side of a rounding."""
    stack, base = "<lora:flux/ink_kohya:0.7:0.4>", Path(small.FILES["flux"][0])
    inputs = {
        "base": base.as_posix(),
        "stack": stack,
        "dtype": "keep",
        "filename_prefix": "both/merged",
        "destination": "output",
        "if_exists": "refuse",
        "min_coverage": 1.0,
    }
    prompt = {
        "base": {"class_type": "UNETLoader", "inputs": {"unet_name": base.name, "weight_dtype": "default"}},
        "stack": {
            "class_type": "LoraOpsStack",
            "inputs": {"model": ["base", 0], "stack": stack, "min_coverage": 1.0, "mode": "auto"},
        },
        "save": {
            "class_type": "LoraOpsSaveCheckpoint",
            "inputs": ASKED
            | {"model": ["stack", 0], "layout": "diffusion model", "filename_prefix": "both/live"}
            | {"destination": "output"},
        },
        "merge": {"class_type": "LoraOpsMergeFiles", "inputs": inputs},
    }
    entry = server.post(prompt)
    saved, merged = Path(told(entry)["files"][0]["path"]), Path(told(entry, "merge")["path"])
    assert merged == server.base / "output" / "both" / "merged.safetensors"
    one, other = values(saved), values(merged)
    assert one.keys() == other.keys()
    for key, weight in one.items():
        assert weight.dtype == other[key].dtype and (weight != other[key]).float().mean() < 1e-4, key
        assert torch.allclose(weight.double(), other[key].double(), rtol=torch.finfo(weight.dtype).eps, atol=2**-24), (
            key
        )
    recipes = [Recipe.of_metadata(read_header(path).metadata, path.name) for path in (saved, merged)]
    assert [dict(each.strengths) for each in recipes[0].loras] == [{"model": 0.7}]
    assert recipes[0] == recipes[1] and recipes[0].loras[0].sha256


def test_merging_into_fp8_tells_how_much_of_each_weight_survives(server):
    inputs = {
        "base": BASE.as_posix(),
        "stack": "<lora:ink_kohya:0.1>",
        "dtype": "fp8_e5m2",
        "filename_prefix": "fp8/merged",
        "destination": "output",
        "if_exists": "number",
        "min_coverage": 1.0,
    }
    prompt = {"merge": {"class_type": "LoraOpsMergeFiles", "inputs": inputs}}
    prompt["receipt"] = {"class_type": "PreviewAny", "inputs": {"source": ["merge", 1]}}
    outputs = server.post(prompt)["outputs"]
    receipt = json.loads(outputs["receipt"]["text"][0])
    assert receipt["survival"]["little"] and len(receipt["survival_by_weight"]) == receipt["weights"]
    assert "or bf16" in outputs["merge"]["text"][0]


def test_a_base_is_found_by_its_name_and_a_missing_one_is_refused(server):
    def refusal(**inputs):
        asked = {
            "base": f"checkpoints\\{BASE.name}",
            "stack": "",
            "dtype": "keep",
            "filename_prefix": "x",
            "destination": "output",
            "if_exists": "refuse",
            "min_coverage": 1.0,
            **inputs,
        }
        with pytest.raises(WorkflowError) as refused:
            server.post({"merge": {"class_type": "LoraOpsMergeFiles", "inputs": asked}})
        return str(refused.value)

    assert "Did you mean" in refusal(base="checkpoints/v1-5-pruned.safetensors")
    assert "is not in models/loras" in refusal(stack="<lora:nobody:1>")
    scheduled = '{"version":1,"rows":[{"lora":"ink_kohya","start":0.2}]}'
    assert "no weight can hold" in refusal(stack=scheduled)
    assert "no name inside the folder" in refusal(filename_prefix="../x")


@pytest.mark.parametrize("layout", ["kohya", "comfy", "diffusers", "peft", "lycoris"])
def test_a_lora_is_saved_with_its_words_in_any_layout(server, layout):
    inputs = {
        "lora": ["load", 0],
        "model": ["base", 0],
        "clip": ["base", 1],
        "filename_prefix": f"loras/{layout}",
        "layout": layout,
        "dtype": "keep",
        "trigger_words": " ink, wash ",
        "destination": "output",
        "if_exists": "number",
    }
    prompt = {
        "base": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": BASE.name}},
        "load": {"class_type": "LoraOpsLoad", "inputs": {"lora_name": "ink_kohya.safetensors"}},
        "save": {"class_type": "LoraOpsSaveLora", "inputs": inputs},
    }
    if layout == "peft":
        with pytest.raises(WorkflowError, match="a PEFT folder is for one"):
            server.post(prompt)
        return
    found = told(server.post(prompt))
    file = read(found["path"])
    assert Path(found["path"]).name == f"{layout}_00001_.safetensors"
    assert file.metadata["modelspec.trigger_phrase"] == "ink, wash" and found["modules"] > 10
    assert "prompt" not in file.metadata  # --disable-metadata


@pytest.fixture
def mounted(server):
    """mounted(size, mode): a small or read-only file system within the output folder, by the name of its folder."""
    folder = server.base / "output" / "disk"
    folder.mkdir(exist_ok=True)

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting is not permitted here")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True)


@pytest.mark.parametrize(("options", "words"), [("size=8m", "the disk has"), ("ro", "Read-only file system")])
def test_a_disk_without_room_or_right_is_told_and_left_as_it_was(options, words, server, example, mounted):
    folder = mounted(options)
    prompt = only_saving(
        example(STACK), filename_prefix="disk/x", destination="output", layout="diffusion model", dtype_model="fp32"
    )
    with pytest.raises(WorkflowError, match=words):
        server.post(prompt)
    assert os.listdir(folder) == []


def test_cancelling_ends_within_a_second_and_leaves_nothing(server, example):
    folder = server.base / "output" / "cancelled"
    failed = []

    def post():
        try:
            server.post(only_saving(example(STACK), filename_prefix="cancelled/x", destination="output"))
        except WorkflowError as error:
            failed.append((str(error), time.monotonic()))

    thread = threading.Thread(target=post)
    thread.start()
    while thread.is_alive() and not (folder.exists() and os.listdir(folder)):
        time.sleep(0.01)
    asked = time.monotonic()
    server.request("/interrupt", {})
    thread.join()
    ((text, ended),) = failed
    assert "interrupted" in text and ended - asked < 30  # half a second on a machine that does nothing else
    assert os.listdir(folder) == []
