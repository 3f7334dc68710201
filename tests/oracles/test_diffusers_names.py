"""diffusers as the oracle of its own names: its module trees, and its converters of published checkpoints."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch

from harness import configs
from lora_ops import checkpoints
from lora_ops.dialects import published_map, target_map
from lora_ops.families import FAMILIES, Shapes, recognise, sd3

diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle here; it is in the test environment")
import transformers  # noqa: E402
from diffusers.loaders import single_file_utils  # noqa: E402

FAMILY = {family.name: family for family in FAMILIES}


class Case(NamedTuple):
    """What differs from a family's published model, and diffusers' converter of the published checkpoint."""

    family: str
    convert: str | None = None
    stored: Callable[[Shapes], Shapes] = dict  # the host's shapes -> the published checkpoint's
    config: dict[str, Any] | None = None  # over the published one of diffusers' class
    shapes: Callable[[], Shapes] | None = None


def _scales(shapes: Shapes) -> Shapes:
    """Black Forest Labs call the weight of a norm its scale."""
    return {re.sub(r"(_norm|norms\.\d+)\.weight$", r"\1.scale", key): shape for key, shape in shapes.items()}


def _originals(shapes: Shapes) -> Shapes:
    """Tencent's own names, by the family's table."""
    places = FAMILY["hunyuan_video"].components[0].places(shapes)
    names = {place.key: f"{place.native}.weight" for place in places if place.native}  # the original comes last
    names |= {re.sub("weight$", "bias", key): re.sub("weight$", "bias", name) for key, name in names.items()}
    return {names.get(key, key): shape for key, shape in shapes.items()}


def _fused(shapes: Shapes) -> Shapes:
    """Stability's checkpoints of Stable Cascade hold q, k and v in one weight."""
    found = {key: shape for key, shape in shapes.items() if ".attn.to_" not in key}
    for key, (rows, columns) in {key: shape for key, shape in shapes.items() if "attn.to_q.weight" in key}.items():
        found[key.replace("to_q.weight", "in_proj_weight")] = (3 * rows, columns)
    return found


SD3_MEDIUM = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "qk_norm": None}
CASES: dict[str, Case] = {
    "sd15": Case("sd15", "ldm_unet_checkpoint"),
    "sd2": Case("sd2", "ldm_unet_checkpoint"),
    "sdxl": Case("sdxl", "ldm_unet_checkpoint"),
    "sd3.5 large": Case("sd3", "sd3_transformer_checkpoint_to_diffusers"),
    "sd3.5 medium": Case("sd35_medium", "sd3_transformer_checkpoint_to_diffusers"),
    "sd3 medium": Case(
        "sd3",
        "sd3_transformer_checkpoint_to_diffusers",
        config=SD3_MEDIUM,
        shapes=lambda: sd3.shapes(depth=24, norms=False),
    ),
    "flux": Case("flux", "flux_transformer_checkpoint_to_diffusers", _scales),
    "flux2": Case("flux2", "flux2_transformer_checkpoint_to_diffusers"),
    "flux2 klein": Case("flux2_klein", "flux2_transformer_checkpoint_to_diffusers"),
    "chroma": Case("chroma", "chroma_transformer_checkpoint_to_diffusers", _scales),
    "hunyuan_video": Case("hunyuan_video", "hunyuan_video_transformer_to_diffusers", _originals),
    "cascade_c": Case("cascade_c", "stable_cascade_unet_single_file_to_diffusers", _fused),
    "cascade_b": Case("cascade_b", "stable_cascade_unet_single_file_to_diffusers", _fused),
    "wuerstchen": Case("wuerstchen"),
    "kandinsky22_prior": Case("kandinsky22_prior"),
    "kandinsky22_decoder": Case("kandinsky22_decoder"),
}

_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768}
_CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "projection_dim": 1280}
_CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096}
_T5 = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "feed_forward_proj": "gated-gelu"}
_LLAMA = {"hidden_size": 4096, "intermediate_size": 14336, "num_key_value_heads": 8}
TEXT_ENCODERS = (  # family, the pipeline's name for it, transformers' class and the configuration but for its depth
    ("sd15", "text_encoder", "CLIPTextModel", _CLIP_L),
    ("sd2", "text_encoder", "CLIPTextModel", _CLIP_H),
    ("sdxl", "text_encoder", "CLIPTextModel", _CLIP_L),
    ("sdxl", "text_encoder_2", "CLIPTextModelWithProjection", _CLIP_G),
    ("sd3", "text_encoder", "CLIPTextModelWithProjection", _CLIP_L),
    ("sd3", "text_encoder_2", "CLIPTextModelWithProjection", _CLIP_G),
    ("sd3", "text_encoder_3", "T5EncoderModel", _T5),
    ("flux", "text_encoder", "CLIPTextModel", _CLIP_L),
    ("flux", "text_encoder_2", "T5EncoderModel", _T5),
    ("chroma", "text_encoder", "T5EncoderModel", _T5),
    ("hunyuan_video", "text_encoder", "LlamaModel", _LLAMA),
    ("hunyuan_video", "text_encoder_2", "CLIPTextModel", _CLIP_L),
    ("cascade_c", "text_encoder", "CLIPTextModelWithProjection", _CLIP_G),
)


