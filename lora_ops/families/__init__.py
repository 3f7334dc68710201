"""Families: the names of each kind of model, as tables.

To add a family: write a file beside `flux.py` (its rows, its published shapes, how to recognise it) and name
the Family in `FAMILIES` below; put a key -> shape listing of the real model in `tests/keys/`. The laws in
`tests/laws/` then hold it to account.
"""

from __future__ import annotations

from .base import Component, Family, Place, Shapes, identical, under
from .flux import FLUX
from .text import CLIP_G, CLIP_L, T5_SECOND
from .unet import SD15, SDXL

FAMILIES: tuple[Family, ...] = (SD15, SDXL, FLUX)

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
            prefixes={"comfy": ("diffusion_model.",), "kohya": ("lora_unet_",)},
        ),
        CLIP_L,
        CLIP_G,
        T5_SECOND,
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
        if not denoiser and present == encoders:
            return family
    return UNKNOWN


__all__ = ["FAMILIES", "UNKNOWN", "Component", "Family", "Place", "Shapes", "recognise", "under"]
