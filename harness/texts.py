"""Texts: random text encoders of the host's own classes, of few layers and as wide as the small models' text."""

from __future__ import annotations

from typing import Any

import torch

_FEW = {"num_hidden_layers": 3, "intermediate_size": 64}
_T5 = {"num_layers": 1, "d_model": 64, "d_ff": 64, "d_kv": 8, "num_heads": 8}
ROWS = 5000  # of a vocabulary, after which its embeddings come again


def clip(family: str) -> Any:
    """A CLIP in float32, in inference mode as the host's loaders make it."""
    import comfy.sd

    class Target:
        params = {}  # noqa: RUF012
        clip, tokenizer = _classes(family)

    configs = {f"{name}_model_config": _FEW for name in ("clip_l", "clip_g", "clip_h")}
    configs |= {"t5xxl_model_config": _T5}
    with torch.inference_mode():
        options = {**configs, "dtype": torch.float32}
        made = comfy.sd.CLIP(Target, model_options=options)
        generator = torch.Generator().manual_seed(0)
        for name, weight in made.cond_stage_model.named_parameters():
            if weight.ndim:
                scale = 1.0 if "embedding" in name else max(1, weight.shape[1:].numel()) ** -0.5
                rows = torch.randn(min(len(weight), ROWS), *weight.shape[1:], generator=generator)
                rows = rows.repeat(-(-len(weight) // ROWS), *(1 for _ in weight.shape[1:]))[: len(weight)]
                weight.copy_(rows * scale + (weight.ndim == 1))
    return made


def _classes(family: str) -> tuple[Any, Any]:
    import comfy.sd1_clip
    import comfy.sdxl_clip
    import comfy.text_encoders.flux
    import comfy.text_encoders.pixart_t5
    import comfy.text_encoders.sd2_clip
    import comfy.text_encoders.sd3_clip

    encoders = comfy.text_encoders
    return {
        "sd15": (comfy.sd1_clip.SD1ClipModel, comfy.sd1_clip.SD1Tokenizer),
        "sd2": (encoders.sd2_clip.SD2ClipModel, encoders.sd2_clip.SD2Tokenizer),
        "sdxl": (comfy.sdxl_clip.SDXLClipModel, comfy.sdxl_clip.SDXLTokenizer),
        "cascade_c": (comfy.sdxl_clip.StableCascadeClipModel, comfy.sdxl_clip.StableCascadeTokenizer),
        "sd3": (encoders.sd3_clip.sd3_clip(t5=False), encoders.sd3_clip.SD3Tokenizer),
        "flux": (encoders.flux.FluxClipModel, encoders.flux.FluxTokenizer),
        "chroma": (encoders.pixart_t5.PixArtT5XXL, encoders.pixart_t5.PixArtTokenizer),
    }[family]
