"""Components of diffusers: what is split is joined again, in shards of the size that was asked for."""

from __future__ import annotations

import json

import pytest
import torch

from lora_ops.checkpoints import STEM, component, shards
from lora_ops.errors import TargetError
from lora_ops.families import FAMILIES

ALONE = [family for family in FAMILIES if family.name != "anima"]


@pytest.mark.parametrize("family", ALONE, ids=lambda each: each.name)
def test_splitting_and_joining_a_model_is_nothing(family):
    shapes = dict(family.components[0].published())
    found = component(family, shapes)
    native = {key: torch.arange(shape[0]) for key, shape in shapes.items()}
    split = found.split(native)
    assert sum(map(len, split.values())) == sum(map(len, native.values()))
    joined = found.joined(split)
    assert joined.keys() == native.keys() and all(torch.equal(joined[key], rows) for key, rows in native.items())


def test_a_weight_that_diffusers_does_not_have_is_told():
    (flux,) = (family for family in FAMILIES if family.name == "flux")
    with pytest.raises(TargetError, match="'extra.weight': has no one name in diffusers") as refused:
        component(flux, {**flux.components[0].published(), "extra.weight": (4, 4)})
    assert refused.value.module == "extra.weight"


def test_a_model_that_is_two_in_diffusers_is_told():
    (anima,) = (family for family in FAMILIES if family.name == "anima")
    with pytest.raises(TargetError, match="Anima is two models in two folders of diffusers") as refused:
        component(anima, anima.components[0].published())
    assert "diffusion model" in refused.value.remedy


@pytest.mark.parametrize(("limit", "files"), [(1e9, [4]), (48, [1, 1, 2]), (16, [1, 1, 1, 1]), (1, [1, 1, 1, 1])])
def test_shards_hold_everything_once_and_are_as_large_as_asked_for(limit, files):
    tensors = {name: torch.full((size,), 1.0) for name, size in (("a", 8), ("b", 20), ("c", 4), ("d", 4))}
    found, index = shards(tensors, limit)
    assert [len(each) for each in found.values()] == files
    assert {name: file for file, each in found.items() for name in each}.keys() == tensors.keys()
    if len(files) == 1:
        assert list(found) == [f"{STEM}.safetensors"] and not index
    else:
        (told,) = map(json.loads, index.values())
        assert told["weight_map"] == {name: file for file, each in found.items() for name in each}
        assert told["metadata"]["total_size"] == 144
