"""What holds for every family and dialect."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_ops.dialects import DIALECTS, published_map, target_map
from lora_ops.families import FAMILIES, UNKNOWN, recognise
from lora_ops.lora import Band

KEYS = Path(__file__).parents[1] / "keys"
REAL = {  # family -> the listings (tests/keys/make.py) that its published shapes must equal
    "sd15": ("sd15", "clip_l"),
    "sd2": ("sd2", "clip_h"),
    "sdxl": ("sdxl", "clip_l", "clip_g"),
    "sd3": ("sd3", "clip_l", "clip_g", "t5xxl"),
    "sd35_medium": ("sd35_medium", "clip_l", "clip_g", "t5xxl"),
    "flux": ("flux", "clip_l", "t5xxl"),
    "flux2": ("flux2",),
    "flux2_klein": ("flux2_klein",),
    "chroma": ("chroma", "t5xxl"),
    "hunyuan_video": ("hunyuan_video", "clip_l", "llama"),
    "cascade_c": ("cascade_c", "clip_g"),
    "cascade_b": ("cascade_b", "clip_g"),
    "wuerstchen": ("wuerstchen",),
    "kandinsky22_prior": ("kandinsky22_prior",),
    "kandinsky22_decoder": ("kandinsky22_decoder",),
    "wan": ("wan", "umt5xxl"),
    "qwen_image": ("qwen_image", "qwen25_7b"),
    "z_image": ("z_image", "qwen3_4b"),
    "lumina2": ("lumina2", "gemma2_2b"),
    "kandinsky5": ("kandinsky5", "qwen25_7b", "clip_l"),
    "anima": ("anima", "qwen3_06b"),
    "ltx": ("ltx", "t5xxl"),
}
BY_NAME = {family.name: family for family in FAMILIES}
each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def real_shapes(name: str) -> dict[str, tuple[int, ...]]:
    listings = (json.loads((KEYS / f"{listing}.json").read_text("utf-8")) for listing in REAL[name])
    return {key: tuple(shape) for listing in listings for key, shape in listing.items()}


@each_family
def test_published_shapes_are_the_real_models(family):
    assert family.published() == real_shapes(family.name)


@each_family
def test_a_family_is_recognised_by_its_real_shapes_and_by_its_text_encoders_alone(family):
    """Where families share their text encoders, these alone are of any of them: they name the same places."""
    real = real_shapes(family.name)
    assert recognise(real) is family
    assert recognise({key: shape for key, shape in real.items() if key.startswith("diffusion_model.")}) is family
    text = {key: shape for key, shape in real.items() if not key.startswith("diffusion_model.")}
    assert target_map(recognise(text), text).names == target_map(family, text).names


@each_family
def test_a_name_means_one_place_or_places_of_different_shapes(family):
    """Every dialect's spelling of every place, from scratch. Only text encoders, which PEFT names alike, may share
    names, and then the shape of an update tells them apart."""
    meanings: dict[str, set] = {}
    shapes = family.published()
    for component, source, inside in family.located(shapes):
        for place in component.places(inside):
            rows = (place.band or Band(0, inside[place.key][0])).length
            shape = component.part, (rows, *inside[place.key][1:])
            for dialect in DIALECTS:
                for prefix in component.prefixes.get(dialect.prefix, ()):
                    if name := dialect.spell(prefix, place):
                        meanings.setdefault(name, set()).add((shape, source + place.key, place.band, place.swap))
    for name, places in meanings.items():
        assert len({shape for shape, *_ in places}) == len(places), name
        assert len(places) == 1 or {part for (part, _), *_ in places} == {"clip"}, name


def covered(bands) -> int:
    """Up to which row these (first, end) reach without a gap."""
    reach = 0
    for first, end in sorted(bands):
        reach = max(reach, end) if first <= reach else reach
    return reach


@each_family
def test_every_weight_can_be_named_in_every_dialect_of_its_component(family):
    """Native dialects reach each matrix whole; diffusers dialects reach all its rows, whole or band by band."""
    targets = published_map(family)
    for component, source, inside in family.located(family.published()):
        matrices = {source + key for key, shape in inside.items() if key.endswith(".weight") and len(shape) > 1}
        for dialect in DIALECTS:
            if dialect.name == "attention processors" or dialect.prefix not in component.prefixes:
                continue
            named: dict[str, set[tuple[int, int]]] = {}
            for place in component.places(inside):
                if any(dialect.spell(prefix, place) for prefix in component.prefixes[dialect.prefix]):
                    rows = place.band or Band(0, inside[place.key][0])
                    named.setdefault(source + place.key, set()).add((rows.start, rows.start + rows.length))
            wrong = {key for key in matrices if covered(named.get(key, ())) != inside[key.removeprefix(source)][0]}
            assert not wrong, f"{dialect.name}: {sorted(wrong)[:5]}"
    assert targets.parts == {component.part for component in family.components}


@each_family
def test_what_diffusers_splits_tiles_the_weight(family):
    for component, _, inside in family.located(family.published()):
        bands: dict[str, set[Band]] = {}
        for place in component.places(inside):
            if place.band and place.diffusers:
                bands.setdefault(place.key, set()).add(place.band)
        for key, found in bands.items():
            position = 0
            for band in sorted(found, key=lambda band: band.start):
                assert band.start == position and band.length > 0, key
                position += band.length
            assert position == inside[key][0], key


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
        assert target_map(recognise(shapes), shapes).parts <= {"clip"}


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
