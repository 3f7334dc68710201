"""Families: the names of each kind of model, as tables.

To add a family: write a file beside `flux.py` (its rows, its published shapes, how to recognise it) and name
the Family in `FAMILIES` below; put a key -> shape listing of the real model in `tests/keys/`. The laws in
`tests/laws/` then hold it to account.
"""

from __future__ import annotations

from .anima import ANIMA
from .base import DENOISER, ROLES, Component, Family, Place, Shapes, identical, under
from .cascade import CASCADE_B, CASCADE_C, WUERSTCHEN
from .flux import CHROMA, FLUX, FLUX2, FLUX2_KLEIN
from .hunyuan_video import HUNYUAN_VIDEO
from .kandinsky import KANDINSKY_DECODER, KANDINSKY_PRIOR
from .kandinsky5 import KANDINSKY5
from .language import GEMMA2, LLAMA, QWEN3_06B, QWEN3_4B, QWEN25_VL
from .ltx import LTX
from .lumina2 import LUMINA2, Z_IMAGE
from .qwen_image import QWEN_IMAGE
from .sd3 import SD3, SD35_MEDIUM
from .text import CLIP_G, CLIP_H, CLIP_L, T5_SECOND, UMT5
from .unet import SD2, SD15, SDXL
from .wan import WAN

FAMILIES: tuple[Family, ...] = (
    SD15,
    SD2,
    SDXL,
    SD3,
    SD35_MEDIUM,
    FLUX,
    FLUX2,
    FLUX2_KLEIN,
    CHROMA,
    HUNYUAN_VIDEO,
    CASCADE_C,
    CASCADE_B,
    WUERSTCHEN,
    KANDINSKY_PRIOR,
    KANDINSKY_DECODER,
    WAN,
    QWEN_IMAGE,
    Z_IMAGE,
    LUMINA2,
    KANDINSKY5,
    ANIMA,
    LTX,
)

# A model that no table knows still has its own names, and the text encoders it shares with others.
UNKNOWN = Family(
    "unknown",
    "a model of an unknown family",
    components=(
        Component(
            part="model",
            places=lambda shapes: (place._replace(diffusers=None) for place in identical(shapes)),
            published=dict,
            sources=("diffusion_model.", "model.diffusion_model."),
            prefixes=DENOISER,
        ),
        CLIP_L,
        CLIP_G,
        CLIP_H,
        T5_SECOND,
        UMT5,
        LLAMA,
        QWEN3_06B,
        QWEN3_4B,
        QWEN25_VL,
        GEMMA2,
    ),
    recognises=lambda shapes: False,
)


def recognise(shapes: Shapes) -> Family:
    """The family of these weights (a model's, a checkpoint's, or text encoders' alone), else UNKNOWN.

    Text encoders alone are of the first family that has just these.
    """
    present = {component.sources for component, _, _ in UNKNOWN.located(shapes)}
    denoiser = UNKNOWN.components[0].sources in present
    for family in FAMILIES:
        for component, _, inside in family.located(shapes):
            if component.part == "model" and family.recognises(inside):
                return family
        encoders = {component.sources for component in family.components if component.part == "clip"}
        if encoders and not denoiser and present == encoders:
            return family
    return UNKNOWN


__all__ = ["FAMILIES", "ROLES", "UNKNOWN", "Component", "Family", "Place", "Shapes", "recognise", "under"]
