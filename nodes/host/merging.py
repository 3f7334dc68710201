"""Merging: our LoRAs become part of the weights of a model of its own; other nodes' patches stay patches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple
from uuid import uuid4

import comfy.model_management
import comfy.model_patcher
import comfy.utils
from comfy.weight_adapter import LoHaAdapter, LoKrAdapter, LoRAAdapter
from torch import nn

from ...lora_ops.adapters import Additive
from ...lora_ops.errors import StackError, TargetError, shown
from ...lora_ops.files import Progress, meter
from ...lora_ops.landing import Landing, Piece
from ...lora_ops.survival import Survival
from . import ledger, live, storing
from .inspecting import OURS, Patch
from .patching import LandedPatch, take_off
from .tree import Base

MAGNITUDE = {LoRAAdapter: 4, LoHaAdapter: 7, LoKrAdapter: 8}  # where in the weights of core's adapters DoRA's stands
COPIES = 6  # in float32 of a weight that are on the device while it is merged, at most


class Work(NamedTuple):
    """What is to become part of a patcher's weights: pieces by weight, in the order in which they act."""

    patcher: Any
    part: str
    pieces: Mapping[str, Sequence[Piece]]
    records: tuple[ledger.Record, ...]

    @property
    def bytes(self) -> int:
        base = Base.of(self.patcher)
        return sum(base.weight(key).nbytes for key in self.pieces)


class Merged(NamedTuple):
    """The merged MODEL and CLIP, how many weights are other ones, and of each that is not in float32 how much of the
    update survived."""

    model: Any
    clip: Any
    weights: int
    survival: Mapping[str, Survival]


def merged(landing: Landing, model: Any, clip: Any, progress: Progress | None = None) -> Merged:
    """MODEL and CLIP with all LoRAs of ours in their weights: those on them already, then those of a landing.

    The inputs stay as they are; progress hears the bytes of weights. Raises StackError for a schedule, TargetError
    where another node's patch or hook stands in the way.
    """
    rows = ledger.rows_of(landing)
    works = [
        _work(patcher, part, landing, rows)
        for part, patcher in (("model", model), ("clip", None if clip is None else clip.patcher))
        if patcher is not None
    ]
    more = meter(sum(work.bytes for work in works), progress)
    survival: dict[str, Survival] = {}
    for work in works:
        if not work.pieces:
            continue
        patcher, found = _merged(work, more)
        survival |= found
        if work.part == "model":
            model = patcher
        else:
            clip = clip.clone()
            clip.patcher, clip.cond_stage_model = patcher, patcher.model
    return Merged(model, clip, sum(len(work.pieces) for work in works), survival)


def _work(patcher: Any, part: str, landing: Landing, rows: Sequence[str]) -> Work:
    """All that our nodes do to a patcher, in order: its patches, what runs live beside them, and then the landing."""
    fresh = landing.of_part(part)
    records = ledger.records(patcher)
    for record in records:
        if not record.schedule.constant:
            what = f"'{shown(record.name)}' follows a schedule, which weights cannot."
            raise StackError(what, remedy="Unload it first, or take its schedule out.")
    attached = live.attached_to(patcher)
    running = {} if attached is None else attached.pieces
    patched = {key for key, there in patcher.patches.items() if any(isinstance(each[1], LandedPatch) for each in there)}
    pieces: dict[str, list[Piece]] = {}
    for key in sorted(patched | running.keys() | fresh.keys()):
        found = pieces[key] = []
        foreign: list[Patch] = []
        for patch in map(Patch._make, patcher.patches.get(key, ())):
            if isinstance(patch.value, LandedPatch):
                _require_free(key, foreign, patch.value.pieces)
                found += patch.value.pieces
            else:
                foreign.append(patch)
        after = [*running.get(key, ()), *fresh.get(key, ())]
        _require_free(key, foreign, after)
        found += after
    more = ledger.recorded(landing, rows, part, fresh, {})
    return Work(patcher, part, pieces, (*records, *more))


