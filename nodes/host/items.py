"""Items: pictures of a data set as a model of the host learns them, latents scaled and conditionings looked through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...lora_ops.errors import TrainingError, shown
from ...lora_ops.train.data import Guises, Item
from ...lora_ops.train.dataset import Dataset, Picture
from .trainable import paired
from .wrapping import Prompt, Text

# What of a conditioning changes how sampling goes on around the model, and means nothing for one picture of a step.
REFUSED = ("control", "gligen", "hooks", "area", "mask", "timestep_start", "timestep_end", "start_percent")


class Items:
    """Makes items for a model, by its patcher; text is its text encoder, where that trains."""

    def __init__(self, patcher: Any, text: Text | None) -> None:
        self._patcher, self._text = patcher, text

    def item(
        self,
        latent: Tensor,
        condition: Sequence[Any],
        guidance: float | None = None,
        *,
        caption: str | None = None,
        **more: Any,
    ) -> Item:
        """An item from one latent of a LATENT (channels, …) and one CONDITIONING, and where the text encoder trains
        its caption.

        guidance is what a guidance-distilled model (FLUX.1 dev) is told, instead of what the conditioning says. Raises
        TrainingError for a conditioning that is more than a description of one picture, for guidance to a model that is
        told none, and where a caption is missing.
        """
        return Item((self._scaled(latent),), (self._described(condition, caption, guidance),), **more)

    def items(self, dataset: Dataset, guidance: float | None = None) -> tuple[list[Item], list[Item]]:
        """What to learn from and what is only looked at. Raises TrainingError like item, naming the picture."""
        dataset = paired(self._patcher.model, dataset)

        def described(condition: Any, caption: str | None) -> Any:
            if isinstance(condition, Guises):
                return Guises(self._described(each, caption, guidance) for each in condition)
            return self._described(condition, caption, guidance)

        empty = None if dataset.empty is None else described(dataset.empty, "")

        def item(picture: Picture, dropout: float, latents: tuple[Tensor, ...] = ()) -> Item:
            latents = latents or tuple(map(self._scaled, picture.latents))
            captions = picture.captions or [None] * len(picture.conditions)
            try:
                return Item(
                    latents,
                    tuple(
                        described(condition, caption)
                        for condition, caption in zip(picture.conditions, captions, strict=True)
                    ),
                    tuple(_placed(mask, picture.latents[0]) for mask in picture.masks),
                    empty if picture.empty is None else described(picture.empty, ""),
                    dropout,
                    picture.repeats,
                    picture.weight,
                    picture.of_base,
                    picture.beside and item(picture.beside, 0.0, latents),
                )
            except TrainingError as error:
                error.file = picture.name
                raise

        learned = [item(each, dataset.dropout) for each in dataset.pictures]
        return learned, [item(each, 0.0) for each in dataset.held_out]

    def _scaled(self, latent: Tensor) -> Tensor:
        with torch.inference_mode(False):
            return self._patcher.model.process_latent_in(latent[None].float().clone())[0]

    def _described(
        self, condition: Sequence[Any], caption: str | None, guidance: float | None
    ) -> Prompt | Sequence[Any]:
        if len(condition) != 1:
            what = f"A picture has {len(condition)} conditionings at once; it should have one."
            raise TrainingError(what, remedy="Connect the prompt's own conditioning.")
        ((cross, options),) = condition
        for name in REFUSED:
            if options.get(name) is not None:
                what = f"A picture's conditioning has {shown(name)}, which training does not use."
                raise TrainingError(what, remedy="Connect the prompt's own conditioning.")
        if guidance is not None:
            if not self._patcher.model.model_config.unet_config.get("guidance_embed"):
                raise TrainingError("The model is told no guidance.", remedy="Leave guidance out.")
            options = {**options, "guidance": guidance}
        if self._text is None:
            return [[cross, options]]
        if caption is None:
            what = "A picture has a conditioning and no caption, which the text encoder could learn from."
            raise TrainingError(what, remedy="Give captions, or train the model alone.")
        return self._text.prompt(caption, options)


def _placed(mask: Tensor, latent: Tensor) -> Tensor:
    """A mask (1, height, width) for a latent (channels, …, height, width)."""
    if mask.shape[-2:] != latent.shape[-2:]:
        sizes = (" x ".join(map(str, each.shape[-2:])) for each in (mask, latent))
        raise TrainingError("A mask is of {}, its latent of {}.".format(*sizes))
    return mask.reshape(1, *(1 for _ in latent.shape[1:-2]), *mask.shape[-2:])
