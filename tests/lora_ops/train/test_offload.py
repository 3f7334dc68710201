"""Blocks whose weights are away; here copies in main memory stand for those on a device."""

from __future__ import annotations

import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from lora_ops.adapters import LowRank
from lora_ops.lora import Target
from lora_ops.train.blocks import checkpointed
from lora_ops.train.frozen import stored_weight
from lora_ops.train.offload import Offload, offloaded
from lora_ops.train.places import Place
from lora_ops.train.wrapper import Wrapper

SIDE, COUNT = 8, 4
ONE = 2 * (SIDE * SIDE + SIDE) * 4 + 2 * SIDE * 4  # bytes of a block


class Block(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(number)
        self.first, self.second = nn.Linear(SIDE, SIDE), nn.Linear(SIDE, SIDE)
        self.norm = nn.LayerNorm(SIDE)
        for parameter in self.parameters():
            parameter.requires_grad_(False).copy_(torch.randn(parameter.shape, generator=draws) / SIDE)
        self.first.weight[0, 0] = number

    def forward(self, x):
        return x + self.second(torch.tanh(self.first(self.norm(x))))


class Model(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(number) for number in range(count))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Carrier:
    """Brings copies, and knows which of them there still are."""

    def __init__(self) -> None:
        self.begun: list[int] = []  # blocks
        self.waited: list[int] = []
        self.most = 0  # bytes at once
        self._there: list[weakref.ref[torch.Tensor]] = []

    def __call__(self, tensors):
        copies = [tensor.clone() for tensor in tensors]
        self._there += map(weakref.ref, copies)
        alive = [each() for each in self._there]
        self.most = max(self.most, sum(each.nbytes for each in alive if each is not None))
        number = int(tensors[0][0, 0])
        self.begun.append(number)

        def arrived():
            self.waited.append(number)
            return copies

        return arrived


class Trained:
    """A model that trains the second map of each of its blocks."""

    def __init__(self, count: int = COUNT, checkpointing: bool = False) -> None:
        self.model, self.checkpointing = Model(count), checkpointing
        self.carrier = Carrier()
        self.offload = Offload(self.model, self.carrier, lambda tensor: True)
        adapters = {}
        for number in range(count):
            name, draws = f"blocks.{number}.second", torch.Generator().manual_seed(number)
            target = Target("model", f"{name}.weight", (SIDE, SIDE), names=(name,))
            up, down = (torch.randn(shape, generator=draws) for shape in ((SIDE, 2), (2, SIDE)))
            adapters[Place(name, target, 2, 2.0)] = LowRank(up, down, 2.0)

        def weight_of(module, like):
            self.offload.need(module)
            return stored_weight(module, like)

        self.wrapper = Wrapper(dict(self.model.named_modules()), adapters, weight_of=weight_of)

    def gradients(self, *, away: bool, steps: int = 2) -> list[torch.Tensor]:
        parameters, found = list(self.wrapper.parameters().values()), []
        x = torch.randn(3, SIDE, generator=torch.Generator().manual_seed(1)).requires_grad_()
        again = checkpointed(self.model) if self.checkpointing else nullcontext()
        self.wrapper.install()
        if away:
            self.offload.start()
        with offloaded(self.offload), again:
            for _ in range(steps):
                found += torch.autograd.grad(self.model(x).square().sum(), [x, *parameters])
        self.offload.stop()
        self.wrapper.remove()
        return found


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("count", [1, 2, COUNT])
def test_gradients_are_the_same_and_the_model_stays_as_it_was(count, checkpointing):
    trained = Trained(count, checkpointing)
    before = {name: (parameter, parameter.clone()) for name, parameter in trained.model.named_parameters()}
    attributes = {name: set(module.__dict__) for name, module in trained.model.named_modules()}
    plain, away = trained.gradients(away=False), trained.gradients(away=True)
    assert trained.carrier.begun and all(map(torch.equal, plain, away))
    for name, parameter in trained.model.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1])
    assert {name: set(module.__dict__) for name, module in trained.model.named_modules()} == attributes


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_block_is_brought_while_the_one_before_it_runs_there_and_back(checkpointing):
    trained = Trained(checkpointing=checkpointing)
    trained.gradients(away=True)
    there, back = [0, 1, 2, 3], [1, 0]  # 3 and 2 are still there when the backward pass begins
    again = [2, 3]
    assert trained.carrier.begun == there + back + again + back
    waited = trained.carrier.waited
    assert waited == [0, 1, 2, 3, 1, 0, 2, 3, 1, 0]  # each before it is used, and once


def test_at_most_two_blocks_are_there_at_once():
    trained = Trained()
    trained.gradients(away=True)
    assert trained.carrier.most == trained.offload.most == 2 * ONE


def test_blocks_in_any_order_are_waited_for():
    trained = Trained()
    trained.wrapper.install()
    trained.offload.start()
    with offloaded(trained.offload):
        for number in (2, 0, 3, 3, 1):
            trained.model.blocks[number](torch.ones(1, SIDE))
            assert number in trained.carrier.waited[-2:]
    trained.offload.stop()
    trained.wrapper.remove()
    assert trained.carrier.most <= 2 * ONE


def test_under_autocast_nothing_keeps_the_weights_that_it_makes():
    model, saved = Model(1), []
    wrapper = Wrapper(dict(model.named_modules()), {})
    wrapper.install()

    def pack(tensor):
        saved.append(tensor.shape)
        return tensor

    x = torch.randn(3, SIDE).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        answer = model(x)
    assert saved and (SIDE, SIDE) not in saved
    (gradient,) = torch.autograd.grad(answer.float().sum(), x)
    wrapper.remove()
    (exact,) = torch.autograd.grad(model(x).sum(), x)
    torch.testing.assert_close(gradient, exact, rtol=0.05, atol=0.02)
