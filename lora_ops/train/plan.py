"""Plan: what a training run is, apart from the model and the pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..adapters import Adapter, LowRank
from ..errors import LoraOpsError, TrainingError, shown
from ..landing import Piece, land, require_coverage
from ..lora import Band, Lora, TargetMap
from ..stack import Entry
from .initial import moves, of_weight, require_kind
from .objectives import Objective
from .optimizers import Descent
from .places import Aim, Place, places
from .randomness import generator
from .starts import ALGEBRAS, start
from .timesteps import Timesteps

_OWN = "Give the plan the places and ranks that the LoRA has, or begin without it."


class Beginning(NamedTuple):
    """The adapters that training begins with, and what of them is taken off again, for a Wrapper."""

    adapters: Mapping[Place, Adapter]
    taken_off: Mapping[Place, Adapter] | None


@dataclass(frozen=True)
class Plan:
    """steps are the optimizer's; each takes accumulate batches. text_aims are places of the text encoder that train,
    too; () is none. timesteps None: as the family's trainers recommend.

    initial, of initial.KINDS, is what a LoRA's factors begin as.

    clip is the gradients' largest norm, 0 for any. ema is the weight of the past in a moving average of what trains,
    which is what the run then gives; 0 is none. save_every and validate_every count steps, 0 is never. smoothing is the
    past's share in the loss that is shown.
    """

    steps: int
    aims: tuple[Aim, ...] = (Aim(),)
    text_aims: tuple[Aim, ...] = ()
    algebra: str = "lora"
    initial: str = "gaussian"
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
        if self.algebra not in ALGEBRAS:
            known = ", ".join(ALGEBRAS)
            raise TrainingError(f"'{shown(self.algebra)}' is no algebra that trains.", remedy=f"Choose one of {known}.")
        require_kind(self.initial)
        if self.initial != "gaussian" and self.algebra != "lora":
            raise TrainingError(f"The initialisation {self.initial} is for LoRA, not for {self.algebra}.")
        if min(self.steps, self.batch, self.accumulate) < 1:
            raise TrainingError("steps, batch and accumulate are 1 at least.")
        for name in ("dropout", "ema", "smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise TrainingError(f"{name} is {getattr(self, name)}; it goes from 0 to below 1.")

    def places(self, targets: TargetMap) -> tuple[Place, ...]:
        """Where it trains; rank-stabilised, alpha / √rank is the scale and so alpha · √rank the alpha that is written.

        Raises StackError or TargetError like places.
        """
        found = places(targets, self.aims) + (places(targets, self.text_aims, "clip") if self.text_aims else ())
        alphas = any(aim.alpha is not None for aim in (*self.aims, *self.text_aims))
        if self.algebra == "oft" and (self.rank_stabilised or alphas):
            raise TrainingError("OFT has no alpha.", remedy="Leave alpha and rank_stabilised out.")
        return tuple(p._replace(alpha=p.alpha * p.rank**0.5) for p in found) if self.rank_stabilised else found

    def begin(
        self,
        where: Sequence[Place],
        weight: Callable[[Place], Tensor],
        directions: Callable[[], Mapping[Place, Tensor]],
    ) -> Beginning:
        """What training begins with, which changes nothing yet: the same seed gives the same.

        weight gives the rows of a place, directions (initial.of_inputs) what EVA begins with; asked where they matter.
        """
        found: dict[Place, Adapter] = {}
        towards = directions() if self.initial == "eva" else None
        for number, place in enumerate(where):
            draws, shape = generator(self.seed, "start", number), place.target.delta_shape
            try:
                if self.initial not in ("gaussian", "eva"):
                    seed = draws.initial_seed()
                    found[place] = of_weight(self.initial, weight(place), place.rank, place.alpha, seed)
                    continue
                begun = start(self.algebra, shape, place.rank, place.alpha, draws, lambda place=place: weight(place))
                if towards is not None:
                    assert isinstance(begun, LowRank)
                    begun = replace(begun, down=towards[place])
                found[place] = begun
            except LoraOpsError as error:
                error.module = place.module
                raise
        return Beginning(found, dict(found) if moves(self.initial) else None)

    def shaped(self, where: Sequence[Place], weight: Callable[[Place], Tensor]) -> Beginning:
        """What begin gives, in shape alone: a state fills it, without looking at the model again."""
        begun = replace(self, initial="gaussian").begin(where, weight, dict)
        return begun._replace(taken_off=begun.adapters if moves(self.initial) else None)

    def go_on(self, where: Sequence[Place], lora: Lora, targets: TargetMap) -> Beginning:
        """From a LoRA in any dialect, each of its modules with its own alpha; of fused rows, each part with its own.

        Raises TrainingError, naming both, where its places, ranks or algebra are others than the plan's.
        """
        if self.initial != "gaussian":
            what = f"The plan begins with {self.initial} and with the LoRA '{shown(lora.name)}'."
            raise TrainingError(what, remedy="Choose the initialisation gaussian to go on from a LoRA.")
        landing = land([Entry(lora, {"model": 1.0, "clip": 1.0})], targets)
        require_coverage(landing, 1.0)
        there: dict[tuple[str, Band | None], Piece] = {}
        for (_, key), pieces in landing.pieces.items():
            inside = [place for place in where if place.target.key == key]
            there |= {(key, part.band): part for piece in pieces for part in apart(piece, inside)}
        found: dict[Place, Adapter] = {}
        for place in where:
            piece = there.pop((place.target.key, place.target.band), None)
            if piece is None:
                what = f"trains {place.module}, which the LoRA has no module for on the same rows."
                raise TrainingError(f"The plan {what}", file=lora.name, module=place.module, remedy=_OWN)
            theirs, ours = (piece.adapter.ALGEBRA, piece.adapter.rank), (ALGEBRAS[self.algebra].ALGEBRA, place.rank)
            if theirs != ours:
                told = (f"{algebra} of rank {rank}" for algebra, rank in (theirs, ours))
                what = "is {}; the plan trains {}.".format(*told)
                raise TrainingError(what, file=lora.name, module=place.module, remedy=_OWN, found=theirs, expected=ours)
            found[place._replace(alpha=piece.adapter.scale * place.rank)] = piece.adapter
        for key, _ in there:
            raise TrainingError("is in the LoRA; the plan does not train it.", file=lora.name, module=key, remedy=_OWN)
        return Beginning(found, None)

    def told(self) -> str:
        """As text, for the state and the file's metadata."""
        aims = {
            name: [[aim.pattern and aim.pattern.text, aim.rank, aim.alpha] for aim in there]
            for name, there in (("aims", self.aims), ("text_aims", self.text_aims))
        }
        return json.dumps(asdict(self) | aims, default=str, sort_keys=True)


def apart(piece: Piece, where: Sequence[Place]) -> list[Piece]:
    """A LoRA of a fused weight, as one for each of these places in it, where it is no more than these beside each
    other: each with components of its own, as our layouts write them together. Else the piece itself."""
    adapter, where = piece.adapter, sorted(where, key=lambda place: place.target.rows.start)
    ranks = [place.rank for place in where]
    if not isinstance(adapter, LowRank) or adapter.mid is not None or len(where) < 2 or sum(ranks) != adapter.rank:
        return [piece]
    whole = piece.band or Band(0, len(adapter.up))
    if where[0].target.rows.start < whole.start or where[-1].target.rows.end > whole.end:
        return [piece]
    found = []
    for place, columns, down in zip(where, adapter.up.split(ranks, dim=1), adapter.down.split(ranks), strict=True):
        up = columns.narrow(0, place.target.rows.start - whole.start, place.target.rows.length)
        if torch.count_nonzero(up) != torch.count_nonzero(columns):
            return [piece]
        found.append(replace(piece, adapter=LowRank(up, down, adapter.scale * place.rank), band=place.target.band))
    return found
