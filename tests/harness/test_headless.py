"""A recipe is read from either of its files, changed by name, and refused with what to do."""

from __future__ import annotations

import json

import pytest
import torch

from harness.headless import KEY, Recipe, changed, main, read
from lora_ops.errors import FileError, LoraOpsError
from lora_ops.files import write

RECIPE = {
    "version": 1,
    "node": "3",
    "prompt": {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "x"}},
        "3": {
            "class_type": "LoraOpsTrain",
            "inputs": {"model": ["1", 0], "steps": 10, "name": "mine", "learning_rate": 1e-4, "dry_run": False},
        },
    },
}


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(RECIPE))
    return read(path)


def test_a_runs_json_and_its_lora_hold_the_same_recipe(recipe, tmp_path):
    write(tmp_path / "mine.safetensors", {"a": torch.zeros(1)}, {KEY: json.dumps(RECIPE)}, overwrite=False)
    assert recipe == read(tmp_path / "mine.safetensors") == Recipe(RECIPE["prompt"], "3")


def test_inputs_are_changed_by_name_and_keep_their_type(recipe):
    found = changed(recipe, ["steps=3000", "name=a=b 1", "learning_rate=1", "dry_run=true"]).inputs
    assert found == {"model": ["1", 0], "steps": 3000, "name": "a=b 1", "learning_rate": 1.0, "dry_run": True}
    assert isinstance(found["learning_rate"], float) and recipe.inputs["steps"] == 10


@pytest.mark.parametrize(
    "change", ["stepps=3", "model=x", "steps", "steps=many", "steps=[1]", "steps=2.5", "dry_run=1"]
)
def test_a_change_that_cannot_be_made_is_refused_by_name(recipe, change):
    with pytest.raises(LoraOpsError) as caught:
        changed(recipe, [change])
    assert caught.value.remedy and change.partition("=")[0] in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "{}", '{"version": 1, "prompt": {}, "node": "3"}'])
def test_what_is_no_recipe_is_refused(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(FileError, match="recipe|JSON"):
        read(path)


def test_a_later_version_and_a_missing_file_are_refused(tmp_path, capsys):
    path = tmp_path / "later.json"
    path.write_text(json.dumps(RECIPE | {"version": 2}))
    with pytest.raises(FileError, match="version 2"):
        read(path)
    assert main([str(tmp_path / "none.json"), "--comfy", str(tmp_path)]) == 1
    assert "none.json" in capsys.readouterr().err
