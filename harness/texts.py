"""Texts: random text encoders of the host's own classes, of few layers and the families' own widths."""

from __future__ import annotations

from typing import Any

import torch

_FEW = {"num_hidden_layers": 3, "intermediate_size": 64}
_T5 = {"num_layers": 1, "d_model": 64, "d_ff": 64, "d_kv": 8, "num_heads": 8}  # as wide as a small model's text


def clip(family: str) -> Any:
    """A CLIP in float32, in inference mode as the host's loaders make it."""
    import comfy.sd
    import comfy.sd1_clip
    import comfy.sdxl_clip
    import comfy.text_encoders.flux

    classes = {
        "sd15": (comfy.sd1_clip.SD1ClipModel, comfy.sd1_clip.SD1Tokenizer),
        "sdxl": (comfy.sdxl_clip.SDXLClipModel, comfy.sdxl_clip.SDXLTokenizer),
        "flux": (comfy.text_encoders.flux.FluxClipModel, comfy.text_encoders.flux.FluxTokenizer),
    }

    class Target:
        params = {}  # noqa: RUF012
        clip, tokenizer = classes[family]

    configs = {"clip_l_model_config": _FEW, "clip_g_model_config": _FEW, "t5xxl_model_config": _T5}
    with torch.inference_mode():
        made = comfy.sd.CLIP(Target, model_options={**configs, "dtype": torch.float32})
        generator = torch.Generator().manual_seed(0)
        for name, weight in made.cond_stage_model.named_parameters():
            if weight.ndim:
                scale = 1.0 if "embedding" in name else max(1, weight.shape[1:].numel()) ** -0.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale + (weight.ndim == 1))
    return made
