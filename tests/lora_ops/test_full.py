"""Differences: of a weight, of a norm, of a module's bias, under every name that a file may use."""

from __future__ import annotations

import pytest
import torch

from lora_ops.dialects import DIALECTS, published_map
from lora_ops.errors import AdapterError
from lora_ops.families import FAMILIES
from lora_ops.files import TensorFile
from lora_ops.landing import land, merged
from lora_ops.layouts import LAYOUTS, laid_out
from lora_ops.lora import BIAS, from_file
from lora_ops.receipt import receipt
from lora_ops.scaling import scaled
from lora_ops.select import parse_selectors
from lora_ops.stack import Entry

MAPS = {family.name: published_map(family) for family in FAMILIES}
each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def landed(tensors, family: str, strength: float = 1.0, blocks: str = ""):
    lora = from_file(TensorFile("x.safetensors", tensors))
    entry = Entry(lora, {"model": strength, "clip": strength}, blocks=parse_selectors(blocks))
    return land([entry], MAPS[family])


@each_family
def test_every_bias_of_a_named_weight_has_its_name_and_rows(family):
    names, shapes = MAPS[family.name].names, family.published()
    for name in list(names)[:: len(names) // 2000 + 1]:
        target = names[name].target
        key = target.key.removesuffix("weight") + "bias"
        assert (f"{name}{BIAS}" in names) == (key in shapes), name
        if key in shapes:
            bias = names[f"{name}{BIAS}"]
            assert bias.target.key == key and bias.dialect == names[name].dialect
            assert (bias.target.band, bias.target.swap, bias.target.role) == (target.band, target.swap, target.role)
            assert bias.target.shape == shapes[key]


@each_family
def test_no_module_is_called_like_the_bias_of_another(family):
    for component, _, inside in family.located(family.published()):
        for place in component.places(inside):
            assert not any((dialect.spell("", place) or "").endswith(BIAS) for dialect in DIALECTS)


@each_family
def test_every_norm_takes_a_difference_under_its_own_name(family):
    norms = {key: shape for key, shape in family.published().items() if len(shape) == 1 and key.endswith(".weight")}
    denoiser = {key: shape for key, shape in norms.items() if key.startswith("diffusion_model.")}
    tensors = {f"{key.removesuffix('.weight')}.diff": torch.ones(shape) for key, shape in denoiser.items()}
    landing = landed(tensors, family.name)
    assert {key for _, key in landing.pieces} == denoiser.keys()
    assert not tensors or landing.rows[0].coverage == 1


def test_a_bias_that_is_not_there_is_refused():
    module = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
    (row,) = landed({f"{module}.diff_b": torch.ones(320)}, "sd15").rows
    assert [each[:2] for each in row.refused] == [(f"{module}.bias", "this module has no bias")]
    assert row.refused_parts == {"clip": 0, "model": 1}


@pytest.mark.parametrize("shape", [(319,), (320, 1), (1, 320)])
def test_a_difference_of_another_shape_is_refused(shape):
    (row,) = landed({"lora_unet_input_blocks_1_0_in_layers_0.diff_b": torch.ones(shape)}, "sd15").rows
    assert "is a difference of" in row.refused[0].reason and not row.landed


def test_the_bias_of_a_swapped_layer_is_swapped_and_that_of_a_split_one_in_its_rows():
    difference = torch.arange(6144.0)
    tensors = {
        "transformer.norm_out.linear.diff_b": difference,
        "transformer.single_transformer_blocks.3.attn.to_v.diff_b": torch.ones(3072),
    }
    landing = landed(tensors, "flux", 0.5)
    pieces = landing.pieces["model", "diffusion_model.final_layer.adaLN_modulation.1.bias"]
    assert torch.equal(merged(torch.zeros(6144), pieces), 0.5 * difference.roll(3072))
    fused = merged(torch.zeros(21504), landing.pieces["model", "diffusion_model.single_blocks.3.linear1.bias"])
    assert set(fused.nonzero().flatten().tolist()) == set(range(6144, 9216))


def biased(alpha: float = 2.0):
    """A LoRA with a bias, as PEFT has them, at scale alpha / 4; and a norm's difference."""
    module = "diffusion_model.single_blocks.3.linear2"
    return {
        f"{module}.lora_B.bias": torch.ones(3072),
        f"{module}.lora_A.weight": torch.ones(4, 15360),
        f"{module}.lora_B.weight": torch.ones(3072, 4),
        f"{module}.alpha": torch.tensor(alpha),
        "diffusion_model.single_blocks.3.norm.key_norm.diff": torch.ones(128),
    }


def test_selectors_find_a_bias_by_its_module_and_its_role():
    def strengths(blocks):
        pieces = landed(biased(), "flux", blocks=blocks).pieces.items()
        return {key.rpartition("3.")[2]: there[0].strength for (_, key), there in pieces}

    assert strengths("single_blocks.3.linear2=0.5") == {
        "linear2.weight": 0.5,
        "linear2.bias": 0.5,
        "norm.key_norm.weight": 1.0,
    }
    assert strengths("role:norm=0") == {"linear2.weight": 1.0, "linear2.bias": 1.0}
    assert strengths("role:mlp=0") == {"norm.key_norm.weight": 1.0}


def test_a_receipt_counts_differences_and_says_what_has_a_rank():
    found = receipt(landed(biased(), "flux"), 0.0)
    assert "3 of 3 modules landed" in found.text
    assert "   2 full, 1 LoRA, rank 4; scale 0.5, 1, alpha from: tensor" in found.text
    alone = receipt(landed({"diffusion_model.single_blocks.3.norm.key_norm.diff": torch.ones(128)}, "flux"), 0.0)
    assert "   full; scale 1\n" in f"{alone.text}\n"


def test_scaling_a_lora_scales_its_bias_with_it():
    file = scaled(TensorFile("x", biased()), 0.5, (), None).file
    before, after = from_file(TensorFile("x", biased())).modules, from_file(file).modules
    assert before.keys() == after.keys() and len(before) == 3
    for module, adapter in before.items():
        shape = (3072, 15360) if module.endswith("linear2") else adapter.diff.shape
        assert torch.equal(after[module].delta(shape), 0.5 * adapter.delta(shape))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_layout_writes_differences_or_says_that_it_has_no_place_for_them(layout):
    flux, lora = next(family for family in FAMILIES if family.name == "flux"), from_file(TensorFile("x", biased()))
    if layout.name in ("diffusers", "peft"):
        with pytest.raises(AdapterError, match="is full .*, which the layout") as caught:
            laid_out(lora, layout, flux)
        assert caught.value.module.endswith((".bias", "key_norm"))
        return
    shapes, written = flux.published(), laid_out(lora, layout, flux).tensors
    before, after = (
        {key: merged(torch.zeros(shapes[key]), there) for (_, key), there in landed(tensors, "flux").pieces.items()}
        for tensors in (biased(), written)
    )
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
