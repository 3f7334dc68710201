"""Course: a run of training set up on the host, from a node's settings and wires."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import torch
from torch import nn

from ...lora_ops.errors import TrainingError
from ...lora_ops.select import family_of
from ...lora_ops.train.compiling import INDUCTOR
from ...lora_ops.train.dataset import Dataset, Picture
from ...lora_ops.train.loop import Progress
from ...lora_ops.train.memory import Estimate
from ...lora_ops.train.objectives import coefficients, weights
from ...lora_ops.train.preserving import preserved
from ...lora_ops.train.presets import choose
from ...lora_ops.train.randomness import generator
from ...lora_ops.train.settings import Settings
from .encoding import conditions_of
from .offloading import offload_of
from .previews import Previews, prepared
from .shelf import shelf
from .trainable import paired, require_trainable
from .training import Finish, Model, Session

REHEARSED = 3  # steps of a dry run: the first one is slow


@dataclass(frozen=True, eq=False)
class Wires:
    """What comes into the node."""

    model: Any
    dataset: Dataset
    clip: Any | None = None
    vae: Any | None = None
    positive: Sequence[Any] = ()
    negative: Sequence[Any] = ()


class Course:
    """A run that is set up: everything that can be refused is refused here, before anything is written."""

    def __init__(self, settings: Settings, wires: Wires) -> None:
        require_trainable(wires.model, wires.dataset)
        self.settings, self.wires = settings, wires
        if settings.trains_text and wires.clip is None:
            raise TrainingError("The text encoder is to train, and there is none.", remedy="Connect clip.")
        self.clip = wires.clip if settings.trains_text else None  # what trains of it
        self.model = Model(wires.model, self.clip)
        self.targets = self.model.targets()
        self.family = family_of(self.targets)
        guided = bool(wires.model.model.model_config.unet_config.get("guidance_embed"))
        self.chosen = choose(settings.preset, self.family, self.model.sampling, guided=guided)
        self.plan = settings.plan(self.chosen, self.targets)
        self.places = self.model.places(self.plan)
        dataset = preserved(wires.dataset, settings.preservation, self._encoded)
        dataset = dataset if settings.masked else _without_masks(dataset)
        self.items, self.held_out = self.model.items(dataset, settings.guidance or self.chosen.guidance)
        self._require_possible()
        self.previews = self._previews(paired(wires.model.model, dataset))

    def _encoded(self, texts: Sequence[str]) -> Mapping[str, Any]:
        def told(done: int, of: int) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()

        return conditions_of(self.wires.clip, texts, shelf(), told).conditions

    def _require_possible(self) -> None:
        """Raises TrainingError for timesteps, a weighting, an optimizer or a schedule that no step can take, and for
        weights that cannot be away."""
        plan, sampling, shape = self.plan, self.model.sampling, self.items[0].shape
        if self.settings.offload:
            offload_of(self.wires.model)
        timesteps = plan.timesteps or self.chosen.timesteps
        sigma = timesteps.sigmas(sampling, timesteps.moments(1, generator(plan.seed)), *shape[-2:])
        weights(plan.objective, coefficients(sampling, sigma))
        with torch.inference_mode(False):
            factors = {name: nn.Parameter(torch.zeros(1)) for name in ("ink.up", "ink.down")}
            plan.descent.schedule_of(plan.descent.optimizer_of(factors), plan.steps)

    def _previews(self, dataset: Dataset) -> Previews | None:
        settings, wires = self.settings, self.wires
        try:
            return prepared(
                settings, self.chosen, wires.model, dataset, wires.clip, wires.vae, wires.positive, wires.negative
            )
        except TrainingError:
            if settings.sample_every:
                raise
            return None  # nobody asked for any

    def rehearsed(self) -> dict[str, Any]:
        """What a step needs in memory and time, found by making a few; nothing of them is kept."""
        found: dict[str, Any] = {}

        def foreseen(needed: Estimate, free: int) -> None:
            found.update(activations=needed.activations, parameters=needed.parameters, free=free)

        def stepped(done: Progress, session: Session) -> None:
            found.update(seconds=done.seconds, memory=done.memory)
            if done.step == REHEARSED:
                raise Finish

        plan = replace(self.plan, steps=REHEARSED, save_every=0, validate_every=0)
        self.model.learn(
            plan,
            self.items,
            name="rehearsal",
            checkpointing=self.settings.checkpointing,
            offload=self.settings.offload,
            compiler=INDUCTOR if self.settings.compile else "",
            foreseen=foreseen,
            stepped=stepped,
        )
        return found


def _without_masks(dataset: Dataset) -> Dataset:
    def bare(pictures: Sequence[Picture]) -> tuple[Picture, ...]:
        return tuple(replace(each, masks=()) for each in pictures)

    return replace(dataset, pictures=bare(dataset.pictures), held_out=bare(dataset.held_out))
