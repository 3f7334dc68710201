"""Patching: a Landing on the host's ModelPatcher, one adapter of ours per weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

import torch
from comfy.weight_adapter.base import WeightAdapterBase
from torch import Tensor

from ...lora_ops.adapters import Transform
from ...lora_ops.errors import TargetError
from ...lora_ops.families import Shapes
from ...lora_ops.landing import Landing, Piece
from ...lora_ops.live import REMEDY
from ...lora_ops.lora import TargetMap
from ...lora_ops.stack import Schedule
from ...lora_ops.survival import Survival
from . import caches, ledger, live, storing


class LandedPatch(WeightAdapterBase):
    """All that our nodes do to one weight.

    The host rebuilds patches as type(p)(p.loaded_keys, p.weights) with the tensors moved, and walks tuples and lists
    only: each piece is its row in the ledger and (adapter class, its fields, band, strength) in plain tuples.
    """

    name = "lora_ops"

    def __init__(self, loaded_keys: set[str], weights: tuple[Any, ...]) -> None:
        self.loaded_keys = loaded_keys
        self.weights = weights

    @classmethod
    def of(cls, pieces: tuple[Piece, ...], rows: Sequence[str]) -> LandedPatch:
        """rows[n] is the row in the ledger of the stack's entry n."""
        return cls(set(), tuple((rows[piece.entry], piece.packed()) for piece in pieces))

    def joined(self, other: LandedPatch) -> LandedPatch:
        """This patch and then the other, as one."""
        return LandedPatch(set(), self.weights + other.weights)

    def without(self, rows: AbstractSet[str]) -> LandedPatch:
        """What remains when these rows of the ledger are taken off."""
        return LandedPatch(set(), tuple(each for each in self.weights if each[0] not in rows))

    @property
    def pieces(self) -> list[Piece]:
        return [Piece.unpacked(piece, lambda tensor: tensor) for _, piece in self.weights]

    def calculate_weight(
        self,
        weight: Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: Any,
        function: Any,
        intermediate_dtype: torch.dtype = torch.float32,
        original_weight: Any = None,
    ) -> Tensor:
        """The weight with all pieces, in place where the dtype allows. The host's strength is a factor on each piece's.

        We register whole weights without a function, so offset and function are never ours to apply. Where the host
        patches for good it rounds a float32 result once; where it patches per forward, intermediate_dtype is the
        weight's own and so is the result's.
        """
        total = weight.to(torch.promote_types(weight.dtype, intermediate_dtype))
        storing.put(total, (piece for _, piece in self.weights), strength)
        return total


def targets(model: Any, clip: Any) -> TargetMap:
    """The TargetMap of what is connected: a MODEL, a CLIP or both (None: not connected)."""
    return caches.target_map_of(tuple(shapes(model, clip).items()))


def shapes(model: Any, clip: Any) -> Shapes:
    """The shapes of all weights of what is connected, by their names in the host."""
    found: dict[str, tuple[int, ...]] = {}
    if model is not None:
        found |= _shapes(model)
    if clip is not None:
        found |= _shapes(clip.patcher)
    return found


def _shapes(patcher: Any) -> Shapes:
    shapes = {key: tuple(tensor.shape) for key, tensor in patcher.model_state_dict().items()}
    # The state dict holds quantised weights as they are stored, perhaps packed; the parameter knows its own shape.
    quantised = {
        key: tuple(weight.shape)
        for key, weight in patcher.model.named_parameters()
        if type(weight) is not torch.nn.Parameter and key in shapes
    }
    return shapes | quantised


SCHEDULED = "live, for the schedule"


class Applied(NamedTuple):
    """MODEL and CLIP with a landing on them, per part how: "patch", or "live" and why, and what is foreseen to survive
    of the update in a few of the patched weights, if any are stored coarsely."""

    model: Any
    clip: Any
    how: Mapping[str, str]
    survival: Mapping[str, Survival]


def applied(landing: Landing, mode: str, model: Any, clip: Any) -> Applied:
    """Put a landing on clones of MODEL and CLIP; what is not connected or not touched is passed on as it is.

    mode is "patch", "live", or "auto": live for the weights that are stored too coarsely to hold an update.
    """
    how: dict[str, str] = {}
    survival: dict[str, Survival] = {}
    ids = ledger.rows_of(landing)
    if pieces := landing.of_part("model"):
        model = model.clone()
        how["model"], found = _put(model, landing, ids, "model", pieces, mode)
        survival |= found
    if pieces := landing.of_part("clip"):
        clip = clip.clone()
        how["clip"], found = _put(clip.patcher, landing, ids, "clip", pieces, mode)
        survival |= found
    return Applied(model, clip, how, survival)


