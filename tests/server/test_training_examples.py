"""The example workflows that train, on the small world."""

from __future__ import annotations

import json

import pytest

from harness.comfy import PACK
from lora_ops.files import read

# What goes on from a LoRA comes after the one that makes it.
TRAINING = sorted(path.stem for path in (PACK / "example_workflows").glob("lora_train_*.json"))


def test_there_is_one_for_every_family_that_is_named():
    assert {name.removeprefix("lora_train_") for name in TRAINING} == {
        *("sd15", "sd15_resume", "sdxl", "flux", "flux2_klein", "dreambooth"),
    }


@pytest.mark.parametrize("name", TRAINING)
def test_an_example_trains_and_saves_what_it_learned(server, example, name):
    prompt = example(name)
    entry = server.post(prompt)

    def told(kind):
        (node,) = (node for node, each in prompt.items() if each["class_type"] == kind)
        return json.loads(entry["outputs"][node]["lora_ops"][0])

    report = told("LoraOpsTrain")
    assert report["step"] == 4 and report["places"] > 0 and len(report["samples"]) >= 2
    assert server.images(entry)  # of the data set, the losses and the samples
    saved = read(told("LoraOpsSaveLora")["path"]).tensors
    assert all(tensor.any() for key, tensor in saved.items() if key.endswith(".lora_up.weight"))
