"""Live mode on the host: hooks that go in and out with the model, through the ModelPatcher's injections.

Clones of a model share its modules, the host copies "is injected" to clones that are not, and ejects a clone that dies
whatever runs on its modules then. So a model holds one set of our hooks at most: whoever injects takes out what is
there, whoever ejects takes out what is there, and each run makes sure that its own is in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import comfy.ops
import comfy.utils
import torch
from comfy.patcher_extension import CallbacksMP, PatcherInjection, WrappersMP
from comfy.quant_ops import QuantizedTensor

from ...lora_ops.adapters import Transform
from ...lora_ops.errors import TargetError
from ...lora_ops.landing import Piece
from ...lora_ops.live import Live, weight_and_bias
from ...lora_ops.stack import Schedule
from .caches import hooks_of

KEY = "lora_ops_live"
CALLBACKS = (CallbacksMP.ON_EJECT_MODEL, CallbacksMP.ON_PRE_RUN, CallbacksMP.ON_DETACH)
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Attached:
    """All that our nodes run live on one MODEL or CLIP: pieces by weight, each entry's row in the ledger, strength and
    schedule, how many patches there were that scale what is below them (merges), and how many there were on each weight
    that a Transform looks at."""

    pieces: Mapping[str, tuple[Piece, ...]]
    rows: tuple[str, ...]
    strengths: tuple[float, ...]
    schedules: tuple[Schedule, ...]
    merges: int
    seen: Mapping[str, int]

    def joined(self, other: Attached) -> Attached:
        """This and then the other, whose entries count on from here."""
        pieces, first = dict(self.pieces), len(self.strengths)
        for key, there in other.pieces.items():
            moved = tuple(replace(piece, entry=piece.entry + first) for piece in there)
            pieces[key] = (*pieces.get(key, ()), *moved)
        return Attached(
            pieces,
            self.rows + other.rows,
            self.strengths + other.strengths,
            self.schedules + other.schedules,
            other.merges,
            {**other.seen, **self.seen},
        )

    def without(self, rows: AbstractSet[str]) -> Attached:
        """What remains when these rows are taken off."""
        kept = [entry for entry, row in enumerate(self.rows) if row not in rows]
        place = {entry: number for number, entry in enumerate(kept)}
        left = {
            key: tuple(replace(each, entry=place[each.entry]) for each in there if each.entry in place)
            for key, there in self.pieces.items()
        }
        return Attached(
            {key: there for key, there in left.items() if there},
            tuple(self.rows[entry] for entry in kept),
            tuple(self.strengths[entry] for entry in kept),
            tuple(self.schedules[entry] for entry in kept),
            self.merges,
            {key: self.seen[key] for key in _turned(left)},
        )

    @cached_property
    def footprints(self) -> tuple[frozenset[object], ...]:
        """What each entry does, whatever its strength. Adapters are equal only to themselves."""
        found: list[set[object]] = [set() for _ in self.strengths]
        for key, there in self.pieces.items():
            for piece in there:
                found[piece.entry].add((key, piece.adapter, piece.band, piece.factor))
        return tuple(map(frozenset, found))


def attach(
    patcher: Any,
    pieces: Mapping[str, tuple[Piece, ...]],
    rows: Sequence[str],
    strengths: Sequence[float],
    schedules: Sequence[Schedule],
) -> None:
    """Run these pieces live on a fresh clone, together with those of our nodes before it.

    Raises TargetError for a module that nothing can be added to.
    """
    seen = {key: len(patcher.patches.get(key, ())) for key in _turned(pieces)}
    attached = Attached(pieces, tuple(rows), tuple(strengths), tuple(schedules), _merges(patcher), seen)
    before = attached_to(patcher)
    if before is not None:
        _require_as_it_was(patcher, before)
        attached = before.joined(attached)
    _set(patcher, attached)


def _turned(pieces: Mapping[str, tuple[Piece, ...]]) -> list[str]:
    """The weights that a Transform looks at."""
    return [key for key, there in pieces.items() if any(isinstance(piece.adapter, Transform) for piece in there)]


def detach(patcher: Any, rows: AbstractSet[str]) -> None:
    """Take these rows off a fresh clone."""
    before = attached_to(patcher)
    if before is None or rows.isdisjoint(before.rows):
        return
    attached = before.without(rows)
    if attached.pieces:
        _set(patcher, attached)
        return
    patcher.remove_attachments(KEY)
    patcher.remove_injections(KEY)
    for kind in CALLBACKS:
        patcher.remove_callbacks_with_key(kind, KEY)
    patcher.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, KEY)
    for kinds in (patcher.callbacks, patcher.wrappers):  # the host fails on a kind that one clone has and another not
        for kind in [kind for kind, there in kinds.items() if not there]:
            del kinds[kind]


def attached_to(patcher: Any) -> Attached | None:
    """All that our nodes run live on a MODEL or CLIP."""
    return patcher.get_attachment(KEY)


def _set(patcher: Any, attached: Attached) -> None:
    _hooked(patcher, attached, spare=True)  # now, so that a module that cannot run live is this node's error

    def inject(whom: Any) -> None:
        """whom is the patcher that runs: perhaps a clone, perhaps one with another copy of the model."""
        _require_as_it_was(whom, attached)
        hooks = hooks_of(whom.model)
        live, hooks.places = _hooked(whom, attached, spare=compiled(whom))
        if hooks.installed is not None and hooks.installed is not live:
            hooks.installed.remove()
        live.stand_on(whom.model.current_weight_patches_uuid)
        live.set_strengths({place: attached.strengths[entry] for entry, place in hooks.places.items()})
        live.install()
        hooks.installed = live

    patcher.set_attachments(KEY, attached)
    patcher.set_injections(KEY, [PatcherInjection(inject=inject, eject=_eject)])
    # Once more when every other pack's hooks are out; a clone that died since loading took the hooks with it.
    for kind, callback in zip(CALLBACKS, (_eject, inject, _forget), strict=True):
        patcher.remove_callbacks_with_key(kind, KEY)
        patcher.add_callback_with_key(kind, KEY, callback)
    patcher.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, KEY)
    if not all(schedule.constant for schedule in attached.schedules):
        patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, _scheduled(attached))


def _eject(whom: Any) -> None:
    installed = hooks_of(whom.model).installed
    if installed is not None:
        installed.remove()


def _forget(whom: Any, unpatch_all: bool) -> None:
    """The model leaves the device: so does what the hooks keep there."""
    made = hooks_of(whom.model).made
    if unpatch_all and made is not None:
        made.forget()


def _hooked(patcher: Any, attached: Attached, *, spare: bool) -> tuple[Live, Mapping[int, int]]:
    """The hooks for a patcher's model, and the place of each entry among those that they were made of.

    spare: hooks that hold more entries serve too, those at strength 0. The result is then equal to rounding only.
    """
    hooks, footprints = hooks_of(patcher.model), attached.footprints
    places = _places(footprints, hooks.made_of)
    if hooks.made is None or places is None or (len(places) < sum(map(bool, hooks.made_of)) and not spare):
        modules = {key: comfy.utils.get_attr(patcher.model, key.rpartition(".")[0]) for key in attached.pieces}
        hooks.made, hooks.made_of = Live(modules, attached.pieces, _weight_and_bias), footprints
        places = {entry: entry for entry, footprint in enumerate(footprints) if footprint}
    return hooks.made, places


def compiled(patcher: Any) -> bool:
    """Whether other hooks would cost minutes of torch.compile: a row that is switched off then keeps its place."""
    patched = patcher.object_patches.values()
    return "torch_compile_kwargs" in patcher.model_options or any(hasattr(each, "_orig_mod") for each in patched)


def _places(footprints: Sequence[frozenset[object]], made_of: Sequence[frozenset[object]]) -> Mapping[int, int] | None:
    """Entry -> where its footprint stands among others, in order; None if they are not all there."""
    places: dict[int, int] = {}
    after = 0
    for entry, footprint in enumerate(footprints):
        if footprint:  # without one an entry at strength 0
            if footprint not in made_of[after:]:
                return None
            places[entry] = made_of.index(footprint, after)
            after = places[entry] + 1
    return places


def _merges(patcher: Any) -> int:
    """Patches that scale the weight below them."""
    return sum(strength_model != 1 for there in patcher.patches.values() for _, _, strength_model, _, _ in there)


def _require_as_it_was(patcher: Any, attached: Attached) -> None:
    """A merge scales the weights and their patches; what runs beside the weights would keep its full strength. And a
    Transform, which looks at its weight, would see a patch that was put there after it."""
    for key, count in attached.seen.items():
        if len(patcher.patches.get(key, ())) > count:
            raise TargetError(
                "was patched after a DoRA or another change that depends on it was put on it live.",
                module=key,
                remedy="Put that patch before it, or use mode patch for it.",
            )
    for there in patcher.hook_patches.values():
        for key in there.keys() & attached.seen.keys():
            raise TargetError(
                "is changed by a hook while a DoRA or another change that depends on it runs live on it.",
                module=key,
                remedy="Use mode patch for the DoRA.",
            )
    if _merges(patcher) > attached.merges:
        raise TargetError(
            "The model was merged with another one after a LoRA was put on it live.",
            remedy="Use mode patch for LoRAs that come before a merge.",
        )


def _scheduled(attached: Attached) -> Any:
    """A wrapper that sets the strengths of the moment before each call of the model."""
    percents = torch.linspace(0, 1, 1001).tolist()
    sigmas: WeakKeyDictionary[Any, list[float]] = WeakKeyDictionary()  # by the model's sampling object

    def call(executor: Any, x: Any, t: Any, *args: Any, **kwargs: Any) -> Any:
        model = executor.class_obj
        sampling, hooks = model.model_sampling, hooks_of(model)
        if sampling not in sigmas:
            sigmas[sampling] = [float(sampling.percent_to_sigma(percent)) for percent in percents]
        sigma = float(t.max())
        percent = next((p for p, s in zip(percents, sigmas[sampling], strict=True) if s <= sigma), 1.0)
        if hooks.installed is not None:
            now = [s * schedule.at(percent) for s, schedule in zip(attached.strengths, attached.schedules, strict=True)]
            hooks.installed.set_strengths({place: now[entry] for entry, place in hooks.places.items()})
        return executor(x, t, *args, **kwargs)

    return call


def _weight_and_bias(module: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Those that a module of the host runs with: patched, and de-quantised."""
    if not hasattr(module, "weight_function"):
        return weight_and_bias(module, device)
    weight, bias = comfy.ops.cast_bias_weight(module, dtype=torch.float32, device=device, bias_dtype=torch.float32)
    return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight, bias


