"""Kandinsky 5, video (lite and pro) and image: one name in both worlds."""

from __future__ import annotations

from .base import Family, Shapes, denoiser, identical, layer
from .language import QWEN25_VL
from .text import CLIP_L_SECOND


def shapes() -> Shapes:
    """The weights of the video model pro."""
    width, time = 4096, 1024
    found = layer("time_embeddings.in_layer", time, width) | layer("time_embeddings.out_layer", time, time)
    found |= layer("visual_embeddings.in_layer", width, 132)
    for name, outputs, inputs in (("text", width, 3584), ("pooled_text", time, 768)):
        found |= layer(f"{name}_embeddings.in_layer", outputs, inputs) | layer(f"{name}_embeddings.norm", outputs)
    for kind, count, attentions in (("text", 4, ("self",)), ("visual", 60, ("self", "cross"))):
        for number in range(count):
            block = f"{kind}_transformer_blocks.{number}"
            parts = len(attentions) + 1  # the attentions and the feed-forward have a shift, a scale and a gate each
            found |= layer(f"{block}.{kind}_modulation.out_layer", width * 3 * parts, time)
            for attention in attentions:
                for projection in ("to_query", "to_key", "to_value", "out_layer"):
                    found |= layer(f"{block}.{attention}_attention.{projection}", width, width)
                found |= {f"{block}.{attention}_attention.{name}_norm.weight": (128,) for name in ("query", "key")}
            found |= layer(f"{block}.feed_forward.in_layer", width * 4, width, bias=False)
            found |= layer(f"{block}.feed_forward.out_layer", width, width * 4, bias=False)
    return found | layer("out_layer.modulation.out_layer", width * 2, time) | layer("out_layer.out_layer", 64, width)


KANDINSKY5 = Family(
    "kandinsky5",
    "Kandinsky 5",
    components=(denoiser(identical, shapes), QWEN25_VL, CLIP_L_SECOND),
    recognises=lambda shapes: "visual_transformer_blocks.0.cross_attention.to_query.weight" in shapes,
)
