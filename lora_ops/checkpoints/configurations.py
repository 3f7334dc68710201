"""What diffusers' config.json says of a denoiser, told from the shapes of its weights.

What no shape tells is diffusers' default for the class, which the published models have. A family is here if diffusers
makes of this the configuration of each of its published models.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from ..families import Family, Shapes

Config = dict[str, Any]


def config_of(family: Family, shapes: Shapes) -> Config | None:
    """The config.json of a denoiser of a family (diffusers' names -> shapes); None where shapes do not tell enough."""
    made = _CONFIGS.get(family.name)
    return made(shapes) if made else None


def _count(shapes: Shapes, stack: str) -> int:
    return len({found[1] for name in shapes if (found := re.match(rf"{stack}\.(\d+)\.", name))})


def _heads(width: int, head: int) -> Config:
    return {"attention_head_dim": head, "num_attention_heads": width // head}


def _blocks(shapes: Shapes) -> Config:
    """What FLUX.1, FLUX.2 and Chroma have in common."""
    width, channels = shapes["x_embedder.weight"]
    return {
        "in_channels": channels,
        "num_layers": _count(shapes, "transformer_blocks"),
        "num_single_layers": _count(shapes, "single_transformer_blocks"),
        **_heads(width, shapes["transformer_blocks.0.attn.norm_q.weight"][0]),
        "joint_attention_dim": shapes["context_embedder.weight"][1],
    }


def _flux(shapes: Shapes) -> Config:
    channels, found = shapes["proj_out.weight"][0], _blocks(shapes)
    return {
        "_class_name": "FluxTransformer2DModel",
        **found,
        **({"out_channels": channels} if channels != found["in_channels"] else {}),
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
    }


def _flux2(shapes: Shapes) -> Config:
    width, inner = shapes["transformer_blocks.0.ff.linear_out.weight"]
    return {
        "_class_name": "Flux2Transformer2DModel",
        **_blocks(shapes),
        "timestep_guidance_channels": shapes["time_guidance_embed.timestep_embedder.linear_1.weight"][1],
        "mlp_ratio": inner / width,
        "guidance_embeds": "time_guidance_embed.guidance_embedder.linear_1.weight" in shapes,
    }


def _chroma(shapes: Shapes) -> Config:
    inner, channels = shapes["distilled_guidance_layer.in_proj.weight"]
    return {
        "_class_name": "ChromaTransformer2DModel",
        **_blocks(shapes),
        "approximator_num_channels": channels,
        "approximator_hidden_dim": inner,
        "approximator_layers": _count(shapes, r"distilled_guidance_layer\.layers"),
    }


def _sd3(shapes: Shapes) -> Config:
    width, channels, patch, _ = shapes["pos_embed.proj.weight"]
    count = _count(shapes, "transformer_blocks")
    twice = [number for number in range(count) if f"transformer_blocks.{number}.attn2.to_q.weight" in shapes]
    return {
        "_class_name": "SD3Transformer2DModel",
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0] // patch**2,
        "num_layers": count,
        **_heads(width, 64),
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "caption_projection_dim": shapes["context_embedder.weight"][0],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "pos_embed_max_size": math.isqrt(shapes["pos_embed.pos_embed"][1]),
        "dual_attention_layers": twice,
        "qk_norm": "rms_norm" if "transformer_blocks.0.attn.norm_q.weight" in shapes else None,
    }


def _wan(shapes: Shapes) -> Config:
    width, channels, *patch = shapes["patch_embedding.weight"]
    count, vace = _count(shapes, "blocks"), _count(shapes, "vace_blocks")
    found = {
        "_class_name": "WanVACETransformer3DModel" if vace else "WanTransformer3DModel",
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0] // math.prod(patch),
        **_heads(width, 128),
        "text_dim": shapes["condition_embedder.text_embedder.linear_1.weight"][1],
        "freq_dim": shapes["condition_embedder.time_embedder.linear_1.weight"][1],
        "ffn_dim": shapes["blocks.0.ffn.net.0.proj.weight"][0],
        "num_layers": count,
        "cross_attn_norm": "blocks.0.norm2.weight" in shapes,
        "image_dim": shapes.get("condition_embedder.image_embedder.norm1.weight", (None,))[0],
        "added_kv_proj_dim": shapes.get("blocks.0.attn2.add_k_proj.weight", (None, None))[1],
    }
    if vace:
        channels = shapes["vace_patch_embedding.weight"][1]
        found |= {"vace_layers": list(range(0, count, count // vace)), "vace_in_channels": channels}
    return found


def _qwen_image(shapes: Shapes) -> Config:
    width, channels = shapes["img_in.weight"]
    return {
        "_class_name": "QwenImageTransformer2DModel",
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0] // 4,
        "num_layers": _count(shapes, "transformer_blocks"),
        **_heads(width, shapes["transformer_blocks.0.attn.norm_q.weight"][0]),
        "joint_attention_dim": shapes["txt_in.weight"][1],
    }


def _z_image(shapes: Shapes) -> Config | None:
    width, channels = shapes["all_x_embedder.2-1.weight"]
    inner = shapes["layers.0.feed_forward.w1.weight"][0], shapes["t_embedder.mlp.0.weight"][0]
    if inner != (width * 8 // 3, 1024):  # which are no choice there
        return None
    (head,) = shapes["layers.0.attention.norm_q.weight"]
    return {
        "_class_name": "ZImageTransformer2DModel",
        "in_channels": channels // 4,
        "dim": width,
        "n_layers": _count(shapes, "layers"),
        "n_refiner_layers": _count(shapes, "noise_refiner"),
        "n_heads": width // head,
        "n_kv_heads": shapes["layers.0.attention.to_k.weight"][0] // head,
        "cap_feat_dim": shapes["cap_embedder.0.weight"][0],
    }


def _lumina2(shapes: Shapes) -> Config:
    width, channels = shapes["x_embedder.weight"]
    (head,) = shapes["layers.0.attn.norm_q.weight"]
    return {
        "_class_name": "Lumina2Transformer2DModel",
        "in_channels": channels // 4,
        "hidden_size": width,
        "num_layers": _count(shapes, "layers"),
        "num_refiner_layers": _count(shapes, "noise_refiner"),
        "num_attention_heads": width // head,
        "num_kv_heads": shapes["layers.0.attn.to_k.weight"][0] // head,
        "cap_feat_dim": shapes["time_caption_embed.caption_embedder.0.weight"][0],
    }


def _ltx(shapes: Shapes) -> Config:
    width, channels = shapes["proj_in.weight"]
    return {
        "_class_name": "LTXVideoTransformer3DModel",
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0],
        **_heads(width, 64),
        "cross_attention_dim": shapes["transformer_blocks.0.attn2.to_k.weight"][1],
        "num_layers": _count(shapes, "transformer_blocks"),
        "caption_channels": shapes["caption_projection.linear_1.weight"][1],
    }


def _unet(shapes: Shapes) -> Config:
    levels = range(_count(shapes, "down_blocks"))
    widths = [shapes[f"down_blocks.{level}.resnets.0.conv1.weight"][0] for level in levels]
    depths = [_count(shapes, rf"down_blocks\.{level}\.attentions\.0\.transformer_blocks") for level in levels]
    kinds = ["CrossAttn" if depth else "" for depth in depths]
    linear = len(shapes["mid_block.attentions.0.proj_in.weight"]) == 2
    found = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 128 if "add_embedding.linear_1.weight" in shapes else 64,
        "in_channels": shapes["conv_in.weight"][1],
        "out_channels": shapes["conv_out.weight"][0],
        "block_out_channels": widths,
        "down_block_types": [f"{kind}DownBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpBlock2D" for kind in reversed(kinds)],
        "layers_per_block": _count(shapes, r"down_blocks\.0\.resnets"),
        "transformer_layers_per_block": [depth or 1 for depth in depths] if max(depths) > 1 else 1,
        "cross_attention_dim": shapes["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"][1],
        "use_linear_projection": linear,
        "attention_head_dim": [max(width // 64, 1) for width in widths] if linear else 8,  # which means their number
    }
    if pooled := shapes.get("add_embedding.linear_1.weight"):
        found |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": pooled[1],
        }
    return found


_CONFIGS: Mapping[str, Callable[[Shapes], Config | None]] = {
    **dict.fromkeys(("sd15", "sd2", "sdxl"), _unet),
    **dict.fromkeys(("sd3", "sd35_medium"), _sd3),
    "flux": _flux,
    **dict.fromkeys(("flux2", "flux2_klein"), _flux2),
    "chroma": _chroma,
    "wan": _wan,
    "qwen_image": _qwen_image,
    "z_image": _z_image,
    "lumina2": _lumina2,
    "ltx": _ltx,
}
