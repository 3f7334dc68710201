"""Dataset: what travels on a LORA_DATASET wire, pictures as latents and captions as conditionings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture to learn from, in the guises that training draws from."""

    name: str  # for messages
    latents: tuple[Tensor, ...]  # each (channels, …) as a LATENT has it, not scaled; the second is the mirror image
    conditions: tuple[Any, ...]  # the CONDITIONING of each caption
    masks: tuple[Tensor, ...] = ()  # none, or one a latent: (1, height, width) of the latent, 0..1
    captions: tuple[str, ...] = ()  # the texts of conditions; none where those came over a wire
    repeats: int = 1  # times in an epoch
    weight: float = 1.0  # of its loss: prior preservation's, for a regularisation picture
    size: tuple[int, int] | None = None  # height and width in pixels of what the latent shows; None: not known
    regularisation: bool = False  # it shows what the model knows already, and should go on knowing
    of_base: bool = False  # what the model makes of it should stay as it is, whatever it shows
    beside: Picture | None = None  # the same under other captions, learned in the same steps


@dataclass(frozen=True, eq=False)
class Dataset:
    """pictures are learned from, held_out only looked at. empty is the CONDITIONING of no text, where captions are
    left out with probability dropout; None where dropout is 0. report says what was found, as JSON has it."""

    pictures: tuple[Picture, ...]
    held_out: tuple[Picture, ...] = ()
    empty: Any | None = None
    dropout: float = 0.0
    report: Mapping[str, Any] = field(default_factory=dict)
