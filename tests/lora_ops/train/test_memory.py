"""What a step is foreseen to keep: every block's inside, or with checkpointing every block's input and one inside;
and what of a block is computed again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_ops.adapters import LowRank
from lora_ops.lora import Target
from lora_ops.train.blocks import checkpointed
from lora_ops.train.memory import Estimate, probe
from lora_ops.train.places import Place
from lora_ops.train.wrapper import Wrapper

SIDE = 64


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(SIDE, SIDE).requires_grad_(False) for _ in range(2))

    def forward(self, x):
        return torch.tanh(self.second(torch.tanh(self.first(x))))


class Model(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(count))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def kept(count: int) -> tuple[int, int]:
    """Without and with checkpointing."""
    model, x = Model(count), torch.randn(SIDE, SIDE).requires_grad_()
    plain = probe(lambda: model(x)).kept
    with checkpointed(model) as there:
        assert there == count
        return plain, probe(lambda: model(x)).kept


def test_checkpointing_keeps_the_inputs_of_blocks_and_the_inside_of_one():
    output = SIDE * SIDE * 4  # bytes of what a map gives
    assert kept(1) == (2 * output, 3 * output)  # two tanh; and the block's input
    assert kept(8) == (16 * output, 8 * output + 2 * output)


def test_a_probe_keeps_nothing_and_tells_what_the_model_answers():
    model, x = Model(2), torch.randn(SIDE, SIDE).requires_grad_()
    found = probe(lambda: model(x))
    assert torch.equal(found.result, model(x)) and not found.result.requires_grad and not found.overwrites
    assert probe(lambda: torch.tanh(y := x * 2).add_(y)).overwrites  # tanh keeps what it gave


class Adding(Block):
    """Writes into what it is given, as FLUX's blocks do."""

    def forward(self, x):
        x += super().forward(x)
        return x


class Gated(Block):
    """Writes into what it keeps itself."""

    def forward(self, x):
        y = torch.tanh(self.first(x))
        return y.mul_(2)


@pytest.mark.parametrize("kind", [Adding, Gated])
def test_a_probe_sees_what_cannot_be_computed_again_as_it_is(kind):
    model, x = Model(2), torch.randn(SIDE, SIDE).requires_grad_()
    model.blocks[1] = kind()
    for out_of_place in (False, True):
        with checkpointed(model, lambda out_of_place=out_of_place: out_of_place):
            assert probe(lambda: model(x * 1)).overwrites is not out_of_place
            assert not probe(lambda: Model(2)(x)).overwrites


class Counting(nn.Linear):
    count = 0

    def forward(self, input):
        self.count += 1
        return super().forward(input)


class Ending(Block):
    """A map is the last that it does, as in the residual blocks of a UNet."""

    def forward(self, x):
        return x + self.second(torch.tanh(self.first(x)))


def test_a_block_computed_again_stops_before_its_last_map():
    """Nobody asks again for what that gives: the gradient of its update needs its input alone."""
    model, block = Model(1), Ending()
    model.blocks[0] = block
    block.first, block.second = (Counting(SIDE, SIDE).requires_grad_(False) for _ in range(2))
    target = Target("model", "blocks.0.second.weight", (SIDE, SIDE), names=("second",))
    adapter = LowRank(torch.randn(SIDE, 2), torch.randn(2, SIDE), 2.0)
    wrapper = Wrapper(dict(model.named_modules()), {Place("second", target, 2, 2.0): adapter})
    wrapper.install()
    x = torch.randn(SIDE, SIDE).requires_grad_()
    (plain,) = torch.autograd.grad(model(x).square().sum(), x)
    with checkpointed(model, lambda: False):
        (again,) = torch.autograd.grad(model(x).square().sum(), x)
    assert torch.equal(plain, again)
    assert (block.first.count, block.second.count) == (3, 2)


class Around(nn.Module):
    """Convolutions, of which the second may be written into."""

    def __init__(self, writes: bool = False) -> None:
        super().__init__()
        self.first, self.point, self.second = (
            Convolving(4, 4, side, padding="same" if side == 1 else 1).requires_grad_(False) for side in (3, 1, 3)
        )
        self.writes = writes

    def forward(self, x):
        y = self.second(torch.tanh(self.point(torch.tanh(self.first(x)))))
        if self.writes:
            y += x
        return torch.sin(y)


class Convolving(nn.Conv2d):
    count = 0

    def forward(self, input):
        self.count += 1
        return super().forward(input)


@pytest.mark.parametrize("writes", [False, True])
def test_a_block_computed_again_takes_what_its_convolutions_gave(writes):
    """Also where the block goes on to write into that: the gradient is the same, to the bit."""
    model, x = Model(1), torch.randn(2, 4, 8, 8).requires_grad_()
    block = model.blocks[0] = Around(writes)
    wrapper = Wrapper(dict(model.named_modules()), {})
    wrapper.install()
    (plain,) = torch.autograd.grad(model(x).square().sum(), x)
    with checkpointed(model, lambda: writes):
        found = probe(lambda: model(x))
        before = [each.count for each in (block.first, block.point, block.second)]
        (again,) = torch.autograd.grad(model(x).square().sum(), x)
    after = [each.count for each in (block.first, block.point, block.second)]
    assert torch.equal(plain, again) and not found.overwrites
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 2, 1]
    with checkpointed(model, lambda: False):
        assert probe(lambda: model(x)).overwrites is writes
    one = x.numel() * 4  # bytes of what any of them gives
    # The input, two answers, two tanh; sin keeps what it is given: a sum, or what a convolution gave.
    assert found.kept == (6 if writes else 5) * one


@pytest.mark.parametrize(
    ("needed", "told", "word"),
    [
        (Estimate(4, 2), {}, "checkpointing"),
        (Estimate(4, 2), {"checkpointing": True, "batch": 2}, "batch size"),
        (Estimate(4, 2), {"checkpointing": True}, "smaller pictures"),
        (Estimate(2, 4), {}, "rank"),
        (Estimate(2, 4), {"offloadable": 5}, "offload"),
        (Estimate(2, 4), {"offloadable": 4}, "rank"),
    ],
)
def test_the_setting_that_frees_most_is_named(needed, told, word):
    assert word in needed.advice(**{"checkpointing": False, "batch": 1} | told)