def configured(config: dict[str, Any]) -> dict[str, Any]:
    """A class's configuration made from a config.json, as plain values."""
    with torch.device("meta"):
        return plain(getattr(diffusers, config["_class_name"]).from_config(json.loads(json.dumps(config))).config)


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: json.loads(json.dumps(value)) for key, value in config.items() if not key.startswith("_")}


@cache
def tree(name: str) -> torch.nn.Module:
    cls, config = configs.DIFFUSERS[CASES[name].family]
    module, _, cls = f"diffusers.{cls}".rpartition(".")
    with torch.device("meta"):
        return getattr(importlib.import_module(module), cls)(**config | (CASES[name].config or {}))


def native(case: Case) -> Shapes:
    return case.shapes() if case.shapes else FAMILY[case.family].components[0].published()


def prefix_of(case: Case) -> str:
    """diffusers' pipelines have a `transformer` or a `unet`."""
    return "transformer." if "Transformer" in configs.DIFFUSERS[case.family][0] else "unet."


def matrices(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """What LoRAs are made for: every Linear and convolution of the tree, with the shape of its weight."""
    return {
        path: tuple(module.weight.shape)
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.modules.conv._ConvNd)
    }


@pytest.mark.parametrize("name", CASES)
def test_every_module_of_diffusers_has_a_place_of_its_shape(name):
    shapes = {f"diffusion_model.{key}": shape for key, shape in native(CASES[name]).items()}
    assert recognise(shapes).name == CASES[name].family
    names = target_map(FAMILY[CASES[name].family], shapes).names
    prefix = prefix_of(CASES[name])
    modules = matrices(tree(name))
    assert modules
    assert not [path for path in modules if prefix + path not in names]
    found = {path: names[prefix + path].target.delta_shape for path in modules}
    assert found == modules


@pytest.mark.parametrize("name", CASES)
def test_a_component_has_all_tensors_of_diffusers_and_no_others(name):
    found = checkpoints.component(FAMILY[CASES[name].family], native(CASES[name]))
    wanted = {key: tuple(tensor.shape) for key, tensor in tree(name).state_dict().items()}
    assert {key: target.delta_shape for key, target in found.places.items()} == wanted
    if found.config:
        assert configured(found.config) == plain(tree(name).config)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.convert])
def test_a_component_holds_what_diffusers_makes_of_the_published_checkpoint(name):
    """Each row is a number of its own."""
    case, checkpoint, count = CASES[name], {}, 0
    shapes, stored = native(case), case.stored(native(case))
    shapes, stored = (shapes, stored) if len(shapes) == len(stored) else (stored, stored)  # some are fused there
    for key, shape in shapes.items():
        checkpoint[key] = torch.arange(count, count + shape[0])[:, None]
        count += shape[0]
    found = checkpoints.component(FAMILY[case.family], shapes).split(checkpoint)
    published = dict(zip(stored, checkpoint.values(), strict=True))
    convert = getattr(single_file_utils, f"convert_{case.convert}")
    if case.convert == "ldm_unet_checkpoint":
        prefixed = {f"model.diffusion_model.{key}": rows for key, rows in published.items()}
        converted = convert(prefixed, tree(name).config)
    else:
        converted = convert(published)
    assert found.keys() == converted.keys()
    assert not [key for key, rows in found.items() if not torch.equal(rows, converted[key])]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.convert])
def test_a_place_holds_the_rows_that_diffusers_takes(name):
    """Each row of a checkpoint is a number of its own; diffusers' converter shows which of them a module gets."""
    case, count = CASES[name], 0
    shapes = case.stored(native(case))
    checkpoint = {}
    for key, shape in shapes.items():
        rows = shape[0] if key != "pos_embed" else 1
        checkpoint[key] = torch.arange(count, count + rows)[:, None]
        count += rows
    names = target_map(
        FAMILY[case.family], {f"model.diffusion_model.{key}": shape for key, shape in shapes.items()}
    ).names
    convert = getattr(single_file_utils, f"convert_{case.convert}")
    if case.convert == "ldm_unet_checkpoint":
        converted = convert(
            {f"model.diffusion_model.{key}": rows for key, rows in checkpoint.items()}, tree(name).config
        )
    else:
        converted = convert(dict(checkpoint))
    prefix = prefix_of(case)
    for path in matrices(tree(name)):
        target = names[prefix + path].target
        rows = checkpoint[target.key.removeprefix("model.diffusion_model.")]
        rows = rows[target.rows.start : target.rows.start + target.rows.length]
        rows = torch.cat(rows.chunk(2)[::-1]) if target.swap else rows
        assert torch.equal(rows, converted[f"{path}.weight"]), path


@pytest.mark.parametrize(("family", "name", "cls", "config"), TEXT_ENCODERS, ids=lambda value: str(value)[:20])
def test_every_module_of_a_pipelines_text_encoder_has_a_place_of_its_shape(family, name, cls, config):
    made = getattr(transformers, cls).config_class(**config, num_hidden_layers=2)
    with torch.device("meta"):
        modules = matrices(getattr(transformers, cls)(made))
    names = published_map(FAMILY[family]).names
    assert len(modules) > 10
    assert not [path for path in modules if f"{name}.{path}" not in names]
    assert {path: names[f"{name}.{path}"].target.delta_shape for path in modules} == modules
