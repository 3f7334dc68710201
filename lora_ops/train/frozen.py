"""Frozen: a module's linear map, run without keeping its weight for the backward pass.

The host runs nodes in inference mode, whose weights cannot be kept for backward; and where it casts, moves or
de-quantises a weight for each call, keeping it would cost a copy of the model. Here the weight is asked for again when
the gradient comes back, and only the input's shape is kept. Where autocast makes a smaller one of it, that is kept if
it may be: to make it twice takes longer than the product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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


def frozen(module: nn.Module, forward: Forward, x: Tensor, weight_of: WeightOf, *, keeps_cast: bool = True) -> Tensor:
    """forward(x), where forward is the module's own; its gradient is that of the module's map alone. keeps_cast:
    whether it keeps the weight that autocast makes."""
    if not (x.requires_grad and torch.is_grad_enabled()):
        return forward(x)
    found = _Frozen.apply(x, module, forward, weight_of, keeps_cast)
    assert isinstance(found, Tensor)
    return found


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore
        ctx: Any, x: Tensor, module: nn.Module, forward: Forward, weight_of: WeightOf, keeps_cast: bool
    ) -> Tensor:
        ctx.module, ctx.weight_of, ctx.shape, ctx.dtype = module, weight_of, x.shape, x.dtype
        smaller = _smaller(module, x) if keeps_cast else None
        if smaller is None:
            return _whole(forward(x.detach()))
        weight, bias = weight_of(module, x.new_empty(0, dtype=smaller))
        ctx.save_for_backward(weight)
        x = x.detach().to(smaller)
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            convolved: Any = module._conv_forward
            return convolved(x, weight, bias)
        return _whole(functional.linear(x, weight, bias))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # pyright: ignore
        (weight,) = ctx.saved_tensors or (None,)
        if weight is None:
            weight, _ = ctx.weight_of(ctx.module, grad)
        return _transposed(ctx.module, weight, grad, ctx.shape).to(ctx.dtype), None, None, None, None


def _whole(y: Tensor) -> Tensor:
    """The same tensor and no view: a model may add to it in place, as FLUX does to its text."""
    storage: Any = y
    return y.new_empty(0).set_(storage) if y._is_view() else y


def _smaller(module: nn.Module, x: Tensor) -> torch.dtype | None:
    """What autocast makes of a module's weight, where that takes less memory than the weight."""
    kind = x.device.type
    weight: Any = module.weight
    if not torch.is_autocast_enabled(kind) or type(weight) not in (Tensor, nn.Parameter):
        return None
    found = torch.get_autocast_dtype(kind)
    return found if weight.is_floating_point() and found.itemsize < weight.dtype.itemsize else None


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
