"""Blocks that run compiled: the same gradients, nothing compiled again later, and errors that say what to do."""

from __future__ import annotations

import pytest
import torch

from lora_ops.train.compiling import compiled, failure

from .test_offload import SIDE, Trained


def gradients(trained: Trained, count: int) -> list[torch.Tensor]:
    x = torch.randn(3, SIDE, generator=torch.Generator().manual_seed(1)).requires_grad_()
    inputs, found = [x, *trained.wrapper.parameters().values()], ()
    for _ in range(count):
        found = torch.autograd.grad(trained.model(x).square().sum(), inputs)
    return list(found)


@pytest.fixture
def trained():
    """A model with a wrapper in it."""
    found = Trained(2)
    found.wrapper.install()
    yield found
    found.wrapper.remove()


def test_gradients_are_the_same_and_nothing_is_compiled_again(trained):
    made: list[int] = []

    def counting(graph, inputs):
        made.append(len(graph.graph.nodes))
        return graph.forward

    plain = gradients(trained, 1)
    with compiled(trained.model, counting):
        first = gradients(trained, 1)
        graphs = len(made)
        again = gradients(trained, 2)
        with torch.no_grad():
            trained.model(torch.ones(1, SIDE))  # only what learns is compiled
    assert graphs == len(made) >= len(trained.model.blocks)
    for one, other, third in zip(plain, first, again, strict=True):
        torch.testing.assert_close(one, other)
        torch.testing.assert_close(one, third)
    assert not any("forward" in block.__dict__ for block in trained.model.blocks)


def test_what_cannot_be_compiled_names_the_remedy(trained):
    def broken(graph, inputs):
        raise RuntimeError("No working C++ compiler was found")

    with compiled(trained.model, broken), pytest.raises(Exception, match="C.. compiler") as caught:
        gradients(trained, 1)
    told = failure(caught.value)
    assert told is not None and "compile off" in str(told) and "C++ compiler was found" in str(told)
    assert failure(ValueError("another")) is None
