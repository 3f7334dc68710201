"""Patching: a Landing on the host's ModelPatcher, one adapter of ours per weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.model_management
import torch
from comfy.weight_adapter.base import WeightAdapterBase
from torch import Tensor

from ...lora_ops.dialects import target_map
from ...lora_ops.errors import TargetError
from ...lora_ops.families import Shapes, recognise
from ...lora_ops.landing import Landing, Piece, add_
from ...lora_ops.lora import TargetMap


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
        """W + strength · Σ ΔW, in place where the dtype allows.

        We register whole weights without a function, so offset and function are never ours to apply. Where the host
        patches for good it rounds a float32 result once; where it patches per forward, intermediate_dtype is the
        weight's own and so is the result's.
        """
        compute = torch.promote_types(weight.dtype, intermediate_dtype)
        total = weight.to(compute)
        move = comfy.model_management.cast_to_device
        pieces = [Piece.unpacked(piece, lambda t: move(t, weight.device, compute)) for piece in self.weights]
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
    return {key: tuple(tensor.shape) for key, tensor in patcher.model_state_dict().items()}


def patched(landing: Landing, model: Any, clip: Any) -> tuple[Any, Any]:
    """Clones of MODEL and CLIP with the landing on them; what is not connected or not touched is passed on."""
    by_part: dict[str, dict[str, LandedPatch]] = {"model": {}, "clip": {}}
    for (part, key), pieces in landing.pieces.items():
        by_part[part][key] = LandedPatch.of(pieces)
    if by_part["model"]:
        model = model.clone()
        _register(model, by_part["model"])
    if by_part["clip"]:
        clip = clip.clone()
        _register(clip.patcher, by_part["clip"])
    return model, clip


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
