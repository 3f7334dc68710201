"""Train LoRA on the host inside this process: what it leaves, how it goes on, what it refuses."""

from __future__ import annotations

import json

import pytest
import torch

from harness import inside

EVERY = {"sample_steps": 2, "sample_every": 2, "save_every": 2, "validate_every": 2}


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def parts(ours):
    """The pack's modules that the node is made of."""

    class Modules:
        course, sitting, runs = ours("nodes.host.course"), ours("nodes.host.sitting"), ours("nodes.host.runs")
        settings, folder = ours("lora_ops.train.settings"), ours("lora_ops.train.keeping")
        dataset, errors, nodes = ours("lora_ops.train.dataset"), ours("lora_ops.errors"), ours("nodes.training")
        training, patching = ours("nodes.host.training"), ours("nodes.host.patching")

    return Modules


@pytest.fixture
def output(tmp_path, monkeypatch):
    """An output folder of our own."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    return tmp_path


def conditioning(width=768, pooled=0, seed=0):
    return [[noise(1, 7, width, seed=seed), {"pooled_output": noise(1, pooled, seed=seed + 1) if pooled else None}]]


def dataset(parts, shape=(4, 8, 8), width=768, pooled=0, pictures=2, held_out=0):
    def picture(number):
        condition = conditioning(width, pooled, number)
        return parts.dataset.Picture(
            f"{number}.png", (noise(*shape, seed=number),), (condition,), captions=("ink, red",)
        )

    every = [picture(number) for number in range(pictures + held_out)]
    return parts.dataset.Dataset(tuple(every[:pictures]), tuple(every[pictures:]))


def seated(parts, output, model=None, data=None, name="ink", **settings):
    chosen = {
        "steps": 4,
        "learning_rate": 3e-2,
        "rank": 4,
        "alpha": 4.0,
        "sample_steps": 2,
        "sample_every": 2,
        "save_every": 2,
    }
    settings = parts.settings.Settings(**chosen | settings)
    with torch.inference_mode():
        wires = parts.course.Wires(model or inside.model("sd15"), data or dataset(parts))
        course = parts.course.Course(settings, wires)
        folder = parts.folder.Folder(output / "lora_ops" / name)
        return parts.sitting.Sitting(course, folder, "7", {"version": 1, "node": "7", "prompt": {}})


def carried_out(*args, **more):
    sitting = seated(*args, **more)
    with torch.inference_mode():
        return sitting.outcome("flow")


def test_a_run_leaves_its_lora_its_samples_and_how_it_was_made(parts, output):
    model = inside.model("sd15")
    found = carried_out(parts, output, model)
    folder = output / "lora_ops" / "ink"
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) == [
        "history.json",
        "ink-000002.safetensors",
        "ink.safetensors",
        "recipe.json",
        "samples/000002_0.png",
        "samples/000004_0.png",
        "state.safetensors",
    ]
    assert found.samples.shape == (1, 64, 64, 3)
    assert found.loss_map["steps"] == [1, 2, 3, 4] and len(found.loss_map["loss"]) == 4
    assert json.loads((folder / "recipe.json").read_text())["node"] == "7"
    assert not torch.allclose(inside.run(found.model), inside.run(model))
