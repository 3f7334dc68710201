"""Live mode on the host: hooks that go in and out with the model, through the ModelPatcher's injections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import comfy.utils
import torch
from comfy.patcher_extension import CallbacksMP, PatcherInjection, WrappersMP

from ...lora_ops.landing import Piece
from ...lora_ops.live import Live
from ...lora_ops.stack import Schedule

KEY = "lora_ops_live"
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class _Attached:
    """All that our nodes run live on one MODEL or CLIP; pieces know their row, rows their strength and schedule."""

    pieces: Mapping[str, tuple[Piece, ...]]
    strengths: tuple[float, ...]
    schedules: tuple[Schedule, ...]

    def joined(self, other: _Attached) -> _Attached:
        """This and then the other, whose rows count on from here."""
        pieces, first = dict(self.pieces), len(self.strengths)
        for key, there in other.pieces.items():
            moved = tuple(replace(piece, row=piece.row + first) for piece in there)
            pieces[key] = (*pieces.get(key, ()), *moved)
        return _Attached(pieces, self.strengths + other.strengths, self.schedules + other.schedules)


def attach(
    patcher: Any,
    pieces: Mapping[str, tuple[Piece, ...]],
    strengths: Sequence[float],
    schedules: Sequence[Schedule],
) -> None:
    """Run these pieces live on a clone, together with those of our nodes before it.

    Raises TargetError for a module that nothing can be added to.
    """
    attached = _Attached(pieces, tuple(strengths), tuple(schedules))
    before = patcher.get_attachment(KEY)
    if before is not None:
        attached = before.joined(attached)
    live = _live(patcher, attached)
    turn = object()  # whose strengths the shared hooks have: an older clone must not take them from a newer one

    def inject(_: Any) -> None:
        live.set_strengths(attached.strengths)
        live.install()
        _turns[live] = turn

    def eject(_: Any = None) -> None:
        if _turns.get(live) is turn and live.remove():
            del _turns[live]

    patcher.set_attachments(KEY, attached)
    patcher.set_injections(KEY, [PatcherInjection(inject=inject, eject=eject)])
    # Another's hook may have stood on one of ours when the host ejected ours first: it is gone by now.
    patcher.remove_callbacks_with_key(CallbacksMP.ON_EJECT_MODEL, KEY)
    patcher.add_callback_with_key(CallbacksMP.ON_EJECT_MODEL, KEY, eject)
    patcher.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, KEY)
    if not all(schedule.constant for schedule in attached.schedules):
        patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, _scheduled(live, attached))


def _scheduled(live: Live, attached: _Attached) -> Any:
    """A wrapper that sets the strengths of the moment before each call of the model."""
    percents = torch.linspace(0, 1, 1001).tolist()
    sigmas: WeakKeyDictionary[Any, list[float]] = WeakKeyDictionary()  # by the model's sampling object

    def call(executor: Any, x: Any, t: Any, *args: Any, **kwargs: Any) -> Any:
        sampling = executor.class_obj.model_sampling
        if sampling not in sigmas:
            sigmas[sampling] = [float(sampling.percent_to_sigma(percent)) for percent in percents]
        sigma = float(t.max())
        percent = next((p for p, s in zip(percents, sigmas[sampling], strict=True) if s <= sigma), 1.0)
        pairs = zip(attached.strengths, attached.schedules, strict=True)
        live.set_strengths([strength * schedule.at(percent) for strength, schedule in pairs])
        return executor(x, t, *args, **kwargs)

    return call


_turns: WeakKeyDictionary[Live, object] = WeakKeyDictionary()
_lives: WeakKeyDictionary[Any, tuple[Any, Live]] = WeakKeyDictionary()  # model -> the last hooks made for it


def _live(patcher: Any, attached: _Attached) -> Live:
    """The hooks of these pieces; those made last for the model are used again if only strengths differ."""
    made_of = tuple(
        (key, tuple((id(piece.adapter.down), piece.adapter.scale, piece.band, piece.row) for piece in there))
        for key, there in attached.pieces.items()
    )
    found = _lives.get(patcher.model)
    if found is None or found[0] != made_of:
        modules = {key: comfy.utils.get_attr(patcher.model, key.removesuffix(".weight")) for key in attached.pieces}
        found = made_of, Live(modules, attached.pieces)
        _lives[patcher.model] = found
    return found[1]


def coarse(patcher: Any, keys: Sequence[str]) -> str:
    """How a weight among these is stored where that is too coarse to hold an update, "" where none is."""
    for key in keys:
        weight = comfy.utils.get_attr(patcher.model, key)
        if type(weight) not in (torch.nn.Parameter, torch.Tensor):
            return type(weight).__name__
        if weight.dtype not in FLOATS:
            return str(weight.dtype).removeprefix("torch.")
    return ""
