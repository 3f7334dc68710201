"""diffusers as the oracle of its own names, for the families of video and of language models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from harness import configs
from lora_ops import checkpoints
from lora_ops.dialects import published_map, target_map
from lora_ops.errors import TargetError
from lora_ops.families import FAMILIES, Shapes, recognise, under

diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle here; it is in the test environment")
transformers = pytest.importorskip("transformers", reason="transformers is the oracle of text encoders' names")
from diffusers.loaders import single_file_utils  # noqa: E402

FAMILY = {family.name: family for family in FAMILIES}
KEYS = Path(__file__).parents[1] / "keys"


class Case(NamedTuple):
    """A diffusers class and its configuration, the listing of the same model's native keys, diffusers' converter."""

    family: str
    cls: str
    config: dict[str, Any]
    keys: str
    convert: str | None = None
    prefix: str = "transformer."


def published(family: str, convert: str | None = None) -> Case:
    return Case(family, *configs.DIFFUSERS[family], family, convert)


WAN, LTX2 = "wan_transformer_to_diffusers", "LTX2VideoTransformer3DModel"
CASES: dict[str, Case] = {
    "wan i2v": published("wan", WAN),
    "wan t2v": Case("wan", "WanTransformer3DModel", {"num_layers": 2}, "wan_t2v", WAN),
    "wan 2.2 5b": Case(
        "wan",
        "WanTransformer3DModel",
        {"num_layers": 2, "num_attention_heads": 24, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48},
        "wan22_5b",
        WAN,
    ),
    "wan vace": Case("wan", "WanVACETransformer3DModel", {"num_layers": 4, "vace_layers": [0, 2]}, "wan_vace", WAN),
    "wan animate": Case(
        "wan", "WanAnimateTransformer3DModel", {"num_layers": 5, "added_kv_proj_dim": 5120}, "wan_animate", WAN
    ),
    "qwen_image": published("qwen_image"),
    "z_image": published("z_image", "z_image_transformer_checkpoint_to_diffusers"),
    "lumina2": published("lumina2", "lumina2_to_diffusers"),
    "kandinsky5 video pro": published("kandinsky5"),
    "kandinsky5 image": Case(
        "kandinsky5",
        "Kandinsky5Transformer3DModel",
        {"model_dim": 2560, "ff_dim": 10240, "time_dim": 512, "num_text_blocks": 2, "num_visual_blocks": 2}
        | {"axes_dims": (32, 48, 48), "in_visual_dim": 16, "out_visual_dim": 16},
        "kandinsky5_image",
    ),
    "anima": published("anima", "cosmos_transformer_checkpoint_to_diffusers"),
    "anima's adapter": Case("anima", "AnimaTextConditioner", {}, "anima", prefix="text_conditioner."),
    "ltx": published("ltx", "ltx_transformer_checkpoint_to_diffusers"),
    "ltx2": Case("ltx", LTX2, {"num_layers": 2}, "ltx2", "ltx2_transformer_to_diffusers"),
    "ltx 2.3": Case(
        "ltx",
        LTX2,
        {"num_layers": 2, "use_prompt_embeddings": False}
        | {"gated_attn": True, "cross_attn_mod": True, "audio_gated_attn": True, "audio_cross_attn_mod": True},
        "ltx23",
    ),
}

# Listing -> the weights that are no Linear or convolution of diffusers' class: it has an equalised layer of its own for
# motion, an Embedding, and another class for LTX-2's connectors.
LEFT_OUT = {
    "wan_animate": ("motion_encoder.",),
    "anima": ("llm_adapter.embed.",),
    "ltx23": ("audio_embeddings_connector.", "video_embeddings_connector."),
    "ltx2": ("audio_embeddings_connector.", "video_embeddings_connector."),
}

LEFT = ("wan animate", "anima", "ltx2", "ltx 2.3")  # diffusers has them in other shapes than the host
WHOLE = [name for name in CASES if name not in (*LEFT, "anima's adapter")]

_QWEN3 = {"head_dim": 128, "num_key_value_heads": 8}
_QWEN3_4B = _QWEN3 | {"hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32}
_QWEN3_06B = _QWEN3 | {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16}
_UMT5 = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 2}
_VL = {
    "text_config": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "num_hidden_layers": 2,
        "layer_types": ["full_attention"] * 2,
    },
    "vision_config": {"hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584, "depth": 2},
}
_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768, "num_hidden_layers": 2}
TEXT_ENCODERS = (  # family, the pipeline's name for it, transformers' class, its configuration with two layers
    ("wan", "text_encoder", "UMT5EncoderModel", _UMT5),
    ("qwen_image", "text_encoder", "Qwen2_5_VLForConditionalGeneration", _VL),
    ("z_image", "text_encoder", "Qwen3Model", _QWEN3_4B | {"num_hidden_layers": 2}),
    ("z_image", "text_encoder", "Qwen3ForCausalLM", _QWEN3_4B | {"num_hidden_layers": 2}),
    ("lumina2", "text_encoder", "Gemma2Model", {"num_hidden_layers": 2}),
    ("kandinsky5", "text_encoder", "Qwen2_5_VLForConditionalGeneration", _VL),
    ("kandinsky5", "text_encoder_2", "CLIPTextModel", _CLIP_L),
    ("anima", "text_encoder", "Qwen3Model", _QWEN3_06B | {"num_hidden_layers": 2}),
    ("anima", "text_encoder", "Qwen3ForCausalLM", _QWEN3_06B | {"num_hidden_layers": 2}),
    ("ltx", "text_encoder", "T5EncoderModel", _UMT5 | {"feed_forward_proj": "gated-gelu"}),
)


@cache
def native(name: str) -> Shapes:
    listing = json.loads((KEYS / f"{CASES[name].keys}.json").read_text("utf-8"))
    return {key: tuple(shape) for key, shape in listing.items()}


def adapted(model: torch.nn.Module, prefix: str) -> dict[str, tuple[int, ...]]:
    """What LoRAs are made for: every Linear and convolution of the tree, with the shape of its weight."""
    return {
        prefix + path: tuple(module.weight.shape)
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.modules.conv._ConvNd)
    }


def configured(config: dict[str, Any]) -> dict[str, Any]:
    """A class's configuration made from a config.json, as plain values."""
    with torch.device("meta"):
        return plain(getattr(diffusers, config["_class_name"]).from_config(json.loads(json.dumps(config))).config)


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: json.loads(json.dumps(value)) for key, value in config.items() if not key.startswith("_")}


