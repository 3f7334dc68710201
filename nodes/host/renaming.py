"""The host's own name rules, run on placeholders: which tensors they only rename, and which they compute of others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

Rule = Callable[[dict[str, Any]], Mapping[str, Any]]


class Placeholder(torch.Tensor):
    """A tensor without values; what is made of it remembers of which names."""

    origins: frozenset[str]

    @classmethod
    def of(cls, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Placeholder:
        made = torch.empty(shape, dtype=dtype, device="meta").as_subclass(cls)
        made.origins = frozenset([name])
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        origins = _origins((args, kwargs))
        written = args[:1] if func is torch.Tensor.__setitem__ else ()
        for tensor in _tensors((result, written)):
            tensor.origins = origins  # pyright: ignore[reportAttributeAccessIssue]  a plain tensor may carry it too
        return result


class Renamed(NamedTuple):
    """A rule's result: of which inputs it is made (of none: it is a constant), and whether it is one of them."""

    tensor: Tensor
    origins: frozenset[str]
    whole: bool


def renamed(rule: Rule, inputs: Mapping[str, Tensor]) -> dict[str, Renamed]:
    """What a rule makes of inputs, placeholders or constants, by its names."""
    given = {id(tensor) for tensor in inputs.values()}
    return {
        name: Renamed(tensor, getattr(tensor, "origins", frozenset()), id(tensor) in given)
        for name, tensor in rule(dict(inputs)).items()
        if isinstance(tensor, Tensor)
    }


def computed(rule: Rule, inputs: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Mapping[str, Any]:
    """The rule's results, those that are made of values alone with their values."""
    return rule({**inputs, **values})


def _origins(tree: Any) -> frozenset[str]:
    return frozenset().union(*(getattr(tensor, "origins", ()) for tensor in _tensors(tree)))


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))
    elif isinstance(tree, list | tuple):
        for each in tree:
            yield from _tensors(each)
