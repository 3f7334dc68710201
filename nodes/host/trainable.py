"""Trainable: what a model needs beside noise and text: control pictures, which training gives as the host's nodes do,
and more that it does not, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ...lora_ops.errors import TrainingError
from ...lora_ops.train.data import Guises
from ...lora_ops.train.dataset import BESIDE, REFERENCES, Dataset, Picture, options_of

# The host's class of a model -> what it is.
NOT_TRAINED: Mapping[str, str] = {
    "SDXLRefiner": "the refiner of SDXL",
    "SD21UNCLIP": "unCLIP, which draws from pictures",
    "SD_X4Upscaler": "an upscaler",
    "StableCascade_B": "stage B of Stable Cascade, which draws what stage C describes",
    "WAN21_Vace": "Wan VACE, which takes a control video",
    "WAN21_Camera": "Wan with camera control",
    "WAN21_HuMo": "Wan HuMo, which takes sound",
    "WAN22_S2V": "Wan S2V, which takes sound",
    "WAN22_Animate": "Wan Animate, which takes a video",
    "HunyuanVideoI2V": "image-to-video of HunyuanVideo",
    "HunyuanVideoSkyreelsI2V": "image-to-video of HunyuanVideo",
}

ALWAYS = ("Kandinsky5",)  # takes a picture beside the noise always: nothing, where it makes videos of text

# The host's class of a model, and no class made of it -> where in a conditioning it looks for control pictures.
EDITS: Mapping[str, str] = {
    "Flux": REFERENCES,
    "Flux2": REFERENCES,
    "QwenImage": REFERENCES,
    "SD15_instructpix2pix": BESIDE,
    "SDXL_instructpix2pix": BESIDE,
}

# In a conditioning: what it means.
GIVEN = {
    REFERENCES: "pictures to edit",
    BESIDE: "a picture to go on from",
    "concat_mask": "a mask to paint in",
    "concat_image": "a picture to go on from",
    "noise_concat": "a picture to go on from",
    "clip_vision_output": "a picture's description",
    "unclip_conditioning": "a picture's description",
    "vace_frames": "a control video",
    "control_video": "a control video",
    "audio_embed": "sound",
}


def require_trainable(model: Any, dataset: Dataset) -> None:
    """Raises TrainingError for what this version would train wrongly, or not at all."""
    kind = type(model.model)
    for each in kind.__mro__:
        if each.__name__ in NOT_TRAINED:
            what = f"The model is {NOT_TRAINED[each.__name__]}: this version does not train it."
            raise TrainingError(what, remedy="Train the family's text-to-image model.", model=kind.__name__)
    way, beside = _edits(model.model, dataset.pictures[0].latents[0][None])
    if beside and way != BESIDE:
        what = "The model takes a picture beside the noise (inpainting or image-to-video): not trained yet."
        raise TrainingError(what, remedy="Train the family's text-to-image model.", model=kind.__name__)
    for picture in (*dataset.pictures, *dataset.held_out):
        if any(each.ndim > 3 and each.shape[1] > 1 for each in picture.latents):
            frames = picture.latents[0].shape[1]
            what = f"is a video of {frames} latent frames: this version trains on pictures."
            raise TrainingError(what, file=picture.name, remedy="Give single frames.")
        try:
            _require_controls(picture, way)
        except TrainingError as error:
            error.file = picture.name
            raise


def _require_controls(picture: Picture, way: str | None) -> None:
    """Raises TrainingError for control pictures that a model cannot take, and where it needs one."""
    latent, alone = picture.latents[0], way == BESIDE
    given = [options for condition in picture.conditions for options in options_of(condition)]
    for name, meaning in GIVEN.items():
        if name != way and any(options.get(name) is not None for options in given):
            what = f"comes with {meaning} ({name}), which this version does not train with."
            raise TrainingError(what, remedy="Give it its caption's own conditioning.")
    shows = [options[way] for options in given if way and options.get(way) is not None]
    guises = any(isinstance(each, Guises) for each in picture.conditions)
    if shows and len(picture.latents) > 1 and not guises:
        what = f"is learned mirrored, too, and its conditioning shows a picture as it is ({way})."
        raise TrainingError(what, remedy="Turn mirror off, or give control_images.")
    if shows and picture.controls:
        what = f"comes with control pictures and with a conditioning that has some ({way})."
        raise TrainingError(what, remedy="Give one of the two.")
    missing = not picture.controls and len(shows) < len(given)
    if alone and (missing or any(len(each) > 1 for each in picture.controls)):
        what = "needs one control picture: the model takes it beside the noise."
        raise TrainingError(what, remedy="Give each picture the one that it is made of.")
    every = [*chain(*picture.controls), *(each[0] for show in shows for each in ([show] if alone else show))]
    for control in every:
        if len(control) != len(latent) or (alone and control.shape != latent.shape):
            sizes = (" x ".join(map(str, each.shape)) for each in (control, latent))
            what = "has a latent of {1}, its control picture one of {0}.".format(*sizes)
            raise TrainingError(what, remedy="Give pictures of one shape, encoded by the model's VAE.")


def paired(model: Any, dataset: Dataset) -> Dataset:
    """The same with control pictures in the conditions that go with them, as the host's nodes ReferenceLatent and
    InstructPixToPixConditioning have them. Raises TrainingError for a model that takes none."""

    def picture(each: Picture) -> Picture:
        if not each.controls:
            return each
        beside = each.beside and picture(each.beside)
        way, _ = _edits(model, each.latents[0][None])
        if way is None:
            what = "has a control picture, and the model takes none."
            remedy = "Train FLUX.1, FLUX.2, Qwen-Image-Edit or InstructPix2Pix, or take the control pictures out."
            raise TrainingError(what, file=each.name, remedy=remedy, model=type(model).__name__)

        def shown(condition: Any) -> Any:
            found = Guises(_with(condition, way, controls) for controls in each.controls)
            return found if len(found) > 1 else found[0]

        empty = each.empty if dataset.empty is None else shown(dataset.empty)
        return replace(each, conditions=tuple(map(shown, each.conditions)), empty=empty, controls=(), beside=beside)

    learned, held_out = (tuple(map(picture, of)) for of in (dataset.pictures, dataset.held_out))
    return replace(dataset, pictures=learned, held_out=held_out)


def _with(condition: Sequence[Any], way: str, controls: Sequence[Tensor]) -> list[Any]:
    every = [each[None] for each in controls]
    return [[cross, {**options, way: every if way == REFERENCES else every[0]}] for cross, options in condition]


def _edits(model: Any, latent: Tensor) -> tuple[str | None, bool]:
    """Where a model looks for control pictures, None for one that takes none; and whether it takes a picture beside the
    noise, of an edit or for another end."""
    kind, given = type(model).__name__, {"noise": latent, "latent_image": latent, "device": torch.device("cpu")}
    beside, way = None if kind in ALWAYS else model.concat_cond(**given), EDITS.get(kind)
    if beside is not None and way == REFERENCES:  # FLUX.1's variants: with a picture alone, or with a mask
        way = BESIDE if beside.shape[1] == latent.shape[1] else None
    return way, beside is not None
