"""Plan: what a training run is, apart from the model and the pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from ..adapters import Adapter
from ..errors import AdapterError, TrainingError, shown
from ..lora import TargetMap
from .objectives import Objective
from .optimizers import Descent
from .places import Aim, Place, places
from .randomness import generator
from .starts import MAGNITUDES, STARTS, start
from .timesteps import Timesteps


@dataclass(frozen=True)
class Plan:
    """steps are the optimizer's; each takes accumulate batches. timesteps None: as the family's trainers recommend.

    clip is the gradients' largest norm, 0 for any. ema is the weight of the past in a moving average of what trains,
    which is what the run then gives; 0 is none. save_every and validate_every count steps, 0 is never. smoothing is the
    past's share in the loss that is shown.
    """

    steps: int
    aims: tuple[Aim, ...] = (Aim(),)
    algebra: str = "lora"
    rank_stabilised: bool = False
    dropout: float = 0.0
    batch: int = 1
    accumulate: int = 1
    seed: int = 0
    objective: Objective = field(default_factory=Objective)
    timesteps: Timesteps | None = None
    descent: Descent = field(default_factory=Descent)
    clip: float = 1.0
    ema: float = 0.0
    autocast: torch.dtype | None = None
    save_every: int = 0
    validate_every: int = 0
    smoothing: float = 0.95

    def __post_init__(self) -> None:
        if self.algebra not in (*STARTS, *MAGNITUDES):
            known = ", ".join((*STARTS, *MAGNITUDES))
            raise TrainingError(f"'{shown(self.algebra)}' is no algebra that trains.", remedy=f"Choose one of {known}.")
        if min(self.steps, self.batch, self.accumulate) < 1:
            raise TrainingError("steps, batch and accumulate are 1 at least.")
        for name in ("dropout", "ema", "smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise TrainingError(f"{name} is {getattr(self, name)}; it goes from 0 to below 1.")

    def places(self, targets: TargetMap) -> tuple[Place, ...]:
        """Where it trains; rank-stabilised, alpha / √rank is the scale and so alpha · √rank the alpha that is written.

        Raises StackError or TargetError like places.
        """
        found = places(targets, self.aims)
        if self.algebra == "oft" and (self.rank_stabilised or any(aim.alpha is not None for aim in self.aims)):
            raise TrainingError("OFT has no alpha.", remedy="Leave alpha and rank_stabilised out.")
        return tuple(p._replace(alpha=p.alpha * p.rank**0.5) for p in found) if self.rank_stabilised else found

    def adapters(
        self, where: tuple[Place, ...], norms: Callable[[Place], Tensor] | None = None
    ) -> Mapping[Place, Adapter]:
        """What training begins with: the same seed gives the same. norms of a place's rows: for a magnitude."""
        found: dict[Place, Adapter] = {}
        for number, place in enumerate(where):
            draws = generator(self.seed, "start", number)
            try:
                found[place] = start(
                    self.algebra,
                    place.target.delta_shape,
                    place.rank,
                    place.alpha,
                    draws,
                    (lambda place=place: norms(place)) if norms else _no_norms,
                )
            except AdapterError as error:
                error.module = place.module
                raise
        return found

    def told(self) -> str:
        """As text, for the state and the file's metadata."""
        values = asdict(self) | {"aims": [[a.pattern and a.pattern.text, a.rank, a.alpha] for a in self.aims]}
        return json.dumps(values, default=str, sort_keys=True)


def _no_norms() -> Tensor:
    raise TrainingError("DoRA needs the norms of the weights.")
