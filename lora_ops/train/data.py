"""Data: the items to learn from, and which of them come when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import TrainingError
from .randomness import generator


@dataclass(frozen=True, eq=False)
class Item:
    """A latent as the model takes it, scaled (channels, …), and its condition, which only predict understands.

    mask weighs places (1, …). weight is for regularisation pictures: the loss of prior preservation is so many times
    as much. of_base: it should stay what the base model makes of it, whatever the latent.
    """

    latent: Tensor
    condition: Any = None
    mask: Tensor | None = None
    weight: float = 1.0
    of_base: bool = False


def widest(items: Sequence[Item], batch: int) -> list[Item]:
    """The batch that needs most memory. Raises TrainingError if there is nothing."""
    shapes = _shapes(items)
    numbers = max(shapes, key=lambda there: min(len(there), batch) * items[there[0]].latent.numel())
    return [items[number] for number in numbers[:batch]]


def batches(items: Sequence[Item], batch: int, accumulate: int, seed: int, step: int) -> list[list[int]]:
    """The items of a step's batches, by number. In an epoch every item comes once; those of one batch are of one
    shape, so the last of a shape may be fewer. Nothing but the seed and the step decides.

    Raises TrainingError if there is nothing.
    """
    shapes = _shapes(items)
    count = sum(-(-len(there) // batch) for there in shapes)
    found: list[list[int]] = []
    for number in range(step * accumulate, (step + 1) * accumulate):
        epoch, position = divmod(number, count)
        found.append(_epoch(shapes, batch, seed, epoch)[position])
    return found


def _shapes(items: Sequence[Item]) -> list[list[int]]:
    """The items that can be of one batch, by number."""
    shapes: dict[tuple[tuple[int, ...], bool, bool], list[int]] = {}
    for number, item in enumerate(items):
        key = tuple(item.latent.shape), item.mask is None, item.of_base
        shapes.setdefault(key, []).append(number)
    if not shapes:
        raise TrainingError("There is nothing to learn from.", remedy="Give at least one picture.")
    return list(shapes.values())


def _epoch(shapes: Sequence[Sequence[int]], batch: int, seed: int, epoch: int) -> list[list[int]]:
    order = generator(seed, "order", epoch)
    found: list[list[int]] = []
    for there in shapes:
        mixed = [there[n] for n in torch.randperm(len(there), generator=order).tolist()]
        found += [mixed[start : start + batch] for start in range(0, len(mixed), batch)]
    return [found[n] for n in torch.randperm(len(found), generator=order).tolist()]
