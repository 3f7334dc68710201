"""Training through a real server: a folder of pictures to a LoRA, a model with it, samples, a plot and files."""

from __future__ import annotations

import copy
import json

import pytest
from PIL import Image
from safetensors import safe_open

CHOICES = {
    "targets": "attention",
    "adapter": "lora",
    "adapter.initial": "gaussian",
    "optimizer": "adamw",
    "optimizer.weight_decay": 0.01,
    "optimizer.lora_plus": 1.0,
    "schedule": "constant",
    "schedule.warmup": 0,
    "objective": "auto",
    "loss": "mse",
    "timesteps": "auto",
    "text_encoder": "off",
    "resume": "auto",
}
NUMBERS = {"steps": 4, "batch": 1, "accumulation": 1, "learning_rate": 0.01, "rank": 4, "alpha": 4.0, "seed": 0}
SAMPLES = {"sample_prompts": "a red square --n blue", "sample_every": 2, "sample_steps": 2, "save_every": 2}


@pytest.fixture(scope="module")
def folder(server):
    """Pictures with captions in the server's input folder."""
    there = server.base / "input" / "squares"
    there.mkdir()
    for number, colour in enumerate(("red", "blue", "green")):
        Image.new("RGB", (64, 64), colour).save(there / f"{number}.png")
        (there / f"{number}.txt").write_text(f"a {colour} square")
    return there.name


@pytest.fixture
def prompt(server, folder):
    """Loader, data set and training, and what becomes of its outputs."""
    info = server.object_info()["LoraOpsDataset"]["input"]
    dataset = {
        name: spec[1]["default"] for name, spec in (info["required"] | info["optional"]).items() if "default" in spec[1]
    }
    dataset |= {"folder": folder, "resolution": "64", "vae": ["base", 2], "clip": ["base", 1]}
    wires = {"model": ["base", 0], "dataset": ["data", 0], "clip": ["base", 1], "vae": ["base", 2]}
    checkpoint = {"ckpt_name": "v1-5-pruned-emaonly-fp16.safetensors"}
    train = {**wires, "preset": "auto", "name": "squares", **CHOICES, **NUMBERS, **SAMPLES}
    loss_plot = {"loss_map": ["train", 2], "width": 400, "height": 300, "log_scale": False}
    saved = {"lora": ["train", 0], "filename_prefix": "loras/squares", "layout": "kohya", "dtype": "keep"}
    saved |= {"trigger_words": "", "destination": "output", "if_exists": "number", "model": ["base", 0]}
    return {
        "base": {"class_type": "CheckpointLoaderSimple", "inputs": checkpoint},
        "data": {"class_type": "LoraOpsDataset", "inputs": dataset},
        "train": {"class_type": "LoraOpsTrain", "inputs": train},
        "plot": {"class_type": "LoraOpsLossPlot", "inputs": loss_plot},
        "cores": {"class_type": "LossGraphNode", "inputs": {"loss": ["train", 2], "filename_prefix": "loss"}},
        "pictures": {"class_type": "SaveImage", "inputs": {"images": ["train", 3], "filename_prefix": "samples"}},
        "plotted": {"class_type": "SaveImage", "inputs": {"images": ["plot", 0], "filename_prefix": "plot"}},
        "saved": {"class_type": "LoraOpsSaveLora", "inputs": saved},
    }


def changed(prompt, only=(), **inputs):
    found = copy.deepcopy(prompt)
    found["train"]["inputs"].update(inputs)
    return {name: found[name] for name in ("base", "data", "train", *only)}


def told(entry):
    return json.loads(entry["outputs"]["train"]["lora_ops"][0])


def test_a_folder_becomes_a_lora_samples_a_plot_and_files(server, prompt):
    entry = server.post(prompt)
    data = told(entry)
    assert data["step"] == 4 and data["family"] == "sd15" and data["dataset"]
    folder = server.base / "output" / "lora_ops" / "squares"
    assert {path.name for path in folder.iterdir()} >= {"squares.safetensors", "squares-000002.safetensors"}
    assert len(server.images(entry)) == 3  # core's plot, ours, and the samples
    recipe = json.loads((folder / "recipe.json").read_text())
    assert recipe["node"] == "train" and set(recipe["prompt"]) == {"base", "data", "train"}
    path = json.loads(entry["outputs"]["saved"]["lora_ops"][0])["path"]
    with safe_open(path, "pt") as file:
        assert file.metadata()["ss_steps"] == "4"
