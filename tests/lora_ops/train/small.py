"""A model of a few maps that answers noisy latents, its targets, and a plan for it: a run of milliseconds."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache

import torch
from torch import nn

from lora_ops.lora import Named, Target, TargetMap
from lora_ops.select import Pattern
from lora_ops.train.blocks import checkpointed
from lora_ops.train.data import Item
from lora_ops.train.loop import Run, train
from lora_ops.train.optimizers import Descent
from lora_ops.train.places import Aim, Place
from lora_ops.train.plan import Plan
from lora_ops.train.timesteps import Timesteps
from lora_ops.train.wrapper import Wrapper


class Block(nn.Module):
    """It adds in place, as FLUX's do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        x += self.out(torch.tanh(self.inner(x)))
        return x


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 16, 3, padding=1)
        self.blocks = nn.ModuleList([Block()])
        self.last = nn.Conv2d(16, 4, 3, padding=1)
        draws = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.requires_grad_(False)
            parameter.copy_(torch.randn(parameter.shape, generator=draws) / max(1, parameter[0].numel()) ** 0.5)

    def forward(self, x):
        x = torch.tanh(self.first(x)).mT
        for block in self.blocks:
            x = block(x.clone())
        return self.last(torch.tanh(x.mT))


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
    return [Item((torch.randn(4, 16, 16, generator=draws),)) for _ in range(count)]


@cache
def places(aims: tuple[Aim, ...]) -> tuple[Place, ...]:
    return Plan(1, aims).places(targets(Model()))


class Small:
    """A run on a model of its own."""

    def __init__(self, plan: Plan = PLAN, data: list[Item] | None = None, checkpointing: bool = False) -> None:
        self.checkpointing = checkpointing
        self.model, self.items = Model(), items() if data is None else data
        modules = {name: module for name, module in self.model.named_modules() if name}
        adapters, taken_off = plan.begin(places(plan.aims), lambda place: modules[place.module].weight, dict)
        self.wrapper = Wrapper(modules, adapters, taken_off=taken_off, dropout=plan.dropout)
        self.run = Run(plan, self.wrapper)
        self.seen = []

    def predict(self, x, sigma, conditions):
        return self.model(x)

    def train(self, **more):
        self.wrapper.install()
        try:
            more.setdefault("progress", self.seen.append)
            with checkpointed(self.model) if self.checkpointing else nullcontext():
                train(self.run, self.items, self.predict, Flow(), Timesteps(), **more)
        finally:
            self.wrapper.remove()
        return self

    def result(self) -> dict[str, torch.Tensor]:
        with self.run.result():
            return {name: parameter.detach().clone() for name, parameter in self.run.parameters.items()}
