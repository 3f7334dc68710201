"""Trainable: what needs more than noise and text, which training does not give it, by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ...lora_ops.errors import TrainingError
from ...lora_ops.train.dataset import Dataset

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

# In a conditioning: what it means.
GIVEN = {
    "reference_latents": "pictures to edit",
    "concat_latent_image": "a picture to go on from",
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
    latent = dataset.pictures[0].latents[0][None]
    if model.model.concat_cond(noise=latent, device=torch.device("cpu")) is not None:
        what = "The model takes a picture beside the noise (inpainting, editing or image-to-video): not trained yet."
        raise TrainingError(what, remedy="Train the family's text-to-image model.", model=kind.__name__)
    for picture in (*dataset.pictures, *dataset.held_out):
        if any(each.ndim > 3 and each.shape[1] > 1 for each in picture.latents):
            frames = picture.latents[0].shape[1]
            what = f"is a video of {frames} latent frames: this version trains on pictures."
            raise TrainingError(what, file=picture.name, remedy="Give single frames.")
        for name in _given(picture.conditions):
            what = f"comes with {GIVEN[name]} ({name}), which this version does not train with."
            raise TrainingError(what, file=picture.name, remedy="Give it its caption's own conditioning.")


def _given(conditions: tuple[Any, ...]) -> Iterator[str]:
    for condition in conditions:
        for _, options in condition:
            yield from (name for name in GIVEN if options.get(name) is not None)
