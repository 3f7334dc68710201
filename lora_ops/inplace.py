"""In place: a model that writes into its own tensors, run so that it makes new ones.

What it calls is changed, not its code. Hooks that run within it know what they write into: they run as they are
written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

# What x += y calls, which autograd forbids where x is kept for the backward pass -> what leaves x as it is. Python
# gives the result to the name on the left, so a block that adds in place and returns what it made goes on with the sum.
_IN_PLACE: Mapping[Any, Any] = {
    Tensor.add_: Tensor.add,
    Tensor.sub_: Tensor.sub,
    Tensor.mul_: Tensor.mul,
    Tensor.div_: Tensor.div,
}
_HOOKS: list[None] = []  # one for each that runs; a compiler follows a list


class OutOfPlace(TorchFunctionMode):
    """While inside, augmented assignments of tensors make new ones. Who calls add_ and drops its result loses it: a
    model must be seen to answer the same."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (func if _HOOKS else _IN_PLACE.get(func, func))(*args, **(kwargs or {}))


class AsWritten:
    """While inside, a hook runs: what it writes into changes, whatever the model around it runs in."""

    def __enter__(self) -> None:
        _HOOKS.append(None)

    def __exit__(self, *_: object) -> None:
        _HOOKS.pop()
