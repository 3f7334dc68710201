"""Memory: what a step will need, and blocks that are computed again instead of kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from .frozen import is_map
from .optimizers import Descent

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


class Probe(NamedTuple):
    """What a step keeps for the backward pass at most, in bytes, whether the forward pass writes into any of that
    later, and what it gives."""

    kept: int
    overwrites: bool
    result: Tensor


def probe(forward: Callable[[], Tensor]) -> Probe:
    """Run a forward pass that keeps nothing: it needs the memory of one without gradients."""
    probing = _Probing()
    writes, token = _Writes(probing.outside.storages), _probing.set(probing)
    try:
        with probing.outside.counting(), writes:
            result = forward().detach()
    finally:
        _probing.reset(token)
    return Probe(probing.outside.total + probing.largest, writes.found, result)


class _Kept:
    """The storages that autograd would keep, each once."""

    def __init__(self) -> None:
        self.storages: dict[int, StorageWeakRef] = {}
        self.total = 0

    def keep(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        found = self.storages.get(storage._cdata)
        of_parameter = isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter)
        if (found is None or found.expired()) and not of_parameter:
            self.storages[storage._cdata] = StorageWeakRef(storage)
            self.total += storage.nbytes()

    def counting(self) -> AbstractContextManager[Any]:
        return torch.autograd.graph.saved_tensors_hooks(self.keep, _no_backward)


def _no_backward(_: None) -> Tensor:
    raise AssertionError("a probe has no backward pass")


class _Probing:
    """A probe under way: what is kept outside of blocks that are computed again, and the most that one of these keeps
    while it is."""

    def __init__(self) -> None:
        self.outside, self.largest = _Kept(), 0

    def block(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):  # what a checkpoint keeps
                self.outside.keep(value)
        inside = _Kept()
        with inside.counting():
            result = forward(*args, **kwargs)
        self.largest = max(self.largest, inside.total)
        return result


_probing: ContextVar[_Probing | None] = ContextVar("_probing", default=None)


@contextmanager
def copying() -> Iterator[None]:
    """While inside, what is kept for the backward pass is a copy, which nobody writes over: for small models that write
    into their tensors anywhere."""
    probing = _probing.get()

    def pack(tensor: Tensor) -> Tensor | None:
        kept = tensor if tensor.is_leaf and tensor.requires_grad else tensor.detach().clone()
        if probing is None:
            return kept
        probing.outside.keep(kept)
        return None

    with torch.autograd.graph.saved_tensors_hooks(pack, _kept):
        yield


def _kept(tensor: Tensor | None) -> Tensor:
    return _no_backward(tensor) if tensor is None else tensor


class _Writes(TorchDispatchMode):
    def __init__(self, kept: Mapping[int, StorageWeakRef]) -> None:
        super().__init__()
        self._kept, self.found = kept, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor):
                there = self._kept.get(value.untyped_storage()._cdata)
                self.found |= there is not None and not there.expired()
        return func(*args, **(kwargs or {}))


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
def checkpointed(model: nn.Module) -> Iterator[int]:
    """While inside, the model's blocks are computed again in the backward pass; yields how many there are.

    Dropout draws the same again (wrapper.Draw), so no random state is kept. They run OutOfPlace: a block that adds in
    place would find its inputs overwritten when it is computed again, which autograd does not notice.
    """
    there = blocks(model)
    before = [block.__dict__.get("forward") for block in there]
    for block in there:
        block.forward = _again(block.forward)
    try:
        yield len(there)
    finally:
        for block, forward in zip(there, before, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def _again(forward: Callable[..., Any]) -> Callable[..., Any]:
    def once(*args: Any, **kwargs: Any) -> Any:
        with OutOfPlace():  # here, since the backward pass has modes, and perhaps a thread, of its own
            return forward(*args, **kwargs)

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        probing = _probing.get()
        if probing is not None:
            return probing.block(once, *args, **kwargs)
        return checkpoint(once, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run


STATES: Mapping[str, float] = {  # bytes an optimizer keeps for each of a float32 parameter
    "adamw": 8,
    "adamw8bit": 2,
    "prodigy": 16,
    "schedule_free": 8,
    "lion": 4,
    "adafactor": 0.1,
}


class Estimate(NamedTuple):
    """What a step needs on the device beside the model, in bytes."""

    activations: int  # of one batch
    parameters: int  # with their gradients, the optimizer's state and the average

    @property
    def total(self) -> int:
        return self.activations + self.parameters

    def advice(self, *, checkpointing: bool, batch: int) -> str:
        """The setting that frees most."""
        if self.activations >= self.parameters:
            if not checkpointing:
                return "Turn on checkpointing: it frees most of what is kept for the backward pass."
            return "Lower the batch size and accumulate instead." if batch > 1 else "Use smaller pictures."
        return "Lower the rank or choose adamw8bit, lion or adafactor."


def estimate(kept: int, parameters: Mapping[str, nn.Parameter], descent: Descent, *, ema: bool) -> Estimate:
    count = sum(parameter.numel() for parameter in parameters.values())
    return Estimate(kept, int(count * (8 + STATES[descent.optimizer] + (4 if ema else 0))))


def out_of_memory(error: BaseException) -> bool:
    """Whether this is a device, or the machine, that has no more."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
