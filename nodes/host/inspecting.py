"""Everything that is patched or injected on a ModelPatcher, ours and others', in order of application."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import Any, NamedTuple

from comfy.weight_adapter.base import WeightAdapterBase

from . import ledger, live
from .patching import LandedPatch

OURS = (ledger.KEY, ledger.SOURCE, live.KEY)


class Patch(NamedTuple):
    """An entry of the host's list of patches on a weight."""

    strength: float
    value: Any
    strength_model: float  # factor on all below
    offset: Any
    function: Any


class Source(NamedTuple):
    """What put patches of one kind on a patcher in one go: all that the host keeps of it."""

    kind: str
    strength: float
    strength_model: float
    key: object  # tells two of the same kind apart


def source(patch: Patch) -> Source:
    """The source of another node's patch. The adapters of one LoRA file share the set of its keys."""
    value, strengths = patch.value, (patch.strength, patch.strength_model)
    if isinstance(value, list):
        return Source("model merge", *strengths, None)
    if isinstance(value, WeightAdapterBase):
        return Source(f"{type(value).__name__} (core LoRA)", *strengths, id(value.loaded_keys))
    return Source(value[0] if len(value) == 2 else "diff", *strengths, None)


def patches(patcher: Any) -> list[dict[str, Any]]:
    """The LoRAs of our nodes and the patches of others, in an order in which each weight has them."""
    ours = {each.row: each for each in ledger.records(patcher)}
    found: dict[object, dict[str, Any]] = {row: _of_record(each) for row, each in ours.items()}
    order: dict[object, set[object]] = {}
    for before, after in pairwise(ours):
        order.setdefault(after, set()).add(before)
    for there in patcher.patches.values():
        seen: list[object] = []
        for patch in map(Patch._make, there):
            if isinstance(patch.value, LandedPatch):
                seen += [row for row, _ in patch.value.weights]
                continue
            name = source(patch)
            entry = found.setdefault(name, _of_source(name))
            entry["weights"] += 1
            entry["bytes"] += ledger.size([patch.value.weights if hasattr(patch.value, "weights") else patch.value])
            seen.append(name)
        for before, after in pairwise(seen):
            if before != after:
                order.setdefault(after, set()).add(before)
    try:
        sorter = TopologicalSorter({name: order.get(name, set()) for name in found})
        names: Iterable[object] = [name for name in sorter.static_order() if name in found]
    except CycleError:  # two sources that look alike took turns
        names = found
    return [{"order": number, **found[name]} for number, name in enumerate(names, 1)]


def _of_record(record: ledger.Record) -> dict[str, Any]:
    schedule = record.schedule
    return {
        "source": record.name,
        "ours": True,
        "how": record.how,
        "strength": record.strength,
        "blocks": record.blocks,
        "schedule": None if schedule.constant else [schedule.start, schedule.end, [*map(list, schedule.points)]],
        "weights": record.weights,
        "bytes": record.bytes,
        "sha256": record.known_hash or None,
    }


def _of_source(name: Source) -> dict[str, Any]:
    return {
        "source": name.kind,
        "ours": False,
        "how": "patch",
        "strength": name.strength,
        "strength_model": name.strength_model,
        "weights": 0,
        "bytes": 0,
    }


def others(patcher: Any) -> dict[str, list[str]]:
    """What else other nodes have put on a patcher, by kind: it has no place in the order of the patches."""
    options = patcher.model_options
    inside = options.get("transformer_options", {})
    hooks = sum(len(there) for there in patcher.hook_patches.values())
    found = {
        "object patches": [f"{name} ({type(each).__name__})" for name, each in patcher.object_patches.items()],
        "injections": _keys(patcher.injections),
        "wrappers": [f"{kind}: {key}" for kind, there in patcher.wrappers.items() for key in _keys(there)],
        "callbacks": [f"{kind}: {key}" for kind, there in patcher.callbacks.items() for key in _keys(there)],
        "attachments": _keys(patcher.attachments),
        "additional models": _keys(patcher.additional_models),
        "weight wrappers": _keys(patcher.weight_wrapper_patches),
        "hooks": [f"{len(patcher.hook_patches)} on {hooks} weights"] if hooks else [],
        "forced hooks": [type(each).__name__ for each in getattr(patcher.forced_hooks, "hooks", ())],
        "model patches": [*_nested(inside.get("patches", {})), *_nested(inside.get("patches_replace", {}))],
        "model options": [str(key) for key in options if key != "transformer_options"],
    }
    return {kind: names for kind, names in found.items() if names}


def _keys(there: Mapping[Any, Any]) -> list[str]:
    """The keys of others; the host's own for no key is None."""
    return ["(no key)" if key is None else str(key) for key, value in there.items() if key not in OURS and value]


def _nested(patches: Mapping[str, Any]) -> Iterator[str]:
    for name, there in patches.items():
        yield f"{name} × {len(there)}"
