"""Live mode on the host: hooks that go in and out with the model, through the ModelPatcher's injections.

Clones of a model share its modules, the host copies "is injected" to clones that are not, and ejects a clone that dies
whatever runs on its modules then. So a model holds one set of our hooks at most: whoever injects takes out what is
there, whoever ejects takes out what is there, and each run makes sure that its own is in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import comfy.utils
import torch
from comfy.patcher_extension import CallbacksMP, PatcherInjection, WrappersMP

from ...lora_ops.errors import TargetError
from ...lora_ops.landing import Piece
from ...lora_ops.live import Live
from ...lora_ops.stack import Schedule
from .caches import hooks_of

KEY = "lora_ops_live"
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Attached:
    """All that our nodes run live on one MODEL or CLIP: pieces by weight, and each entry's strength and schedule."""

    pieces: Mapping[str, tuple[Piece, ...]]
    strengths: tuple[float, ...]
    schedules: tuple[Schedule, ...]

    def joined(self, other: Attached) -> Attached:
        """This and then the other, whose entries count on from here."""
        pieces, first = dict(self.pieces), len(self.strengths)
        for key, there in other.pieces.items():
            moved = tuple(replace(piece, entry=piece.entry + first) for piece in there)
            pieces[key] = (*pieces.get(key, ()), *moved)
        return Attached(pieces, self.strengths + other.strengths, self.schedules + other.schedules)

    def made_of(self) -> list[object]:
        """What the hooks are built from. Adapters are equal only to themselves."""
        return [(key, piece.adapter, piece.band, piece.entry) for key, there in self.pieces.items() for piece in there]


def attach(
    patcher: Any,
    pieces: Mapping[str, tuple[Piece, ...]],
    strengths: Sequence[float],
    schedules: Sequence[Schedule],
) -> None:
    """Run these pieces live on a fresh clone, together with those of our nodes before it.

    Raises TargetError for a module that nothing can be added to.
    """
    attached = Attached(pieces, tuple(strengths), tuple(schedules))
    before = patcher.get_attachment(KEY)
    if before is not None:
        attached = before.joined(attached)
    _live(patcher, attached)  # now, so that a module that cannot run live is this node's error

    def inject(whom: Any) -> None:
        """whom is the patcher that runs: perhaps a clone, perhaps one with another copy of the model."""
        _require_unmerged(whom, attached)
        hooks = hooks_of(whom.model)
        live = _live(whom, attached)
        if hooks.installed is not None and hooks.installed is not live:
            hooks.installed.remove()
        live.set_strengths(attached.strengths)
        live.install()
        hooks.installed = live

    patcher.set_attachments(KEY, attached)
    patcher.set_injections(KEY, [PatcherInjection(inject=inject, eject=_eject)])
    _set_callback(patcher, CallbacksMP.ON_EJECT_MODEL, _eject)  # once more when every other pack's hooks are out
    _set_callback(patcher, CallbacksMP.ON_PRE_RUN, inject)  # a clone that died since loading took the hooks with it
    _set_callback(patcher, CallbacksMP.ON_DETACH, _forget)
    patcher.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, KEY)
    if not all(schedule.constant for schedule in attached.schedules):
        patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, _scheduled(attached))


def _set_callback(patcher: Any, kind: str, callback: Any) -> None:
    patcher.remove_callbacks_with_key(kind, KEY)
    patcher.add_callback_with_key(kind, KEY, callback)


def _eject(whom: Any) -> None:
    installed = hooks_of(whom.model).installed
    if installed is not None:
        installed.remove()


def _forget(whom: Any, unpatch_all: bool) -> None:
    """The model leaves the device: so does what the hooks keep there."""
    made = hooks_of(whom.model).made
    if unpatch_all and made is not None:
        made.forget()


def _live(patcher: Any, attached: Attached) -> Live:
    """The hooks for a patcher's model; those made last are used again if only strengths differ."""
    hooks, made_of = hooks_of(patcher.model), attached.made_of()
    if hooks.made is None or hooks.made_of != made_of:
        modules = {key: comfy.utils.get_attr(patcher.model, key.removesuffix(".weight")) for key in attached.pieces}
        hooks.made, hooks.made_of = Live(modules, attached.pieces), made_of
    return hooks.made


def _require_unmerged(patcher: Any, attached: Attached) -> None:
    """A merge scales the weights and their patches; what runs beside the weights would keep its full strength."""
    for key in attached.pieces:
        if any(strength_model != 1 for _, _, strength_model, _, _ in patcher.patches.get(key, ())):
            raise TargetError(
                "was merged with another model after a LoRA was put on it live.",
                module=key,
                remedy="Use mode patch for LoRAs that come before a merge.",
            )


def _scheduled(attached: Attached) -> Any:
    """A wrapper that sets the strengths of the moment before each call of the model."""
    percents = torch.linspace(0, 1, 1001).tolist()
    sigmas: WeakKeyDictionary[Any, list[float]] = WeakKeyDictionary()  # by the model's sampling object

    def call(executor: Any, x: Any, t: Any, *args: Any, **kwargs: Any) -> Any:
        model = executor.class_obj
        sampling, live = model.model_sampling, hooks_of(model).installed
        if sampling not in sigmas:
            sigmas[sampling] = [float(sampling.percent_to_sigma(percent)) for percent in percents]
        sigma = float(t.max())
        percent = next((p for p, s in zip(percents, sigmas[sampling], strict=True) if s <= sigma), 1.0)
        pairs = zip(attached.strengths, attached.schedules, strict=True)
        if live is not None:
            live.set_strengths([strength * schedule.at(percent) for strength, schedule in pairs])
        return executor(x, t, *args, **kwargs)

    return call


def coarse(patcher: Any, keys: Sequence[str]) -> str:
    """How a weight among these is stored where that is too coarse to hold an update, "" where none is."""
    for key in keys:
        weight = comfy.utils.get_attr(patcher.model, key)
        if type(weight) not in (torch.nn.Parameter, torch.Tensor):
            return type(weight).__name__
        if weight.dtype not in FLOATS:
            return str(weight.dtype).removeprefix("torch.")
    return ""
