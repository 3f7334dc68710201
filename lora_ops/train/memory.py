"""Memory: what a step will need beside the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from .optimizers import Descent


class Probe(NamedTuple):
    """What a step keeps for the backward pass at most, in bytes, whether the forward pass writes into any of that
    later, and what it gives."""

    kept: int
    overwrites: bool
    result: Tensor


def probe(forward: Callable[[], Tensor]) -> Probe:
    """Run a forward pass that keeps nothing: it needs the memory of one without gradients."""
    now = Probing()
    writes, token = _Writes(now), probing.set(now)
    try:
        with now.outside.counting(), writes:
            result = forward().detach()
    finally:
        probing.reset(token)
    return Probe(now.outside.total + now.largest, writes.found, result)


class _Kept:
    """The storages that autograd would keep, each once, and not those that are kept beside."""

    def __init__(self, beside: _Kept | None = None) -> None:
        self._beside = beside
        self.storages: dict[int, StorageWeakRef] = {}
        self.total = 0

    def keep(self, tensor: Tensor) -> None:
        if self._beside is not None and self._beside.holds(tensor):
            return
        storage = tensor.untyped_storage()
        found = self.storages.get(storage._cdata)
        of_parameter = isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter)
        if (found is None or found.expired()) and not of_parameter:
            self.storages[storage._cdata] = StorageWeakRef(storage)
            self.total += storage.nbytes()

    def holds(self, tensor: Tensor) -> bool:
        there = self.storages.get(tensor.untyped_storage()._cdata)
        return there is not None and not there.expired()

    def counting(self) -> AbstractContextManager[Any]:
        return torch.autograd.graph.saved_tensors_hooks(self.keep, _no_backward)


def _no_backward(_: None) -> Tensor:
    raise AssertionError("a probe has no backward pass")


class Probing:
    """A probe under way: what is kept outside of blocks that are computed again, and the most that one of these keeps
    while it is."""

    def __init__(self) -> None:
        self.outside, self.largest = _Kept(), 0
        self.inside = _Kept(self.outside)

    def block(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):  # what a checkpoint keeps, beside the answers of convolutions
                self.outside.keep(value)
        self.inside = _Kept(self.outside)
        with self.inside.counting():
            result = forward(*args, **kwargs)
        self.largest, self.inside = max(self.largest, self.inside.total), _Kept(self.outside)
        return result

    def holds(self, tensor: Tensor) -> bool:
        """Whether the backward pass will look at what is in a tensor now."""
        return self.outside.holds(tensor) or self.inside.holds(tensor)


probing: ContextVar[Probing | None] = ContextVar("probing", default=None)


@contextmanager
def copying() -> Iterator[None]:
    """While inside, what is kept for the backward pass is a copy, which nobody writes over: for small models that write
    into their tensors anywhere."""
    now = probing.get()

    def pack(tensor: Tensor) -> Tensor | None:
        kept = tensor if tensor.is_leaf and tensor.requires_grad else tensor.detach().clone()
        if now is None:
            return kept
        now.outside.keep(kept)
        return None

    with torch.autograd.graph.saved_tensors_hooks(pack, _kept):
        yield


def _kept(tensor: Tensor | None) -> Tensor:
    return _no_backward(tensor) if tensor is None else tensor


class _Writes(TorchDispatchMode):
    def __init__(self, there: Probing) -> None:
        super().__init__()
        self._there, self.found = there, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor):
                self.found |= self._there.holds(value)
        return func(*args, **(kwargs or {}))


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

    activations: int  # of one batch, and what computes them
    parameters: int  # with their gradients, the optimizer's state and the average

    @property
    def total(self) -> int:
        return self.activations + self.parameters

    def advice(self, *, checkpointing: bool, batch: int, offloadable: int = 0) -> str:
        """The setting that frees most. offloadable are the bytes of weights on the device that offload would free."""
        if offloadable > max(self.activations, self.parameters):
            return "Turn on offload: it keeps the model's weights in main memory, which frees most."
        if self.activations >= self.parameters:
            if not checkpointing:
                return "Turn on checkpointing: it frees most of what is kept for the backward pass."
            return "Lower the batch size and accumulate instead." if batch > 1 else "Use smaller pictures."
        return "Lower the rank or choose adamw8bit, lion or adafactor."


def estimate(
    kept: int, parameters: Mapping[str, nn.Parameter], descent: Descent, *, ema: bool, copies: int = 0
) -> Estimate:
    """kept is a Probe's. copies are the bytes of what there is twice of the model's weights: of the largest while it is
    used, of blocks that are brought. What an allocator or a compiler keeps for itself is not in it."""
    count = sum(parameter.numel() for parameter in parameters.values())
    return Estimate(kept + copies, int(count * (8 + STATES[descent.optimizer] + (4 if ema else 0))))


def out_of_memory(error: BaseException) -> bool:
    """Whether this is a device, or the machine, that has no more."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