def _require_free(key: str, before: Sequence[Patch], pieces: Sequence[Piece]) -> None:
    """Raises TargetError for pieces that would do something else if they came before another node's patches."""
    if not pieces or not before:
        return
    additive = all(isinstance(piece.adapter, Additive) for piece in pieces)
    for patch in before:
        if not additive or not _adds(patch):
            what = "has another node's patch before a LoRA of ours, and the order of the two matters."
            raise TargetError(what, module=key, remedy="Put Merge LoRA before that node, or that node after it.")


def _adds(patch: Patch) -> bool:
    """Whether another node's patch adds the same to any weight."""
    value = patch.value
    if patch.strength_model != 1:
        return False
    if type(value) in MAGNITUDE:
        return all(each is None for each in value.weights[MAGNITUDE[type(value)] :])
    return isinstance(value, tuple) and (len(value) == 1 or (value[0] == "diff" and len(value[1]) == 1))


def _merged(work: Work, more: Callable[[int], None]) -> tuple[Any, dict[str, Survival]]:
    patcher, base = work.patcher, Base.of(work.patcher)
    _require_alone(patcher)
    comfy.model_management.unload_model_and_clones(patcher)  # its weights come back to where they are shared
    if not comfy.model_management.is_device_cpu(patcher.load_device):
        largest = max(base.weight(key).numel() for key in work.pieces)
        comfy.model_management.free_memory(largest * 4 * COPIES, patcher.load_device)
    model = base.copied()
    survival: dict[str, Survival] = {}
    for key, pieces in work.pieces.items():
        weight = base.weight(key)
        found = storing.stored(patcher.model, key, weight, pieces, patcher.load_device)
        comfy.utils.set_attr_param(model, key, found.weight.to(patcher.offload_device))
        if found.survival is not None:
            survival[key] = found.survival
        more(weight.nbytes)
    result = patcher.clone(model_override=(model, ({}, {}, {}, set())))
    result.parent = None  # it would keep the unmerged weights
    result.hook_backup, result.cached_hook_patches, result.current_hooks = {}, {}, None
    result.is_injected = False
    result.clone_base_uuid = uuid4()
    take_off(result, {record.row for record in ledger.records(patcher)})
    ledger.write(result, [replace(record, how="merged", bytes=0) for record in work.records])
    if patcher.cached_patcher_init and result.get_attachment(ledger.SOURCE) is None:
        result.set_attachments(ledger.SOURCE, patcher.cached_patcher_init)
    result.cached_patcher_init = (rebuilt, (Base.of(result), result.load_device))
    return result, survival


def rebuilt(base: Base, load_device: Any, disable_dynamic: bool = False) -> Any:
    """A fresh patcher around a copy of a merged model, where the host would load the file anew: for another GPU, or
    without dynamic VRAM. A bare file would be without the LoRAs."""
    kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    return kind(base.copied(alone=True), load_device, base.offload_device)


def _require_alone(patcher: Any) -> None:
    """Raises TargetError for what other nodes have tied to the modules that are there: it would stay with them."""
    tree = set(patcher.model.modules())
    tied = [f"the injection '{key}'" for key in patcher.injections if key not in OURS]
    if live.compiled(patcher):
        tied.append("a compiled model")
    if patcher.get_additional_models_with_key("multigpu"):
        tied.append("copies on other GPUs")
    for name, value in patcher.object_patches.items():
        owner = value if isinstance(value, nn.Module) else getattr(value, "__self__", None)
        if isinstance(owner, nn.Module) and not tree.isdisjoint(owner.modules()):
            tied.append(f"another {name}")
    if tied:
        what = f"The model has {' and '.join(map(shown, tied))}, which stays with the unmerged model."
        raise TargetError(what, remedy="Put Merge LoRA before the node that adds it.", tied=tied)