@cache
def tree(name: str) -> torch.nn.Module:
    with torch.device("meta"):
        return getattr(diffusers, CASES[name].cls)(**CASES[name].config)


def matrices(name: str) -> dict[str, tuple[int, ...]]:
    return adapted(tree(name), CASES[name].prefix)


@pytest.mark.parametrize("name", WHOLE)
def test_a_component_has_all_tensors_of_diffusers_and_no_others(name):
    found = checkpoints.component(FAMILY[CASES[name].family], under(native(name), "diffusion_model."))
    wanted = {key: tuple(tensor.shape) for key, tensor in tree(name).state_dict().items()}
    assert {key: target.delta_shape for key, target in found.places.items()} == wanted
    if found.config:
        assert configured(found.config) == plain(tree(name).config)


@pytest.mark.parametrize("name", [name for name in WHOLE if CASES[name].convert])
def test_a_component_holds_what_diffusers_makes_of_the_published_checkpoint(name):
    """Each row is a number of its own."""
    shapes, checkpoint, count = under(native(name), "diffusion_model."), {}, 0
    for key, shape in shapes.items():
        checkpoint[key] = torch.arange(count, count + shape[0])[:, None]
        count += shape[0]
    found = checkpoints.component(FAMILY[CASES[name].family], shapes).split(checkpoint)
    converted = getattr(single_file_utils, f"convert_{CASES[name].convert}")(dict(checkpoint))
    assert found.keys() == converted.keys()
    assert not [key for key, rows in found.items() if not torch.equal(rows, converted[key])]


def test_a_model_of_which_diffusers_has_more_than_the_table_knows_is_told():
    for name in LEFT:
        with pytest.raises(TargetError, match="no one name in diffusers|two folders of diffusers") as refused:
            checkpoints.component(FAMILY[CASES[name].family], under(native(name), "diffusion_model."))
        assert "diffusion model" in refused.value.remedy


@pytest.mark.parametrize("name", CASES)
def test_every_module_of_diffusers_has_a_place_of_its_own_and_of_its_shape(name):
    family = FAMILY[CASES[name].family]
    assert recognise(native(name)) is family
    names, modules = target_map(family, native(name)).names, matrices(name)
    assert modules
    assert not [path for path in modules if path not in names]
    targets = {path: names[path].target for path in modules}
    assert {path: target.delta_shape for path, target in targets.items()} == modules
    assert len({(target.key, target.rows) for target in targets.values()}) == len(modules)


@pytest.mark.parametrize("keys", sorted({case.keys for case in CASES.values()}))
def test_the_other_matrices_of_a_model_are_known(keys):
    cases = [name for name, case in CASES.items() if case.keys == keys]
    shapes = native(cases[0])
    names = target_map(recognise(shapes), shapes).names
    reached = {names[path].target.key for name in cases for path in matrices(name)}
    left = {key for key, shape in shapes.items() if key.endswith(".weight") and len(shape) > 1} - reached
    prefixes = tuple(f"diffusion_model.{prefix}" for prefix in LEFT_OUT.get(keys, ()))
    assert not {key for key in left if not key.startswith(prefixes)}
    assert bool(left) == bool(prefixes)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.convert])
def test_a_place_holds_the_rows_that_diffusers_takes(name):
    """Each row of a checkpoint is a number of its own; diffusers' converter shows which of them a module gets."""
    case, count, checkpoint = CASES[name], 0, {}
    for key, shape in native(name).items():
        if key.endswith(".weight"):
            checkpoint[key.removeprefix("diffusion_model.")] = torch.arange(count, count + shape[0])[:, None]
            count += shape[0]
    converted = getattr(single_file_utils, f"convert_{case.convert}")(dict(checkpoint))
    names = target_map(FAMILY[case.family], native(name)).names
    for path in matrices(name):
        target = names[path].target
        rows = checkpoint[target.key.removeprefix("diffusion_model.")]
        taken = rows[target.rows.start : target.rows.start + target.rows.length]
        assert torch.equal(taken, converted[f"{path.removeprefix(case.prefix)}.weight"]), path


@pytest.mark.parametrize(("family", "name", "cls", "config"), TEXT_ENCODERS, ids=lambda value: str(value)[:20])
def test_every_module_of_a_pipelines_text_encoder_has_a_place_of_its_shape(family, name, cls, config):
    kind = getattr(transformers, cls)
    with torch.device("meta"):
        modules = adapted(kind(kind.config_class(**config)), f"{name}.")
    modules.pop("text_encoder.lm_head", None)  # nobody loads it
    names = published_map(FAMILY[family]).names
    assert len(modules) > 10
    assert not [path for path in modules if path not in names]
    assert {path: names[path].target.delta_shape for path in modules} == modules
