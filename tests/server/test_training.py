"""Training through a real server: a folder of pictures to a LoRA, a model with it, samples, a plot and files."""

from __future__ import annotations

import copy
import json
import threading

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from harness.server import WorkflowError
from harness.workflow import defaults

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
    info = server.object_info()
    dataset = defaults("LoraOpsDataset", info)
    dataset |= {"folder": folder, "resolution": "64", "vae": ["base", 2], "clip": ["base", 1]}
    wires = {"model": ["base", 0], "dataset": ["data", 0], "clip": ["base", 1], "vae": ["base", 2]}
    checkpoint = {"ckpt_name": "v1-5-pruned-emaonly-fp16.safetensors"}
    train = {**defaults("LoraOpsTrain", info), **wires, "name": "squares", **NUMBERS, **SAMPLES}
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


def test_a_rehearsal_has_a_report_and_nothing_else(server, prompt):
    entry = server.post(changed(prompt, ("pictures",), name="rehearsed", dry_run=True))
    assert told(entry)["seconds"] > 0 and server.images(entry) == []
    assert not (server.base / "output" / "lora_ops" / "rehearsed").exists()


def test_the_text_encoder_learns_from_captions_and_the_recipe_makes_the_run_again(server, prompt):
    text = {"text_encoder": "on", "text_encoder.learning_rate": 0.001, "steps": 1, "sample_every": 0}
    text |= {"preservation": "class word", "preservation.trigger_word": "square", "preservation.class_word": "thing"}
    text |= {"preservation.weight": 1.0}
    data = told(server.post(changed(prompt, name="words", **text)))
    with safe_open(data["path"], "pt") as file:
        first = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        assert file.metadata()["ss_text_encoder_lr"] == "0.001"
    assert any(key.startswith("lora_te_") and ".lora_up" in key and tensor.any() for key, tensor in first.items())
    recipe = json.loads((server.base / "output" / "lora_ops" / "words" / "recipe.json").read_text())
    recipe["prompt"][recipe["node"]]["inputs"]["name"] = "again"
    again = told(server.post(recipe["prompt"]))
    with safe_open(again["path"], "pt") as file:
        assert first.keys() == set(file.keys()) and all(torch.equal(file.get_tensor(key), first[key]) for key in first)


def test_a_cancelled_run_goes_on_and_a_page_ends_it_early(server, prompt):
    """Cancelled as the front end does it, then finished by the button, both in the middle of many steps."""
    long = changed(prompt, name="long", steps=5000, sample_every=0, save_every=0)

    def run_of():
        runs = [run for run in server.json("/lora_ops/train")["runs"] if run["name"] == "long"]
        return runs[0] if runs and runs[0]["state"] == "running" and runs[0]["step"] > 1 else None

    def while_it_runs(act):
        ended = []
        thread = threading.Thread(target=lambda: ended.append(_posted(server, long)))
        thread.start()
        while thread.is_alive() and not (run := run_of()):
            thread.join(0.05)
        act(run)
        thread.join()
        return run, ended[0]

    run, error = while_it_runs(lambda run: server.request("/interrupt", {}))
    assert isinstance(error, WorkflowError)
    kept = server.json(f"/lora_ops/train/{run['run']}")
    assert kept["state"] == "cancelled" and kept["step"] < 5000 and "output/lora_ops/long" in kept["message"]
    _, entry = while_it_runs(lambda run: server.json(f"/lora_ops/train/{run['run']}/finish", {}))
    data = told(entry)
    assert data["from_step"] == kept["step"] < data["step"] < 5000
    assert server.json(f"/lora_ops/train/{run['run']}")["state"] == "finished"


def _posted(server, prompt):
    try:
        return server.post(prompt)
    except WorkflowError as error:
        return error
