"""Family, Component and Place: how a model's weights are called, as data."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..lora import Band

Shapes = Mapping[str, tuple[int, ...]]  # state-dict key -> shape


class Place(NamedTuple):
    """One row of a component's name table: a weight, or a band of it, and its two names."""

    key: str  # the weight's key, as the model has it
    native: str | None  # the name in the model's own code; None for a band that only diffusers names
    diffusers: str | None
    band: Band | None = None
    swap: bool = False


@dataclass(frozen=True)
class Component:
    """One network of a family, and the prefixes under which files speak of it.

    places makes the rows of the name table from the shapes that the network in hand really has, so that
    pruned, small and inpainting variants need no table of their own.
    """

    part: str  # "model" or "clip"
    places: Callable[[Shapes], Iterable[Place]]
    published: Callable[[], Shapes]  # the weights of the published model
    sources: tuple[str, ...]  # prefixes in state dicts and checkpoints, the host's own first
    prefixes: Mapping[str, tuple[str, ...]]  # prefixes in LoRA files, by the Dialect's `prefix`


@dataclass(frozen=True)
class Family:
    """A kind of model: its components, and how to tell it by its denoiser's shapes (keys without prefix)."""

    name: str
    title: str
    components: tuple[Component, ...]
    recognises: Callable[[Shapes], bool]

    def located(self, shapes: Shapes) -> Iterator[tuple[Component, str, Shapes]]:
        """The components that are there: each with its prefix and its shapes without it.

        The empty prefix is a file of nothing but a denoiser; it counts only for what the family recognises, or the
        keys of any text encoder would pass for a denoiser's.
        """
        for component in self.components:
            for prefix in component.sources:
                inside = under(shapes, prefix)
                if inside and (prefix or self.recognises(inside)):
                    yield component, prefix, inside
                    break

    def published(self) -> Shapes:
        """Keys and shapes of the published model, as the host has them."""
        return {part.sources[0] + key: shape for part in self.components for key, shape in part.published().items()}


class Naming(NamedTuple):
    """A pattern of a name table; `{}` stands for a block's number.

    With several diffusers names the weight is fused: each name takes a band as long as the weight is wide,
    the last takes what is left (q, k, v; or q, k, v and the mlp).
    """

    native: str
    diffusers: tuple[str, ...]
    swap: bool = False


def table(rows: Sequence[Naming]) -> Callable[[Shapes], Iterator[Place]]:
    """The `places` of a component whose names follow these rows; other weights keep their native name only."""
    patterns = {row.native: row for row in rows}

    def places(shapes: Shapes) -> Iterator[Place]:
        for key, shape in shapes.items():
            if key.endswith(".weight"):
                native = key.removesuffix(".weight")
                row = patterns.get(native) or patterns.get(_NUMBER.sub("{}", native, count=1))
                number = _NUMBER.search(native)
                names = [name.format(number and number[0]) for name in row.diffusers] if row else []
                yield from placed(key, native, names, shape, swap=bool(row and row.swap))

    return places


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")  # a block's number


def placed(
    key: str, native: str | None, names: Sequence[str], shape: tuple[int, ...], *, swap: bool = False
) -> Iterator[Place]:
    """The places of one weight: the whole under its native name, and what each diffusers name takes of it."""
    if len(names) <= 1 and not swap:
        yield Place(key, native, names[0] if names else None)
        return
    if native is not None:
        yield Place(key, native, None)
    if swap:
        yield Place(key, None, names[0], swap=True)
        return
    width = shape[1]
    for number, name in enumerate(names):
        length = width if number < len(names) - 1 else shape[0] - number * width
        yield Place(key, None, name, Band(number * width, length))


def identical(shapes: Shapes) -> Iterator[Place]:
    """The places of a component that has one name in both worlds."""
    for key in shapes:
        if key.endswith(".weight"):
            name = key.removesuffix(".weight")
            yield Place(key, name, name)


def under(shapes: Shapes, prefix: str) -> Shapes:
    """The shapes below a prefix, without it."""
    return {key[len(prefix) :]: shape for key, shape in shapes.items() if key.startswith(prefix)}