def weights(patcher: Any) -> frozenset[str]:
    """The weights beside which our nodes run something live."""
    attached = attached_to(patcher)
    return frozenset() if attached is None else frozenset(attached.pieces)


def turned(patcher: Any) -> frozenset[str]:
    """Those of them that are looked at: a patch after them would be seen, too."""
    attached = attached_to(patcher)
    return frozenset() if attached is None else frozenset(attached.seen)


def coarse(patcher: Any, keys: Iterable[str]) -> dict[str, str]:
    """Those of these weights that are stored too coarsely to hold an update, and how they are."""
    weights = {key: comfy.utils.get_attr(patcher.model, key) for key in keys}
    return {key: stored for key, weight in weights.items() if (stored := _coarse(weight))}


def _coarse(weight: torch.Tensor) -> str:
    if type(weight) not in (torch.nn.Parameter, torch.Tensor):
        return type(weight).__name__
    return "" if weight.dtype in FLOATS else str(weight.dtype).removeprefix("torch.")


def bakeable(patcher: Any) -> Attached | None:
    """All that our nodes run live on a patcher, to be put into the weights for good.

    Raises TargetError for what depends on the step: no weight can hold it.
    """
    attached = attached_to(patcher)
    if attached is None:
        return None
    _require_as_it_was(patcher, attached)
    if not all(schedule.constant for schedule in attached.schedules):
        raise TargetError(
            "A LoRA on this model follows a schedule, which no weight can hold.",
            remedy="Take start, end and schedule out of its row, or switch the row off.",
        )
    return attached
