"""Options of Train LoRA through the node itself, as the host calls it: each changes what is learned, or says what it
lacks."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from harness import inside

ADAM = {"optimizer": "adamw", "weight_decay": 0.01, "lora_plus": 1.0}
NUMBERS = {"steps": 1, "learning_rate": 0.01, "rank": 2, "alpha": 2.0, "sample_every": 0, "save_every": 0}
CHOICES = {
    "targets": {"targets": "attention"},
    "adapter": {"adapter": "lora", "initial": "gaussian"},
    "optimizer": ADAM,
    "schedule": {"schedule": "constant", "warmup": 0},
    "resume": {"resume": "none"},
    **{name: {name: "auto"} for name in ("objective", "timesteps")},
    **{name: {name: "off"} for name in ("text_encoder", "preservation")},
    "loss": {"loss": "mse"},
}


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def given(ours, pack):
    """What comes into the node over its wires."""
    dataset = ours("lora_ops.train.dataset")

    def picture(number):
        mask = torch.ones(1, 8, 8)
        mask[..., 4:] = 0
        condition = [[noise(1, 7, 64, seed=number), {"pooled_output": noise(1, 768, seed=number)}]]
        return dataset.Picture(f"{number}.png", (noise(16, 8, 8, seed=number),), (condition,), (mask,), ("ink",))

    return {"model": inside.model("flux"), "dataset": dataset.Dataset((picture(1), picture(2)))}


@pytest.fixture
def learned(ours, given, tmp_path, monkeypatch):
    """learned(**settings): the LoRA that the node puts out."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    there = types.SimpleNamespace(unique_id="7", extra_pnginfo=None, dynprompt=None)

    def run(**settings):
        values = given | {"preset": "auto", "name": "ink", **NUMBERS, **CHOICES, **settings}
        inputs = {
            name: {key: [each] for key, each in value.items()} if name in CHOICES else [value]
            for name, value in values.items()
        }
        there.prompt = {"7": {"class_type": "LoraOpsTrain", "inputs": {}}}
        node = type("Node", (ours("nodes.training").LoraOpsTrain,), {"hidden": there})
        with torch.inference_mode():
            output = node.execute(**inputs)
        return torch.cat([tensor.double().flatten() for tensor in output.result[0].values()])

    return run


@pytest.fixture(scope="module")
def plain():
    """What is learned without any of the options, made once."""
    made = []

    def found(learned):
        made.extend([learned()] if not made else [])
        return made[0]

    return found


DIFFERENT = {
    "prodigy": {"optimizer": {"optimizer": "prodigy", "weight_decay": 0.01, "d_coef": 1.0}, "learning_rate": 1.0},
    "schedule_free": {"optimizer": {**ADAM, "optimizer": "schedule_free"}},
    "lion": {"optimizer": {**ADAM, "optimizer": "lion"}},
    "adafactor": {"optimizer": {**ADAM, "optimizer": "adafactor"}},
    "bf16": {"precision": "bf16"},
    "ema": {"ema": 0.9},
    "no masks": {"masked": False},
    "accumulation": {"accumulation": 2},
}


@pytest.mark.parametrize("option", DIFFERENT)
def test_an_option_changes_what_is_learned(learned, plain, option):
    found = learned(**DIFFERENT[option])
    assert found.isfinite().all() and not torch.equal(found, plain(learned))


def test_checkpointing_changes_nothing(learned, plain):
    """Within what sums in another order differ."""
    whole = plain(learned)
    assert (learned(checkpointing=True) - whole).norm() < 1e-5 * whole.norm()


def test_a_package_that_is_missing_is_named_before_anything_is_written(ours, learned, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ours("lora_ops.errors").TrainingError, match=r"pip install bitsandbytes"):
        learned(optimizer={**ADAM, "optimizer": "adamw8bit"})
    assert not (tmp_path / "lora_ops" / "ink").exists()


def test_dora_where_a_lora_runs_live_is_refused_before_anything_is_written(
    ours, learned, given, samples, apply, tmp_path
):
    under = apply(given["model"], (samples(given["model"], 0, seed=1), 1.0), mode="live")
    with pytest.raises(ours("lora_ops.errors").TrainingError, match="has a LoRA on it live, which DoRA"):
        learned(model=under, adapter={"adapter": "dora"})
    assert not (tmp_path / "lora_ops" / "ink").exists()
