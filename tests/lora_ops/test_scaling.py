"""Scaling: the factors are in the tensors, and in nothing else."""

from __future__ import annotations

import pytest
import torch

from lora_ops.dialects import published_map, target_map
from lora_ops.errors import AdapterError, ShapeError, StackError, TargetError
from lora_ops.families import FAMILIES, recognise
from lora_ops.files import TensorFile
from lora_ops.landing import add_, land
from lora_ops.lora import Band, Named, Target, TargetMap, from_file
from lora_ops.receipt import receipt
from lora_ops.scaling import scaled
from lora_ops.select import family_of, parse_selectors
from lora_ops.stack import Entry
from tests.lora_ops.test_select import FLUX, FUSED

QKV = "lora_unet_double_blocks_0_img_attn_qkv"
TEXT = "lora_te1_text_model_encoder_layers_0_mlp_fc1"


def tensors(*shapes: tuple[str, int, int], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for module, rows, columns in shapes:
        found[f"{module}.lora_up.weight"] = torch.randn(rows, 2, generator=generator).to(dtype)
        found[f"{module}.lora_down.weight"] = torch.randn(2, columns, generator=generator).to(dtype)
        found[f"{module}.alpha"] = torch.tensor(1.0, dtype=dtype)
    return found


@pytest.fixture(scope="module")
def flux():
    return target_map(recognise(FLUX), FLUX)


@pytest.fixture
def file():
    return TensorFile("ink", tensors((FUSED, 56, 8), (QKV, 24, 8), (TEXT, 3072, 768)), {"ss_tag": "x"})


def changed(before: TensorFile, after: TensorFile) -> set[str]:
    assert before.tensors.keys() == after.tensors.keys() and after.metadata == before.metadata
    return {key for key, tensor in before.tensors.items() if after.tensors[key] is not tensor}


def test_one_changes_no_tensor(file, flux):
    for blocks in ("", "*=1, role:mlp=1"):
        assert changed(file, scaled(file, 1.0, parse_selectors(blocks), flux).file) == set()


@pytest.mark.parametrize("odd", ["lora_unet_double_blocks_7_img_attn_qkv", f"{TEXT}.wobble"])
def test_where_all_factors_come_out_as_one_nothing_is_refused(file, flux, odd):
    """Neither a module without a place nor a tensor that cannot be read."""
    more = tensors((odd, 24, 8)) if "wobble" not in odd else {odd: torch.ones(1)}
    file = TensorFile("ink", file.tensors | more)
    for blocks in ("*=1", "double_blocks=2, double_blocks=0.5"):
        found = scaled(file, 1.0, parse_selectors(blocks), flux)
        assert found.file is file and found.chosen[0] > 0
    with pytest.raises((TargetError, AdapterError)):
        scaled(file, 1.0, parse_selectors("*=0.5"), flux)


def test_a_strength_scales_every_update_and_no_alpha(file):
    found = scaled(file, -0.5, (), None)
    assert changed(file, found.file) == {f"{module}.lora_up.weight" for module in (FUSED, QKV, TEXT)}
    for key in changed(file, found.file):
        assert torch.equal(found.file.tensors[key], -0.5 * file.tensors[key])
    assert found.chosen == ()


@pytest.mark.parametrize("blocks", ["role:mlp=0.3", "*.attn.to_k=0, *=0.7", "double_blocks=2, role:text=0", "*=0"])
def test_a_scaled_file_lands_like_the_file_with_the_selectors(file, flux, blocks):
    """Also the rows of a fused weight, and also what is for a text encoder that is not connected."""
    text = {key: shape for key, shape in family_of(flux).published().items() if key.startswith("clip_l.")}
    whole = target_map(family_of(flux), FLUX | text)
    selectors = parse_selectors(blocks)
    found = scaled(file, 0.8, selectors, flux)
    stack = land([Entry(from_file(file), {"model": 0.8, "clip": 0.8}, blocks=selectors)], whole)
    mine = land([Entry(from_file(found.file), {"model": 1.0, "clip": 1.0})], whole)
    assert found.chosen == stack.rows[0].chosen
    for target in {named.target for named in mine.rows[0].landed.values()}:
        updates = [torch.zeros(target.shape, dtype=torch.float64) for _ in range(2)]
        for update, landing in zip(updates, (mine, stack), strict=True):
            add_(update, landing.pieces.get((target.part, target.key), ()))
        # up was rounded to float32 once
        torch.testing.assert_close(*updates, rtol=1e-6, atol=1e-6)


def test_without_a_model_the_family_is_guessed(file):
    found = scaled(file, 1.0, parse_selectors("role:text=0.5, double_blocks.0-3=0"), None)
    assert changed(file, found.file) == {f"{module}.lora_up.weight" for module in (QKV, TEXT)}
    assert not found.file.tensors[f"{QKV}.lora_up.weight"].any() and found.chosen == (1, 1)


def test_the_receipt_knows_that_zeros_may_come_from_scaling(file, flux):
    found = from_file(scaled(file, 1.0, parse_selectors("role:mlp=0, role:attn=0"), flux).file)
    told = receipt(land([Entry(found, {"model": 1.0, "clip": 1.0})], flux), 0.0).text
    assert "are all zero: scaled to 0, untrained, or the file is incomplete" in told


@pytest.mark.parametrize("model", [None, "connected", "both"])
def test_a_name_of_several_text_encoders_means_the_one_that_it_fits(model):
    """PEFT names the modules of all text encoders alike."""
    (sdxl,) = (family for family in FAMILIES if family.name == "sdxl")
    module = "base_model.model.text_model.encoder.layers.0.mlp.fc1"
    assert len(published_map(sdxl).meanings(module)) == 2
    file = TensorFile("ink", tensors((module, 5120, 1280), ("lora_unet_time_embed_0", 1280, 320)))
    denoiser = {key: shape for key, shape in sdxl.published().items() if key.startswith("diffusion_model.")}
    targets = {None: None, "connected": target_map(sdxl, denoiser), "both": published_map(sdxl)}[model]
    found = scaled(file, 1.0, parse_selectors("role:text=0.5"), targets)
    assert changed(file, found.file) == {f"{module}.lora_up.weight"} and found.chosen == (1,)


def test_rows_of_another_model_than_the_guessed_one_are_not_guessed(file):
    with pytest.raises(ShapeError, match="the weight has") as caught:
        scaled(file, 1.0, parse_selectors("*.proj_mlp=0"), None)
    assert (caught.value.file, caught.value.module) == ("ink", FUSED)


@pytest.mark.parametrize(
    ("dtype", "factor", "stored"),
    [
        (torch.float16, 0.5, torch.float16),
        (torch.float16, 0.7, torch.float32),
        (torch.bfloat16, -4.0, torch.bfloat16),
        (torch.bfloat16, 0.0, torch.bfloat16),
        (torch.float8_e4m3fn, 0.7, torch.float32),
        (torch.float64, 0.7, torch.float64),
    ],
)
def test_a_dtype_is_kept_where_it_can_hold_the_product(dtype, factor, stored):
    file = TensorFile("ink", tensors((QKV, 24, 8), dtype=dtype))
    found = scaled(file, factor, (), None).file
    exact = factor * file.tensors[f"{QKV}.lora_up.weight"].double()
    up = found.tensors[f"{QKV}.lora_up.weight"]
    assert up.dtype == stored and torch.equal(up, exact.to(stored))
    assert changed(file, found) == {f"{QKV}.lora_up.weight"}


def test_rows_of_a_swapped_target_are_those_of_the_file():
    target = Target("model", "w", (8, 4), swap=True, names=("whole",), role="mlp")
    first = Target("model", "w", (8, 4), Band(0, 4), names=("first",), role="mlp")
    targets = TargetMap("unknown", {"m": Named(target, "x")}, lambda name: (Named(target, "x"),), (target, first))
    file = TensorFile("ink", tensors(("m", 8, 4)))
    found = scaled(file, 1.0, parse_selectors("first=0"), targets).file
    rows = found.tensors["m.lora_up.weight"].any(dim=1)
    assert rows.tolist() == [True] * 4 + [False] * 4  # the first rows of the model are the last of the file


def test_selectors_for_no_known_model_are_refused(file):
    strange = TensorFile("ink", tensors(("strange_thing", 8, 8)))
    with pytest.raises(StackError, match="for no model that this version knows.* Connect the MODEL"):
        scaled(strange, 1.0, parse_selectors("*=0.5"), None)
    assert len(changed(strange, scaled(strange, 0.5, (), None).file)) == 1


def test_modules_without_a_place_are_refused_not_passed_on(file, flux):
    more = TensorFile("ink", file.tensors | tensors(("lora_unet_double_blocks_7_img_attn_qkv", 24, 8)))
    with pytest.raises(TargetError, match="1 of 4 modules .*first: lora_unet_double_blocks_7"):
        scaled(more, 1.0, parse_selectors("role:mlp=0"), flux)
    scaled(more, 0.5, (), flux)


@pytest.mark.parametrize(("suffix", "words"), [("reshape_weight", "reshape_weight.*cannot be"), ("dora_scale", "DoRA")])
def test_what_no_factors_scale_is_refused(file, suffix, words):
    """reshape_weight cannot be read, and no tensors make a DoRA half as strong."""
    odd = TensorFile("ink", file.tensors | {f"{QKV}.{suffix}": torch.ones(24, 1)})
    with pytest.raises(AdapterError, match=words) as caught:
        scaled(odd, 0.5, (), None)
    assert caught.value.module == QKV and caught.value.remedy.startswith("Set strength")
    assert scaled(odd, 1.0, (), None).file is odd
