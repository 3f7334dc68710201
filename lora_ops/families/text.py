"""Text encoders: CLIP-L, CLIP-G (also as OpenCLIP writes it in SDXL checkpoints) and T5-XXL."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from .base import Component, Place, Shapes, identical, placed

_LAYER = "text_model.encoder.layers"
_OPEN_CLIP = {"attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def _clip_places(shapes: Shapes) -> Iterator[Place]:
    """transformers' names, which everybody writes; OpenCLIP keeps them under its own and fuses q, k and v.

    OpenCLIP's `text_projection` is left out: it is stored transposed.
    """
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
    }
    for layer in range(layers):
        for name, outputs, inputs in (
            *((name, width, width) for name in (*_QKV, "self_attn.out_proj")),
            ("mlp.fc1", width * 4, width),
            ("mlp.fc2", width, width * 4),
        ):
            found[f"{_LAYER}.{layer}.{name}.weight"] = (outputs, inputs)
            found[f"{_LAYER}.{layer}.{name}.bias"] = (outputs,)
        for name in ("layer_norm1", "layer_norm2"):
            found[f"{_LAYER}.{layer}.{name}.weight"] = found[f"{_LAYER}.{layer}.{name}.bias"] = (width,)
    for name in ("weight", "bias"):
        found[f"text_model.final_layer_norm.{name}"] = (width,)
    found["text_projection.weight"] = (width, width)
    return found


def _t5_shapes() -> Shapes:
    width, inner = 4096, 10240
    found: dict[str, tuple[int, ...]] = {
        "shared.weight": (32128, width),
        "encoder.final_layer_norm.weight": (width,),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 64),
    }
    for block in range(24):
        layer = f"encoder.block.{block}.layer"
        found |= {f"{layer}.0.SelfAttention.{name}.weight": (width, width) for name in "qkvo"}
        found |= {f"{layer}.1.DenseReluDense.{name}.weight": (inner, width) for name in ("wi_0", "wi_1")}
        found[f"{layer}.1.DenseReluDense.wo.weight"] = (width, inner)
        found |= {f"{layer}.{number}.layer_norm.weight": (width,) for number in (0, 1)}
    return found


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
    prefixes={
        "comfy": ("text_encoders.clip_l.transformer.",),
        "kohya": ("lora_te1_", "lora_te_"),
        "diffusers": ("text_encoder.",),
    },
)

# Where it is the only text encoder, a file that PEFT saved for it alone can mean nothing else.
CLIP_L_ALONE = replace(
    CLIP_L, prefixes={**CLIP_L.prefixes, "kohya": ("lora_te_", "lora_te1_"), "peft": ("base_model.model.",)}
)

CLIP_G = Component(
    part="clip",
    places=_clip_places,
    published=partial(clip_shapes, layers=32, width=1280),
    sources=("clip_g.transformer.", "conditioner.embedders.1.model.", "text_encoders.clip_g.transformer."),
    prefixes={
        "comfy": ("text_encoders.clip_g.transformer.",),
        "kohya": ("lora_te2_",),
        "diffusers": ("text_encoder_2.",),
    },
)

# Beside CLIP-L (FLUX.1): kohya counts T5 as the third encoder, OneTrainer and diffusers as the second.
T5_SECOND = Component(
    part="clip",
    places=identical,
    published=_t5_shapes,
    sources=("t5xxl.transformer.", "text_encoders.t5xxl.transformer."),
    prefixes={
        "comfy": ("text_encoders.t5xxl.transformer.",),
        "kohya": ("lora_te3_", "lora_te2_"),
        "diffusers": ("text_encoder_2.",),
    },
)
