"""What a step is foreseen to keep: every block's inside, or with checkpointing every block's input and one inside."""

from __future__ import annotations

import torch
from torch import nn

from lora_ops.train.memory import checkpointed, probe

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
