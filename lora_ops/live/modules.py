"""Modules that run live: what each does with its weight, and how a hook stands in its forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import TargetError
from ..inplace import AsWritten

CONVOLUTION = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}  # by dimensions of the kernel
REMEDY = "Use mode patch for this LoRA."
Weight = Callable[[nn.Module, torch.device], tuple[Tensor, Tensor | None]]


def weight_and_bias(module: nn.Module, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Those that a module runs with, in float32 on a device; not to be changed."""
    there: list[Any] = [module.weight, module.bias]
    weight, bias = (None if each is None else each.to(device, torch.float32) for each in there)
    assert weight is not None
    return weight, bias


class Kind(NamedTuple):
    """What a module does with its weight."""

    axis: int  # of the output, along which the rows of its weight lie
    run: Callable[[Tensor, Tensor], Tensor]  # its output for an input and another weight, without its bias
    shape: tuple[int, ...]  # of its weight: (-1, in, kernel…)


def kind_of(module: nn.Module, name: str) -> Kind:
    """Raises TargetError for what live mode cannot add to."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        if module.groups != 1:
            raise TargetError("is a grouped convolution, which cannot run live.", module=name, remedy=REMEDY)
        convolved: Any = module._conv_forward  # with its stride and padding
        shape = (-1, module.in_channels, *module.kernel_size)
        return Kind(1, lambda x, weight: convolved(x, weight, None), shape)
    if isinstance(module, nn.Linear) or hasattr(module, "in_features"):  # the host's quantised Linear is no nn.Linear
        return Kind(-1, functional.linear, (-1, module.in_features))  # pyright: ignore
    if isinstance(module, nn.GroupNorm):
        return Kind(1, lambda x, weight: functional.group_norm(x, module.num_groups, weight, None, module.eps), (-1,))
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
        return Kind(-1, lambda x, weight: functional.layer_norm(x, weight.shape, weight, None, module.eps), (-1,))
    if isinstance(module, nn.RMSNorm) and len(module.normalized_shape) == 1:
        return Kind(-1, lambda x, weight: functional.rms_norm(x, weight.shape, weight, module.eps), (-1,))
    raise TargetError(f"is a {type(module).__name__}, which cannot run live.", module=name, remedy=REMEDY)


class Adding(Protocol):
    """What adds something to a module's output for x, in place where it can. alone: y is the module's own."""

    @property
    def module(self) -> nn.Module: ...

    def added(self, x: Tensor, y: Tensor, *, alone: bool = True) -> Tensor: ...


class Link:
    """One turn of a hook in a module's chain of forwards. A turn that is over passes through, wherever it still is."""

    def __init__(self, hook: Adding) -> None:
        self.hook = hook
        self.below: Callable[..., Tensor] = hook.module.forward
        self.alone = getattr(self.below, "__func__", None) is type(hook.module).forward  # with no other hook below
        inner = getattr(self.below, "__self__", None)
        self._inner = inner if isinstance(inner, Link) else None
        self.active = True
        hook.module.forward = self.forward

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        y = self.below(x, *args, **kwargs)
        if not self.active:
            return y
        with AsWritten():
            return self.hook.added(x, y, alone=self.alone)

    def bare(self, x: Tensor) -> Tensor:
        """The module's own output, to which no hook has added anything."""
        return type(self.hook.module).forward(self.hook.module, x) if self._inner is None else self._inner.bare(x)

    def end(self) -> bool:
        """True once this link is out of the chain; False while another's hook may still call it."""
        self.active = False
        module = self.hook.module
        outermost = module.__dict__.get("forward")
        owner = getattr(outermost, "__self__", None)
        if owner is self:
            if getattr(self.below, "__func__", None) is type(module).forward:
                del module.forward  # the class's own again
            else:
                module.forward = self.below
        return outermost is None or owner in (self, module)