def take_off(patcher: Any, rows: AbstractSet[str]) -> None:
    """Take rows of the ledger off a fresh clone; all else keeps its place and order."""
    for key, there in list(patcher.patches.items()):
        left = [
            (entry[0], entry[1].without(rows), *entry[2:]) if isinstance(entry[1], LandedPatch) else entry
            for entry in there
        ]
        patcher.patches[key] = [entry for entry in left if not isinstance(entry[1], LandedPatch) or entry[1].weights]
        if not patcher.patches[key]:
            del patcher.patches[key]
    _renew(patcher, {})
    live.detach(patcher, rows)
    ledger.write(patcher, [each for each in ledger.records(patcher) if each.row not in rows])


def _put(
    patcher: Any,
    landing: Landing,
    ids: Sequence[str],
    part: str,
    pieces: Mapping[str, tuple[Piece, ...]],
    mode: str,
) -> tuple[str, Mapping[str, Survival]]:
    rows = [row.entry for row in landing.rows]
    scheduled = not all(row.schedule.constant for row in rows)
    # A text encoder runs once, before sampling: there is no percent for it.
    schedules = [row.schedule if part == "model" else Schedule() for row in rows]
    stored = live.coarse(patcher, pieces) if mode == "auto" else {}
    running, how = pieces.keys(), "live"
    if not all(schedule.constant for schedule in schedules):
        how = SCHEDULED
    elif mode != "live":
        running, how = stored.keys(), "patch"
        if stored:
            how = f"live, its weights are {', '.join(sorted(set(stored.values())))}"
            others = len(pieces) - len(stored)
            how += f"; {others} of its {len(pieces)} weights are not and were patched" if others else ""
    patched = {key: there for key, there in pieces.items() if key not in running}
    attached = {key: there for key, there in pieces.items() if key in running}
    if patched:
        _require_seen(patcher, patched)
        _register(patcher, {key: LandedPatch.of(there, ids) for key, there in patched.items()})
    if attached:
        try:
            live.attach(patcher, attached, ids, [row.strengths[part] for row in rows], schedules)
        except TargetError as error:
            if how == SCHEDULED and error.remedy == REMEDY:  # which mode it is is not the person's to choose there
                error.remedy = "Put it into a stack of its own before this one, or take the schedules out."
            raise
    ledger.add(patcher, ledger.recorded(landing, ids, part, patched, attached))
    how += ", without the schedule (a text encoder has no steps)" if scheduled and part == "clip" else ""
    return how, storing.foreseen(patcher.model, patched, [*live.coarse(patcher, patched)])


def _require_seen(patcher: Any, pieces: Mapping[str, tuple[Piece, ...]]) -> None:
    """Raises TargetError for a change that depends on its weight where an earlier LoRA runs live beside that weight,
    and for any change of a weight that an earlier one, which runs live, depends on."""
    for key in pieces.keys() & live.turned(patcher):
        raise TargetError(
            "is changed live, by a DoRA or another LoRA that depends on it: it would see the one that comes after.",
            module=key,
            remedy="Put this one before the live one, or use the same mode for both.",
        )
    for key in pieces.keys() & live.weights(patcher):
        for piece in pieces[key]:
            if isinstance(piece.adapter, Transform):
                raise TargetError(
                    f"gets {piece.adapter.ALGEBRA}, which would not see the LoRA that runs live before it.",
                    module=key,
                    remedy="Put it before the live one, or use mode patch for both.",
                )


def _register(patcher: Any, patches: Mapping[str, LandedPatch]) -> None:
    """Put our patches on a clone; where ours is the last on a weight already, the two become one."""
    fresh: dict[str, LandedPatch] = {}
    for key, patch in patches.items():
        there = patcher.patches.get(key, [])
        last = there[-1] if there else None
        if last is not None and isinstance(last[1], LandedPatch) and last[0] == last[2] == 1.0:
            there[-1] = (1.0, last[1].joined(patch), 1.0, None, None)  # the clone's own list
        else:
            fresh[key] = patch
    _renew(patcher, fresh)


def _renew(patcher: Any, patches: Mapping[str, LandedPatch]) -> None:
    """Add patches to a clone, perhaps none: the host renews patches_uuid, by which it knows that the weights in memory
    are stale."""
    if missing := patches.keys() - set(patcher.add_patches(patches)):
        raise TargetError(f"{len(missing)} weights are not in the model any more.", module=min(missing))
