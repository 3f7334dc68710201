"""Kandinsky 2.2, prior and decoder: no host has them, so diffusers' names are the native ones."""

from __future__ import annotations

from collections.abc import Sequence

from .base import Family, Shapes, denoiser, identical, layer


def prior_shapes(*, width: int = 2048, depth: int = 20, embedding: int = 1280) -> Shapes:
    """The weights of the prior, a transformer from the text's embedding to the image's."""
    found: dict[str, tuple[int, ...]] = {
        "positional_embedding": (1, 81, width),
        "prd_embedding": (1, 1, width),
        "clip_mean": (1, embedding),
        "clip_std": (1, embedding),
    }
    for name in ("time_embedding.linear_1", "time_embedding.linear_2"):
        found |= layer(name, width, width)
    for name in ("proj_in", "embedding_proj", "encoder_hidden_states_proj"):
        found |= layer(name, width, embedding)
    for number in range(depth):
        block = f"transformer_blocks.{number}"
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            found |= layer(f"{block}.attn1.{name}", width, width)
        found |= layer(f"{block}.ff.net.0.proj", width * 4, width)
        found |= layer(f"{block}.ff.net.2", width, width * 4)
        found |= layer(f"{block}.norm1", width)
        found |= layer(f"{block}.norm3", width)
    found |= layer("norm_out", width)
    return found | layer("proj_to_clip_embeddings", embedding, width)


def decoder_shapes(
    *, widths: Sequence[int] = (384, 768, 1152, 1536), resnets: int = 3, embedding: int = 1280, context: int = 768
) -> Shapes:
    """The weights of the decoder: a UNet whose samplers are resnets, with attention below the first level."""
    time, last = widths[0] * 4, len(widths) - 1
    found = layer("conv_in", widths[0], 4, 3, 3)

    def resnet(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
        found = layer(f"{name}.norm1", inputs) | layer(f"{name}.norm2", outputs)
        found |= layer(f"{name}.conv1", outputs, inputs, 3, 3)
        found |= layer(f"{name}.conv2", outputs, outputs, 3, 3)
        found |= layer(f"{name}.time_emb_proj", outputs * 2, time)
        return found | (layer(f"{name}.conv_shortcut", outputs, inputs, 1, 1) if inputs != outputs else {})

    def attention(name: str, width: int) -> dict[str, tuple[int, ...]]:
        found = layer(f"{name}.group_norm", width)
        for projection in ("to_q", "to_k", "to_v", "to_out.0"):
            found |= layer(f"{name}.{projection}", width, width)
        for projection in ("add_k_proj", "add_v_proj"):
            found |= layer(f"{name}.{projection}", width, context)
        return found

    found |= layer("time_embedding.linear_1", time, widths[0])
    found |= layer("time_embedding.linear_2", time, time)
    found |= layer("add_embedding.image_proj", time, embedding)
    found |= layer("add_embedding.image_norm", time)
    found |= layer("encoder_hid_proj.image_embeds", context * 32, embedding)
    found |= layer("encoder_hid_proj.norm", context)
    width, skips = widths[0], [widths[0]]
    for level in range(len(widths)):
        block = f"down_blocks.{level}"
        for number in range(resnets):
            found |= resnet(f"{block}.resnets.{number}", width, widths[level])
            width = widths[level]
            if level:
                found |= attention(f"{block}.attentions.{number}", width)
            skips.append(width)
        if level < last:
            found |= resnet(f"{block}.downsamplers.0", width, width)
            skips.append(width)
    for number in (0, 1):
        found |= resnet(f"mid_block.resnets.{number}", width, width)
    found |= attention("mid_block.attentions.0", width)
    for level in reversed(range(len(widths))):
        block = f"up_blocks.{last - level}"
        for number in range(resnets + 1):
            found |= resnet(f"{block}.resnets.{number}", width + skips.pop(), widths[level])
            width = widths[level]
            if level:
                found |= attention(f"{block}.attentions.{number}", width)
        if level:
            found |= resnet(f"{block}.upsamplers.0", width, width)
    found |= layer("conv_norm_out", width)
    return found | layer("conv_out", 8, width, 3, 3)


_PARAMETERS = {name: name for name in ("clip_mean", "clip_std", "positional_embedding", "prd_embedding")}

KANDINSKY_PRIOR = Family(
    "kandinsky22_prior",
    "Kandinsky 2.2 (prior)",
    components=(denoiser(identical, prior_shapes, "prior", _PARAMETERS),),
    recognises=lambda shapes: "prd_embedding" in shapes and "proj_to_clip_embeddings.weight" in shapes,
)

KANDINSKY_DECODER = Family(
    "kandinsky22_decoder",
    "Kandinsky 2.2 (decoder)",
    components=(denoiser(identical, decoder_shapes, "unet"),),
    recognises=lambda shapes: "encoder_hid_proj.image_embeds.weight" in shapes,
)
