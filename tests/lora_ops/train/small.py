"""A model of three maps that answers noisy latents, its targets, and a plan for it: a run of milliseconds.

As a program (`python -m tests.lora_ops.train.small STATE RESULT OPTIMIZER ACCUMULATE STEPS`) it trains, goes on from
STATE if that is there,
saves it after every step and writes what was learned to RESULT: what a test kills.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from lora_ops import files
from lora_ops.lora import Named, Target, TargetMap
from lora_ops.select import Pattern
from lora_ops.train import state
from lora_ops.train.data import Item
from lora_ops.train.loop import Run, train
from lora_ops.train.optimizers import Descent
from lora_ops.train.places import Aim
from lora_ops.train.plan import Plan
from lora_ops.train.timesteps import Timesteps
from lora_ops.train.wrapper import Wrapper


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 16, 3, padding=1)
        self.mixed = nn.Linear(16, 16)
        self.last = nn.Conv2d(16, 4, 3, padding=1)
        draws = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.requires_grad_(False)
            parameter.copy_(torch.randn(parameter.shape, generator=draws) / max(1, parameter[0].numel()) ** 0.5)

    def forward(self, x):
        return self.last(torch.tanh(self.mixed(torch.tanh(self.first(x)).mT).mT))


class Flow:
    sigmas = torch.arange(1, 1001) / 1000

    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        sigma = sigma.reshape(-1, 1, 1, 1)
        return sigma * noise + (1 - sigma) * latent_image

    def calculate_denoised(self, sigma, model_output, model_input):
        return model_input - model_output * sigma.reshape(-1, 1, 1, 1)

    def percent_to_sigma(self, percent):
        return 1 - percent


def targets(model: nn.Module) -> TargetMap:
    found = tuple(
        Target("model", f"{name}.weight", tuple(module.weight.shape), names=(name, f"{name}.weight"), role="attn")
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    )
    names = {target.names[0]: Named(target, "bare") for target in found}
    return TargetMap("unknown", names, lambda name: (names[name],) if name in names else (), found)


PLAN = Plan(
    steps=8,
    aims=(Aim(Pattern.parse("*"), 4),),
    batch=2,
    descent=Descent(rate=0.02),
    clip=10.0,
)


def items(count: int = 5) -> list[Item]:
    draws = torch.Generator().manual_seed(1)
    return [Item(torch.randn(4, 16, 16, generator=draws)) for _ in range(count)]


class Small:
    """A run on a model of its own."""

    def __init__(self, plan: Plan = PLAN, data: list[Item] | None = None, **wrapped) -> None:
        self.model, self.items = Model(), items() if data is None else data
        modules = {name: module for name, module in self.model.named_modules() if name}
        where = plan.places(targets(self.model))
        norms = lambda place: modules[place.module].weight.flatten(1).norm(dim=1)  # noqa: E731
        self.wrapper = Wrapper(modules, plan.adapters(where, norms), dropout=plan.dropout, **wrapped)
        self.run = Run(plan, self.wrapper)
        self.seen = []

    def predict(self, x, sigma, conditions):
        return self.model(x)

    def train(self, **more):
        self.wrapper.install()
        try:
            more.setdefault("progress", self.seen.append)
            train(self.run, self.items, self.predict, Flow(), Timesteps(), **more)
        finally:
            self.wrapper.remove()
        return self

    def result(self) -> dict[str, torch.Tensor]:
        with self.run.result():
            return {name: parameter.detach().clone() for name, parameter in self.run.parameters.items()}


def main(path: str, result: str, optimizer: str, accumulate: str, steps: str) -> None:
    plan = replace(PLAN, steps=int(steps), accumulate=int(accumulate), save_every=1, dropout=0.1, ema=0.9)
    small = Small(replace(plan, descent=replace(plan.descent, optimizer=optimizer)))
    if Path(path).exists():
        state.restore(path, small.run)
    small.train(save=lambda run, best: state.save(path, run))
    files.write(result, small.result(), overwrite=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
