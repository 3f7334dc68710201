"""What holds for every family and dialect."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_ops.dialects import DIALECTS, published_map, target_map
from lora_ops.families import FAMILIES, UNKNOWN, recognise

KEYS = Path(__file__).parents[1] / "keys"
REAL = {  # family -> the listings (tests/keys/make.py) that its published shapes must equal
    "sd15": ("sd15", "clip_l"),
    "sdxl": ("sdxl", "clip_l", "clip_g"),
    "flux": ("flux", "clip_l"),
}
BY_NAME = {family.name: family for family in FAMILIES}
each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def real_shapes(name: str) -> dict[str, tuple[int, ...]]:
    listings = (json.loads((KEYS / f"{listing}.json").read_text("utf-8")) for listing in REAL[name])
    return {key: tuple(shape) for listing in listings for key, shape in listing.items()}


@each_family
def test_published_shapes_are_the_real_models(family):
    real = real_shapes(family.name)
    published = {key: shape for key, shape in family.published().items() if not key.startswith("t5xxl.")}
    assert published == real


@each_family
def test_a_family_is_recognised_by_its_real_shapes_and_by_its_text_encoders_alone(family):
    real = real_shapes(family.name)
    assert recognise(real) is family
    assert recognise({key: shape for key, shape in real.items() if key.startswith("diffusion_model.")}) is family
    text = {key: shape for key, shape in family.published().items() if not key.startswith("diffusion_model.")}
    assert recognise(text) is family


@each_family
def test_a_name_means_one_place(family):
    """Every dialect's spelling of every place, from scratch: no two places share a name."""
    meanings: dict[str, set] = {}
    shapes = family.published()
    for component, source, inside in family.located(shapes):
        for place in component.places(inside):
            for dialect in DIALECTS:
                for prefix in component.prefixes.get(dialect.prefix, ()):
                    if name := dialect.spell(prefix, place):
                        meanings.setdefault(name, set()).add((source + place.key, place.band, place.swap))
    ambiguous = {name: places for name, places in meanings.items() if len(places) > 1}
    assert not ambiguous


@each_family
def test_every_weight_can_be_named_in_every_dialect_of_its_component(family):
    """Native dialects reach each matrix whole; diffusers dialects reach all its rows, whole or band by band."""
    targets = published_map(family)
    for component, source, inside in family.located(family.published()):
        matrices = {source + key for key, shape in inside.items() if key.endswith(".weight") and len(shape) > 1}
        for dialect in DIALECTS:
            if dialect.name == "diffusers, attention processors" or dialect.prefix not in component.prefixes:
                continue
            covered: dict[str, int] = {}
            places = {}
            for place in component.places(inside):
                if any(dialect.spell(prefix, place) for prefix in component.prefixes[dialect.prefix]):
                    places[place.key, place.band] = place
            for key, band in places:
                covered[source + key] = covered.get(source + key, 0) + (inside[key][0] if band is None else band.length)
            wrong = {key for key in matrices if covered.get(key) != inside[key.removeprefix(source)][0]}
            assert not wrong, f"{dialect.name}: {sorted(wrong)[:5]}"
    assert targets.parts == {"model", "clip"}


@each_family
def test_bands_of_a_weight_tile_it(family):
    bands: dict[str, set] = {}
    for target, _ in published_map(family).names.values():
        if target.band:
            bands.setdefault(target.key, set()).add((target.band.start, target.band.length, target.shape[0]))
    for key, found in bands.items():
        position = 0
        for start, length, _ in sorted(found):
            assert start == position and length > 0, key
            position += length
        assert {rows for _, _, rows in found} == {position}, key


def test_a_file_of_a_denoiser_alone_needs_no_prefix():
    for family in FAMILIES:
        shapes = {
            key.removeprefix("diffusion_model."): shape
            for key, shape in family.published().items()
            if key.startswith("diffusion_model.")
        }
        targets = target_map(recognise(shapes), shapes)
        assert targets.family == family.name and targets.parts == {"model"}


def test_text_encoders_alone_are_no_denoiser():
    for family in FAMILIES:
        shapes = {key: shape for key, shape in family.published().items() if not key.startswith("diffusion_model.")}
        assert target_map(recognise(shapes), shapes).parts == {"clip"}


def test_an_unknown_model_still_answers_to_its_own_names():
    shapes = {"diffusion_model.strange.block.0.to_q.weight": (8, 8), "diffusion_model.strange.norm.weight": (8,)}
    family = recognise(shapes)
    targets = target_map(family, shapes)
    assert family is UNKNOWN
    assert targets.names["lora_unet_strange_block_0_to_q"].target.key == "diffusion_model.strange.block.0.to_q.weight"
    assert targets.names["diffusion_model.strange.block.0.to_q"].target.shape == (8, 8)


def test_sdxl_checkpoints_keep_clip_g_as_openclip_does_and_it_is_found():
    shapes = {
        "conditioner.embedders.1.model.transformer.resblocks.3.attn.in_proj_weight": (3840, 1280),
        "conditioner.embedders.1.model.transformer.resblocks.3.mlp.c_fc.weight": (5120, 1280),
        "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (640, 2048),
    }
    names = target_map(recognise(shapes), shapes).names
    key = names["lora_te2_text_model_encoder_layers_3_self_attn_k_proj"].target
    assert key.key.endswith("attn.in_proj_weight") and (key.rows.start, key.rows.length) == (1280, 1280)
    assert names["text_encoder_2.text_model.encoder.layers.3.mlp.fc1"].target.key.endswith("c_fc.weight")


def test_a_flattened_name_that_means_two_weights_means_none():
    shapes = {"diffusion_model.a.b_c.weight": (8, 8), "diffusion_model.a_b.c.weight": (8, 8)}
    names = target_map(recognise(shapes), shapes).names
    assert "lora_unet_a_b_c" not in names and "diffusion_model.a.b_c" in names
