"""Frozen: a module's linear map, run without keeping its weight for the backward pass.

The host runs nodes in inference mode, whose weights cannot be kept for backward; and where it casts, moves or
de-quantises a weight for each call, keeping it would cost a copy of the model. Here the weight is asked for again when
the gradient comes back, and only the input's shape is kept. Where autocast would make another one of it each time, a
Cast may stand for it: on a processor, to make it takes longer than the product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

# (module, a tensor whose device and dtype are wanted) -> its weight as the module uses it, and its bias
WeightOf = Callable[[nn.Module, Tensor], tuple[Tensor, Tensor | None]]
Forward = Callable[..., Tensor]


def stored_weight(module: nn.Module, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """The WeightOf modules that use their weight as it is."""
    weight: Any = module.weight
    bias: Any = module.bias
    return weight.detach().to(like), None if bias is None else bias.detach().to(like)


def is_map(module: nn.Module) -> bool:
    """Whether a module is a linear map that runs frozen; the host's quantised Linear is no nn.Linear."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return isinstance(module, nn.Linear) or hasattr(module, "in_features")


class Cast(NamedTuple):
    """A module's weight and bias as autocast makes them for its map, made once."""

    weight: Tensor
    bias: Tensor | None

    @staticmethod
    def of(module: nn.Module, dtype: torch.dtype, weight_of: WeightOf) -> Cast | None:
        """None where the module has this very weight, or one that is no plain tensor."""
        weight: Any = module.weight
        if type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point() or weight.dtype == dtype:
            return None
        return Cast(*weight_of(module, weight.new_empty(0, dtype=dtype)))

    def meant(self, x: Tensor) -> bool:
        """Whether autocast would make this of the module's weight for an input."""
        kind = x.device.type
        return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == self.weight.dtype

    def map(self, module: nn.Module, x: Tensor) -> Tensor:
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            convolved: Any = module._conv_forward
            return convolved(x, self.weight, self.bias)
        return functional.linear(x, self.weight, self.bias)


def frozen(module: nn.Module, forward: Forward, x: Tensor, weight_of: WeightOf, cast: Cast | None = None) -> Tensor:
    """forward(x), where forward is the module's own; its gradient is that of the module's map alone. cast is used where
    autocast would make it."""
    cast = cast if cast is not None and cast.meant(x) else None
    if not (x.requires_grad and torch.is_grad_enabled()):
        return forward(x) if cast is None else cast.map(module, x)
    found = _Frozen.apply(x, module, forward, weight_of, cast)
    assert isinstance(found, Tensor)
    return found


class Answers:
    """What the convolutions of a block gave. It is little to keep, and computing it again is most of computing a UNet's
    block again: that takes it from here. keep hears of each."""

    now: ContextVar[Answers | None] = ContextVar("answers", default=None)

    def __init__(self, keep: Callable[[Tensor], object] = lambda _: None) -> None:
        self._given: list[Tensor] = []
        self._keep, self._next = keep, 0

    @contextmanager
    def taken(self) -> Iterator[None]:
        """While inside, the block runs, from its beginning."""
        self._next, token = 0, self.now.set(self)
        try:
            yield
        finally:
            self.now.reset(token)

    def of(self, compute: Callable[[], Tensor]) -> Tensor:
        if self._next == len(self._given):
            self._given.append(compute())
            self._keep(self._given[-1])
        self._next += 1
        return self._given[self._next - 1].detach()


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore
        ctx: Any, x: Tensor, module: nn.Module, forward: Forward, weight_of: WeightOf, cast: Cast | None
    ) -> Tensor:
        ctx.module, ctx.weight_of, ctx.shape, ctx.dtype, ctx.cast = module, weight_of, x.shape, x.dtype, cast
        x = x.detach()

        def compute() -> Tensor:
            return forward(x) if cast is None else cast.map(module, x)

        # What is compiled has no lists to put an answer in.
        answers = Answers.now.get() if _gathers(module) and not torch.compiler.is_compiling() else None
        return _whole(compute() if answers is None else answers.of(compute))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # pyright: ignore
        weight = ctx.weight_of(ctx.module, grad)[0] if ctx.cast is None else ctx.cast.weight
        return _transposed(ctx.module, weight, grad, ctx.shape).to(ctx.dtype), None, None, None, None


def _whole(y: Tensor) -> Tensor:
    """The same tensor and no view: a model may add to it in place, as FLUX does to its text."""
    storage: Any = y
    return y.new_empty(0).set_(storage) if y._is_view() else y


def _gathers(module: nn.Module) -> bool:
    """Whether it is a convolution that looks around."""
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and math.prod(module.kernel_size) > 1


def _transposed(module: nn.Module, weight: Tensor, grad: Tensor, shape: Sequence[int]) -> Tensor:
    """The gradient of the map's input, which had this shape."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return grad @ weight
    found, _, _ = torch.ops.aten.convolution_backward(
        grad,
        grad.new_empty(1).expand(shape),  # nothing but its shape is used
        weight,
        None,
        module.stride,
        module.padding,
        module.dilation,
        False,
        [0] * len(module.stride),
        module.groups,
        (True, False, False),
    )
    return found
