"""Blocks: the repeated parts of a model, computed again in the backward pass instead of kept, but for what their
convolutions gave (frozen.Answers)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from .frozen import Answers, is_map
from .memory import probing

# What x += y calls, which autograd forbids where x is kept for the backward pass -> what leaves x as it is. Python
# gives the result to the name on the left, so a block that adds in place and returns what it made goes on with the sum.
_IN_PLACE: Mapping[Any, Any] = {
    Tensor.add_: Tensor.add,
    Tensor.sub_: Tensor.sub,
    Tensor.mul_: Tensor.mul,
    Tensor.div_: Tensor.div,
}


class OutOfPlace(TorchFunctionMode):
    """While inside, augmented assignments of tensors make new ones. Who calls add_ and drops its result loses it: a
    model must be seen to answer the same."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _IN_PLACE.get(func, func)(*args, **(kwargs or {}))


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model: the outermost modules in its lists that hold several maps."""
    found: list[nn.Module] = []
    for child in model.children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            found += _members(child)
        elif not is_map(child):
            found += blocks(child)
    return found


def _members(container: nn.Module) -> Iterator[nn.Module]:
    for child in container.children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            yield from _members(child)
        elif sum(map(is_map, child.modules())) > 1:
            yield child


@contextmanager
def checkpointed(model: nn.Module, out_of_place: Callable[[], bool] = lambda: True) -> Iterator[int]:
    """While inside, the model's blocks are computed again in the backward pass; yields how many there are.

    Dropout draws the same again (wrapper.Draw), so no random state is kept. out_of_place says whether they run
    OutOfPlace, as they must where the model adds in place: a block would find its inputs overwritten when it is
    computed again, which autograd does not notice and a probe does.
    """
    there = blocks(model)
    with replaced(there, lambda block: _again(block.forward, out_of_place)):
        yield len(there)


@contextmanager
def replaced(there: Sequence[nn.Module], forward_of: Callable[[nn.Module], Callable[..., Any]]) -> Iterator[None]:
    """While inside, blocks run another forward than theirs."""
    before = [block.__dict__.get("forward") for block in there]
    try:
        for block in there:
            block.forward = forward_of(block)
        yield
    finally:
        for block, forward in zip(there, before, strict=True):
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.forward = forward


def _again(forward: Callable[..., Any], out_of_place: Callable[[], bool]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        now = probing.get()
        answers = Answers() if now is None else Answers(now.outside.keep)

        def once(*args: Any, **kwargs: Any) -> Any:
            # Here, since the backward pass has modes, and perhaps a thread, of its own.
            with answers.taken(), OutOfPlace() if out_of_place() else nullcontext():
                return forward(*args, **kwargs)

        if now is not None:
            return now.block(once, *args, **kwargs)
        return checkpoint(once, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run
