"""Qwen-Image and Qwen-Image-Edit: one name in both worlds."""

from __future__ import annotations

from .base import Family, Shapes, denoiser, identical, layer
from .language import QWEN25_VL


def shapes() -> Shapes:
    """The weights of a Qwen-Image transformer."""
    width, head = 3072, 128
    found = layer("img_in", width, 64) | layer("txt_in", width, 3584) | layer("txt_norm", 3584, bias=False)
    for number, inputs in ((1, 256), (2, width)):
        found |= layer(f"time_text_embed.timestep_embedder.linear_{number}", width, inputs)
    for number in range(60):
        block = f"transformer_blocks.{number}"
        for stream in ("img", "txt"):
            found |= layer(f"{block}.{stream}_mod.1", width * 6, width)
            found |= layer(f"{block}.{stream}_mlp.net.0.proj", width * 4, width)
            found |= layer(f"{block}.{stream}_mlp.net.2", width, width * 4)
        for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            found |= layer(f"{block}.attn.{name}", width, width)
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            found |= layer(f"{block}.attn.{name}", head, bias=False)
    return found | layer("norm_out.linear", width * 2, width) | layer("proj_out", 64, width)


QWEN_IMAGE = Family(
    "qwen_image",
    "Qwen-Image",
    components=(denoiser(identical, shapes), QWEN25_VL),
    recognises=lambda shapes: "txt_norm.weight" in shapes and "transformer_blocks.0.img_mod.1.weight" in shapes,
)
