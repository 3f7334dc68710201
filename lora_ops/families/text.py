"""Text encoders: CLIP-L, CLIP-G and CLIP-H (also as OpenCLIP writes them in checkpoints), T5-XXL and UMT5-XXL."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

from .base import Component, Place, Shapes, identical, layer, placed

_LAYER = "text_model.encoder.layers"
_OPEN_CLIP = {"attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def _clip_places(shapes: Shapes) -> Iterator[Place]:
    """transformers' names, which everybody writes; OpenCLIP keeps them under its own and fuses q, k and v.

    OpenCLIP's `text_projection` is left out: it is stored transposed. Some writers leave out `text_model.`.
    """
    for place in _whole_names(shapes):
        yield place
        short = (place.native or "").removeprefix("text_model.")
        if short != place.native:
            yield place._replace(native=short, diffusers=short)


def _whole_names(shapes: Shapes) -> Iterator[Place]:
    yield from identical({key: shape for key, shape in shapes.items() if not key.startswith("transformer.")})
    for key, shape in shapes.items():
        match = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+?)[._]weight", key)
        if match and match[2] == "attn.in_proj":
            for place in placed(key, None, [f"{_LAYER}.{match[1]}.{name}" for name in _QKV], shape):
                yield place._replace(native=place.diffusers)
        elif match and match[2] in _OPEN_CLIP:
            name = f"{_LAYER}.{match[1]}.{_OPEN_CLIP[match[2]]}"
            yield Place(key, name, name)


def clip_shapes(*, layers: int, width: int) -> Shapes:
    """The weights of a CLIP text encoder as transformers and the host name them."""
    found: dict[str, tuple[int, ...]] = {
        "text_model.embeddings.token_embedding.weight": (49408, width),
        "text_model.embeddings.position_embedding.weight": (77, width),
        "text_projection.weight": (width, width),
    }
    for number in range(layers):
        block = f"{_LAYER}.{number}"
        for name in (*_QKV, "self_attn.out_proj"):
            found |= layer(f"{block}.{name}", width, width)
        found |= layer(f"{block}.mlp.fc1", width * 4, width)
        found |= layer(f"{block}.mlp.fc2", width, width * 4)
        found |= layer(f"{block}.layer_norm1", width)
        found |= layer(f"{block}.layer_norm2", width)
    return found | layer("text_model.final_layer_norm", width)


def _t5_shapes(*, vocabulary: int = 32128, biases: int = 1) -> Shapes:
    """An XXL encoder, of which so many blocks have a relative bias of their own."""
    width, inner = 4096, 10240
    found: dict[str, tuple[int, ...]] = {
        "shared.weight": (vocabulary, width),
        "encoder.final_layer_norm.weight": (width,),
    }
    for number in range(biases):
        found[f"encoder.block.{number}.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, 64)
    for number in range(24):
        block = f"encoder.block.{number}.layer"
        found |= {f"{block}.0.SelfAttention.{name}.weight": (width, width) for name in "qkvo"}
        found |= {f"{block}.1.DenseReluDense.{name}.weight": (inner, width) for name in ("wi_0", "wi_1")}
        found[f"{block}.1.DenseReluDense.wo.weight"] = (width, inner)
        found |= {f"{block}.{number}.layer_norm.weight": (width,) for number in (0, 1)}
    return found


def prefixes(host: str, diffusers: str, *kohya: str) -> Mapping[str, tuple[str, ...]]:
    """Prefixes in LoRA files of the text encoder that the host, diffusers and kohya call so. LyCORIS, which has no name
    of its own for it, calls it as kohya does."""
    unnamed = () if host.startswith("clip_") else ("text_encoders.transformer.",)  # the host tells CLIPs apart
    return {
        "comfy": (f"text_encoders.{host}.transformer.", f"{host}.transformer.", f"{host}.", *unnamed),
        "kohya": kohya,
        "lycoris": kohya,
        "diffusers": (f"{diffusers}.",),
        "peft": ("base_model.model.", f"{diffusers}.base_model.model."),
    }


CLIP_L = Component(
    part="clip",
    places=_clip_places,
    published=partial(clip_shapes, layers=12, width=768),
    sources=(
        "clip_l.transformer.",
        "cond_stage_model.clip_l.transformer.",
        "cond_stage_model.transformer.",
        "conditioner.embedders.0.transformer.",
        "text_encoders.clip_l.transformer.",
    ),
    prefixes=prefixes("clip_l", "text_encoder", "lora_te1_", "lora_te_"),
)

CLIP_L_ALONE = replace(CLIP_L, prefixes=prefixes("clip_l", "text_encoder", "lora_te_", "lora_te1_"))

# HunyuanVideo counts its language model first, though not everybody does; their names differ.
CLIP_L_SECOND = replace(
    CLIP_L,
    prefixes={
        **prefixes("clip_l", "text_encoder", "lora_te2_", "lora_te1_", "lora_te_"),
        "diffusers": ("text_encoder_2.", "text_encoder."),
    },
)

CLIP_G = Component(
    part="clip",
    places=_clip_places,
    published=partial(clip_shapes, layers=32, width=1280),
    sources=("clip_g.transformer.", "conditioner.embedders.1.model.", "text_encoders.clip_g.transformer."),
    prefixes=prefixes("clip_g", "text_encoder_2", "lora_te2_"),
)

# Stable Cascade: OneTrainer and the host say `prior`.
CLIP_G_ALONE = replace(CLIP_G, prefixes=prefixes("clip_g", "text_encoder", "lora_prior_te_", "lora_te_", "lora_te1_"))

CLIP_H = Component(
    part="clip",
    places=_clip_places,
    published=partial(clip_shapes, layers=24, width=1024),
    sources=("clip_h.transformer.", "cond_stage_model.model.", "conditioner.embedders.0.model."),
    prefixes=prefixes("clip_h", "text_encoder", "lora_te_", "lora_te1_"),
)

# Beside CLIP-L (FLUX.1): kohya counts T5 as the third encoder, OneTrainer and diffusers as the second.
T5_SECOND = Component(
    part="clip",
    places=identical,
    published=_t5_shapes,
    sources=("t5xxl.transformer.", "text_encoders.t5xxl.transformer."),
    prefixes=prefixes("t5xxl", "text_encoder_2", "lora_te3_", "lora_te2_"),
)

# Beside CLIP-L and CLIP-G (Stable Diffusion 3) all count it as the third.
T5_THIRD = replace(T5_SECOND, prefixes=prefixes("t5xxl", "text_encoder_3", "lora_te3_"))

# Chroma: kohya keeps FLUX.1's number; the host reads the first.
T5_ALONE = replace(T5_SECOND, prefixes=prefixes("t5xxl", "text_encoder", "lora_te1_", "lora_te_", "lora_te3_"))

UMT5 = Component(
    part="clip",
    places=identical,
    published=partial(_t5_shapes, vocabulary=256384, biases=24),
    sources=("umt5xxl.transformer.", "text_encoders.umt5xxl.transformer."),
    prefixes=prefixes("umt5xxl", "text_encoder", "lora_te_", "lora_te1_"),
)
