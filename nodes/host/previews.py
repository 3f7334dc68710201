"""Previews: pictures that the host's own sampler draws with a model while it learns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import comfy.model_management
import comfy.sample
import comfy.samplers
import latent_preview
import numpy
import torch
from PIL import Image
from torch import Tensor

from ...lora_ops.errors import TrainingError
from ...lora_ops.train.data import of_guise
from ...lora_ops.train.dataset import Dataset, controls_in
from ...lora_ops.train.presets import AUTO, Chosen
from ...lora_ops.train.settings import Settings
from .seeing import sees

SAMPLERS = tuple(comfy.samplers.SAMPLER_NAMES)
SCHEDULERS = tuple(comfy.samplers.SCHEDULER_NAMES)
NEGATIVE = " --n "  # between a prompt and what its picture is to avoid


class Shot(NamedTuple):
    """Conditionings, or texts of which CLIP makes some; without a negative, cfg is 1."""

    positive: Any
    negative: Any | None


@dataclass(frozen=True, eq=False)
class Previews:
    """What is drawn, and how: the same noise each time, so that pictures of different steps can be compared."""

    shots: tuple[Shot, ...]
    latent: Tensor  # (1, channels, …), empty
    settings: Settings
    cfg: float
    scheduler: str
    vae: Any | None
    encoded: Mapping[str, Any]  # the texts of shots, as conditionings
    beside: Mapping[str, Any]  # what these show: the first picture's control pictures

    def draw(self, model: Any, clip: Any | None = None) -> Tensor:
        """A picture of each shot (shots, height, width, 3), 0..1; its texts as clip has them now. Raises the host's
        interrupt."""
        empty = comfy.sample.fix_empty_latent_channels(model, self.latent)
        encoded = self.encoded if clip is None else {text: _encoded(clip, text, self.beside) for text in self.encoded}
        shots = [Shot(*(encoded[each] if isinstance(each, str) else each for each in shot)) for shot in self.shots]
        return torch.cat([self._decoded(model, self._sampled(model, empty, shot)) for shot in shots])

    def _sampled(self, model: Any, empty: Tensor, shot: Shot) -> Tensor:
        settings = self.settings
        return comfy.sample.sample(
            model,
            comfy.sample.prepare_noise(empty, settings.sample_seed),
            settings.sample_steps,
            self.cfg,
            settings.sample_sampler,
            self.scheduler,
            shot.positive,
            shot.positive if shot.negative is None else shot.negative,
            empty,
            callback=lambda *_: comfy.model_management.throw_exception_if_processing_interrupted(),
            disable_pbar=True,
            seed=settings.sample_seed,
        )

    def _decoded(self, model: Any, latent: Tensor) -> Tensor:
        if self.vae is None:
            return _rough(model, latent)
        decoded = self.vae.decode(latent)
        return decoded.reshape(-1, *decoded.shape[-3:])[:1].float().cpu()


def prepared(
    settings: Settings,
    chosen: Chosen,
    model: Any,
    dataset: Dataset,
    clip: Any | None,
    vae: Any | None,
    positive: Sequence[Any],
    negative: Sequence[Any],
) -> Previews:
    """What the samples of a run are: of conditionings, of prompts, or else of the first picture's caption.

    Raises TrainingError for prompts without CLIP, a negative that nobody gives, and a model that has no rough previews
    where there is no VAE.
    """
    prompts = [line for line in settings.sample_prompts.splitlines() if line.strip()]
    if prompts and clip is None:
        raise TrainingError("sample_prompts need a text encoder.", remedy="Connect clip, or sample_positive.")
    if vae is None and not _is_rough(model):
        what = "ComfyUI has no rough previews of this model's latents."
        raise TrainingError(what, remedy="Connect vae, or set sample_every to 0.")
    if len(negative) > 1 and len(negative) != len(positive):
        what = f"There are {len(positive)} sample_positive and {len(negative)} sample_negative."
        raise TrainingError(what, remedy="Connect one negative, or one for each positive.")
    cfg = settings.sample_cfg or chosen.cfg
    usual = negative[0] if len(negative) == 1 else dataset.empty if clip is None else ""
    first = dataset.pictures[0]
    beside = controls_in(first.conditions[0])
    seen = bool(beside) and sees(clip)
    if prompts and seen:
        what = "The text encoder of sample_prompts would be shown no picture to edit."
        raise TrainingError(what, remedy="Connect a conditioning of TextEncodeQwenImageEdit to sample_positive.")
    shots = [Shot(each, negative[n] if len(negative) > 1 else usual) for n, each in enumerate(positive)]
    for line in prompts:
        text, marked, avoided = line.partition(NEGATIVE)
        shots.append(Shot(text.strip(), avoided.strip() if marked else usual))
    if not shots:
        if clip is None or seen or not first.captions:
            shots = [Shot(of_guise(first.conditions[0], 0), of_guise(first.empty, 0) if beside else usual)]
        else:
            shots = [Shot(first.captions[0], usual)]
    if cfg != 1 and any(shot.negative is None for shot in shots):
        if settings.sample_cfg:
            what = f"Samples at a sample_cfg of {cfg:g} need a negative conditioning."
            raise TrainingError(what, remedy="Connect sample_negative or clip, or set sample_cfg to 1.")
        cfg = 1.0
    scheduler = chosen.scheduler if settings.sample_scheduler == AUTO else settings.sample_scheduler
    encoded = {each: _encoded(clip, each, beside) for shot in shots for each in shot if isinstance(each, str)}
    return Previews(tuple(shots), _latent(settings, model, dataset), settings, cfg, scheduler, vae, encoded, beside)


def _latent(settings: Settings, model: Any, dataset: Dataset) -> Tensor:
    """An empty latent like the first picture's, of the size that was asked for."""
    shape = list(dataset.pictures[0].latents[0].shape)
    ratio = model.get_model_object("latent_format").spacial_downscale_ratio
    for place, pixels in ((-2, settings.sample_height), (-1, settings.sample_width)):
        if pixels:
            shape[place] = max(1, round(pixels / ratio))
    return torch.zeros([1, *shape], device=comfy.model_management.intermediate_device())


def _encoded(clip: Any, text: str, beside: Mapping[str, Any]) -> Any:
    encoded = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    return [[cross, {**options, **beside}] for cross, options in encoded]


def _is_rough(model: Any) -> bool:
    latents = model.get_model_object("latent_format")
    return (
        latents.latent_rgb_factors is not None or latent_preview.get_previewer(model.load_device, latents) is not None
    )


def _rough(model: Any, latent: Tensor) -> Tensor:
    """The picture that the host shows while it samples, in the size that the latent means."""
    latents = model.get_model_object("latent_format")
    previewer = latent_preview.get_previewer(model.load_device, latents) or latent_preview.Latent2RGBPreviewer(
        latents.latent_rgb_factors, latents.latent_rgb_factors_bias, latents.latent_rgb_factors_reshape
    )
    picture = previewer.decode_latent_to_preview(model.model.process_latent_in(latent))
    ratio = latents.spacial_downscale_ratio
    size = latent.shape[-1] * ratio, latent.shape[-2] * ratio
    return tensor_of([picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)])


def tensor_of(pictures: Sequence[Image.Image]) -> Tensor:
    """An IMAGE."""
    return torch.stack([torch.from_numpy(numpy.asarray(each).astype(numpy.float32) / 255) for each in pictures])


def pictures_of(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray((image.clamp(0, 1) * 255).round().byte().cpu().numpy()) for image in images]
