"""Optimizers and schedules, by name; packages that not everybody has are imported when they are asked for."""

from __future__ import annotations

import importlib
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from ..errors import TrainingError, shown


class Maker(NamedTuple):
    module: str
    name: str
    package: str  # what installs it; "" for torch's own
    options: Mapping[str, Any] = {}


OPTIMIZERS: Mapping[str, Maker] = {
    "adamw": Maker("torch.optim", "AdamW", ""),
    "adamw8bit": Maker("bitsandbytes.optim", "AdamW8bit", "bitsandbytes"),
    "prodigy": Maker("prodigyopt", "Prodigy", "prodigyopt"),
    "schedule_free": Maker("schedulefree", "AdamWScheduleFree", "schedulefree"),
    "lion": Maker("lion_pytorch", "Lion", "lion-pytorch"),
    "adafactor": Maker(
        "transformers.optimization",
        "Adafactor",
        "transformers",
        {"scale_parameter": False, "relative_step": False, "warmup_init": False},
    ),
}
UP = ("up", "inner.up")  # the factors of LoRA+'s second group


@dataclass(frozen=True)
class Descent:
    """How the parameters move. rate is the learning rate, text_rate the text encoder's (None: the same); up_factor is
    LoRA+'s (Hayou et al. 2024, https://arxiv.org/abs/2402.12354): how much faster up learns than down. options are the
    optimizer's own; schedule is one of the transformers library's."""

    optimizer: str = "adamw"
    rate: float = 1e-4
    text_rate: float | None = None
    weight_decay: float = 0.01
    up_factor: float = 1.0
    schedule: str = "constant"
    warmup: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    schedule_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            known = ", ".join(OPTIMIZERS)
            raise TrainingError(f"'{shown(self.optimizer)}' is no optimizer here.", remedy=f"Choose one of {known}.")
        if self.optimizer == "prodigy" and (self.up_factor != 1 or self.text_rate not in (None, self.rate)):
            what = "Prodigy finds one rate for all that trains."
            remedy = "Set lora_plus to 1, and the text encoder's learning_rate to the model's."
            raise TrainingError(what, remedy=remedy)

    def optimizer_of(self, parameters: Mapping[str, nn.Parameter], text: Container[str] = ()) -> Optimizer:
        """text are the names of those that are the text encoder's.

        Raises TrainingError where its package is missing or an option is none of its own.
        """
        maker = OPTIMIZERS[self.optimizer]
        try:
            made = getattr(importlib.import_module(maker.module), maker.name)
        except ImportError as error:
            what = f"The optimizer {self.optimizer} is in the package {maker.package}, which is not installed."
            raise TrainingError(what, remedy=f"Run `pip install {maker.package}`.", package=maker.package) from error
        options: dict[str, Any] = {"lr": self.rate, "weight_decay": self.weight_decay, **maker.options}
        if self.optimizer == "adamw" and {p.device.type for p in parameters.values()} <= {"cpu", "cuda"}:
            options["fused"] = True
        try:
            return made(self._groups(parameters, text), **(options | dict(self.options)))
        except TypeError as error:
            raise TrainingError(f"The optimizer {self.optimizer} refuses an option: {error}.") from error

    def _groups(self, parameters: Mapping[str, nn.Parameter], text: Container[str]) -> list[dict[str, Any]]:
        """Those that share a rate; the first has the rate itself."""
        faster = tuple(f".{up}" for up in UP) if self.up_factor != 1 else ()
        if faster and not any(name.endswith(faster) for name in parameters):
            raise TrainingError("LoRA+ is for LoRA and DoRA.", remedy="Set lora_plus to 1.")
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in parameters.items():
            kind = self.text_rate is not None and name in text, name.endswith(faster)
            groups.setdefault(kind, []).append(parameter)
        rates = {kind: (self.text_rate or 0.0) if kind[0] else self.rate for kind in sorted(groups)}
        return [
            {"params": groups[kind], "lr": rate * (self.up_factor if kind[1] else 1)} for kind, rate in rates.items()
        ]

    def schedule_of(self, optimizer: Optimizer, steps: int) -> LRScheduler:
        """Raises TrainingError for a schedule that there is not."""
        if self.schedule == "constant" and not self.warmup:
            return LambdaLR(optimizer, _one)
        try:
            from transformers.optimization import get_scheduler
        except ImportError as error:
            what = f"The schedule {self.schedule} is in the package transformers, which is not installed."
            raise TrainingError(what, remedy="Run `pip install transformers`.", package="transformers") from error
        name = "constant_with_warmup" if self.schedule == "constant" else self.schedule
        try:
            return get_scheduler(name, optimizer, self.warmup, steps, dict(self.schedule_options) or None)
        except (ValueError, TypeError) as error:
            raise TrainingError(f"The schedule '{shown(self.schedule)}' is not possible: {error}.") from error


def _one(step: int) -> float:
    return 1.0


def averaging(optimizer: Optimizer, on: bool) -> None:
    """Schedule-free optimizers keep what trains apart from the average that is to be used."""
    switch = getattr(optimizer, "eval" if on else "train", None)
    if switch is not None:
        switch()


def device_of(parameters: Mapping[str, nn.Parameter]) -> torch.device:
    return next(iter(parameters.values())).device
