"""Data: the items to learn from, and which of them come when, in which guise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from ..errors import TrainingError
from .randomness import generator


class Guise(NamedTuple):
    """What a step takes of an item."""

    latent: Tensor
    condition: Any
    mask: Tensor | None
    weight: float
    of_base: bool
    beside: Guise | None


class Guises(tuple[Any, ...]):
    """A condition that is another one with each latent of an item: it shows something that is mirrored with it."""


def of_guise(condition: Any, latent: int) -> Any:
    """A condition as it goes with the latent of this number."""
    return condition[latent] if isinstance(condition, Guises) else condition


@dataclass(frozen=True, eq=False)
class Item:
    """A picture: latents as the model takes them, scaled (channels, …), of which one comes each time (the picture or
    its mirror image), and one of its conditions, which only predict understands; with probability dropout it is empty
    instead.

    masks weigh places (1, …): none, or one a latent. In an epoch an item comes repeats times. weight is for
    regularisation pictures: the loss of prior preservation is so many times as much. of_base: it should stay what the
    base model makes of it, whatever the latent. beside is an item of as many latents and conditions, of which every
    step that takes this one takes the same, with the same noise. Raises TrainingError for what does not fit together.
    """

    latents: tuple[Tensor, ...]
    conditions: tuple[Any, ...] = (None,)
    masks: tuple[Tensor, ...] = ()
    empty: Any = None
    dropout: float = 0.0
    repeats: int = 1
    weight: float = 1.0
    of_base: bool = False
    beside: Item | None = None

    def __post_init__(self) -> None:
        if not self.latents or not self.conditions or self.repeats < 1:
            raise TrainingError("A picture has a latent and a condition at least, and comes once at least.")
        if len({latent.shape for latent in self.latents}) != 1:
            raise TrainingError("The latents of one picture are of different shapes.")
        if any(isinstance(each, Guises) and len(each) != len(self.latents) for each in (*self.conditions, self.empty)):
            raise TrainingError(f"A picture of {len(self.latents)} latents has a condition in other guises.")
        if self.masks and len(self.masks) != len(self.latents):
            raise TrainingError(f"A picture has {len(self.masks)} masks for {len(self.latents)} latents.")
        if not all(bool((mask > 0).any()) for mask in self.masks):
            raise TrainingError("A picture's mask leaves nothing of it.", remedy="Leave the picture or its mask out.")
        if not 0 <= self.dropout <= 1 or (self.dropout and self.empty is None):
            raise TrainingError("Captions are left out with a probability from 0 to 1, for the condition of no text.")
        if self.beside and any(
            len(getattr(self, of)) != len(getattr(self.beside, of)) for of in ("latents", "conditions")
        ):
            raise TrainingError("What is learned beside a picture has other latents or conditions.")

    @property
    def shape(self) -> torch.Size:
        return self.latents[0].shape

    def guise(self, draws: Generator | None = None) -> Guise:
        """The one that a generator draws; without one the first, as held-out pictures come."""
        if draws is None:
            return self._guise(0, 0)
        latent, condition = (int(torch.randint(len(of), (), generator=draws)) for of in (self.latents, self.conditions))
        dropped = float(torch.rand((), generator=draws, dtype=torch.float64)) < self.dropout
        return self._guise(latent, condition, dropped=dropped)

    def _guise(self, latent: int, condition: int, *, dropped: bool = False) -> Guise:
        return Guise(
            self.latents[latent],
            of_guise(self.empty if dropped else self.conditions[condition], latent),
            self.masks[latent] if self.masks else None,
            self.weight,
            self.of_base,
            self.beside and self.beside._guise(latent, condition),
        )


def widest(items: Sequence[Item], batch: int) -> list[Item]:
    """The batch that needs most memory. Raises TrainingError if there is nothing."""
    shapes = _shapes(items)
    numbers = max(shapes, key=lambda there: min(len(there), batch) * items[there[0]].shape.numel())
    return [items[number] for number in numbers[:batch]]


def batches(items: Sequence[Item], batch: int, accumulate: int, seed: int, step: int) -> list[list[int]]:
    """The items of a step's batches, by number. In an epoch every item comes as often as it repeats; those of one batch
    are of one shape, so the last of a shape may be fewer. Nothing but the seed and the step decides.

    Raises TrainingError if there is nothing.
    """
    shapes = _shapes(items)
    count = sum(-(-len(there) // batch) for there in shapes)
    numbers = range(step * accumulate, (step + 1) * accumulate)
    epochs = {epoch: _epoch(shapes, batch, seed, epoch) for epoch in {number // count for number in numbers}}
    return [epochs[number // count][number % count] for number in numbers]


def _shapes(items: Sequence[Item]) -> list[list[int]]:
    """The items that can be of one batch, by number, each as often as it repeats."""
    shapes: dict[tuple[tuple[int, ...], bool, bool, bool], list[int]] = {}
    for number, item in enumerate(items):
        key = tuple(item.shape), not item.masks, item.of_base, item.beside is None
        shapes.setdefault(key, []).extend([number] * item.repeats)
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
