"""Patching: a Landing on the host's ModelPatcher, one adapter of ours per weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import comfy.model_management
import torch
from comfy.weight_adapter.base import WeightAdapterBase
from torch import Tensor

from ...lora_ops.adapters import Transform
from ...lora_ops.dialects import target_map
from ...lora_ops.errors import TargetError
from ...lora_ops.families import Shapes, recognise
from ...lora_ops.landing import Landing, Piece, add_
from ...lora_ops.live import REMEDY
from ...lora_ops.lora import TargetMap
from ...lora_ops.stack import Schedule
from . import live


class LandedPatch(WeightAdapterBase):
    """All that our nodes do to one weight.

    The host rebuilds patches as type(p)(p.loaded_keys, p.weights) with the tensors moved, and walks tuples and lists
    only: each piece is (adapter class, its fields, band, strength) in plain tuples.
    """

    name = "lora_ops"

    def __init__(self, loaded_keys: set[str], weights: tuple[Any, ...]) -> None:
        self.loaded_keys = loaded_keys
        self.weights = weights

    @classmethod
    def of(cls, pieces: tuple[Piece, ...]) -> LandedPatch:
        return cls(set(), tuple(piece.packed() for piece in pieces))

    def joined(self, other: LandedPatch) -> LandedPatch:
        """This patch and then the other, as one."""
        return LandedPatch(set(), self.weights + other.weights)

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
        weight's own and so is the result's. Factors come in float32 at least: a rounded magnitude would be a systematic
        error.
        """
        compute = torch.promote_types(weight.dtype, intermediate_dtype)
        total, wide = weight.to(compute), torch.promote_types(compute, torch.float32)
        move = comfy.model_management.cast_to_device
        pieces = [Piece.unpacked(piece, lambda t: move(t, weight.device, wide)) for piece in self.weights]
        add_(total, pieces, strength)
        return total


def targets(model: Any, clip: Any) -> TargetMap:
    """The TargetMap of what is connected: a MODEL, a CLIP or both (None: not connected)."""
    shapes: dict[str, tuple[int, ...]] = {}
    if model is not None:
        shapes |= _shapes(model)
    if clip is not None:
        shapes |= _shapes(clip.patcher)
    return target_map(recognise(shapes), shapes)


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
    """MODEL and CLIP with a landing on them, and per part how: "patch", or "live" and why."""

    model: Any
    clip: Any
    how: dict[str, str]


def applied(landing: Landing, mode: str, model: Any, clip: Any) -> Applied:
    """Put a landing on clones of MODEL and CLIP; what is not connected or not touched is passed on as it is.

    mode is "patch", "live", or "auto": live for the weights that are stored too coarsely to hold an update.
    """
    how: dict[str, str] = {}
    if pieces := landing.of_part("model"):
        model = model.clone()
        how["model"] = _put(model, landing, "model", pieces, mode)
    if pieces := landing.of_part("clip"):
        clip = clip.clone()
        how["clip"] = _put(clip.patcher, landing, "clip", pieces, mode)
    return Applied(model, clip, how)


def _put(patcher: Any, landing: Landing, part: str, pieces: Mapping[str, tuple[Piece, ...]], mode: str) -> str:
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
    if patched := {key: there for key, there in pieces.items() if key not in running}:
        _require_seen(patcher, patched)
        _register(patcher, {key: LandedPatch.of(there) for key, there in patched.items()})
    if running:
        attached = {key: there for key, there in pieces.items() if key in running}
        try:
            live.attach(patcher, attached, [row.strengths[part] for row in rows], schedules)
        except TargetError as error:
            if how == SCHEDULED and error.remedy == REMEDY:  # which mode it is is not the person's to choose there
                error.remedy = "Put it into a stack of its own before this one, or take the schedules out."
            raise
    return f"{how}, without the schedule (a text encoder has no steps)" if scheduled and part == "clip" else how


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
    # Called for no weight too: it renews patches_uuid, which tells the host that the weights in memory are stale.
    if missing := fresh.keys() - set(patcher.add_patches(fresh)):
        raise TargetError(f"{len(missing)} weights are not in the model any more.", module=min(missing))
