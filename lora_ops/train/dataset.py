"""Dataset: what travels on a LORA_DATASET wire, pictures as latents and captions as conditionings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .data import Guises

# The options of a CONDITIONING in which the host's models find control pictures, as LATENTs have them: a list of them,
# and one that lies beside the noise.
REFERENCES, BESIDE = "reference_latents", "concat_latent_image"


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture to learn from, in the guises that training draws from.

    controls are the pictures that it was made of by an edit: none, or those of each latent, as LATENTs have them.
    """

    name: str  # for messages
    latents: tuple[Tensor, ...]  # each (channels, …) as a LATENT has it, not scaled; the second is the mirror image
    conditions: tuple[Any, ...]  # the CONDITIONING of each caption, or Guises of it
    masks: tuple[Tensor, ...] = ()  # none, or one a latent: (1, height, width) of the latent, 0..1
    captions: tuple[str, ...] = ()  # the texts of conditions; none where those came over a wire
    repeats: int = 1  # times in an epoch
    weight: float = 1.0  # of its loss: prior preservation's, for a regularisation picture
    size: tuple[int, int] | None = None  # height and width in pixels of what the latent shows; None: not known
    regularisation: bool = False  # it shows what the model knows already, and should go on knowing
    of_base: bool = False  # what the model makes of it should stay as it is, whatever it shows
    beside: Picture | None = None  # the same under other captions, learned in the same steps
    controls: tuple[tuple[Tensor, ...], ...] = ()
    empty: Any | None = None  # what its own conditions show, without text; None: the data set's


@dataclass(frozen=True, eq=False)
class Dataset:
    """pictures are learned from, held_out only looked at. empty is the CONDITIONING of no text, where captions are
    left out with probability dropout; None where dropout is 0. report says what was found, as JSON has it."""

    pictures: tuple[Picture, ...]
    held_out: tuple[Picture, ...] = ()
    empty: Any | None = None
    dropout: float = 0.0
    report: Mapping[str, Any] = field(default_factory=dict)


def options_of(condition: Any) -> Iterator[Mapping[str, Any]]:
    """What a condition of a picture says beside its text, in every guise."""
    for each in condition if isinstance(condition, Guises) else (condition,):
        yield from (options for _, options in each)


def controls_in(condition: Any) -> Mapping[str, Any]:
    """The options of a condition, in its first guise, that are control pictures."""
    options = next(options_of(condition), {})
    return {name: options[name] for name in (REFERENCES, BESIDE) if options.get(name) is not None}
