"""Receipt: a Landing told to a person, as data and as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

from .adapters import Full
from .errors import shown
from .families import FAMILIES
from .landing import Landing, RowLanding
from .lora import Lora, Refusal
from .survival import Survival

VERSION = 1
FIRST = 5  # names listed per reason
REASON = 500  # characters shown of one: with the shapes that were found and expected
TITLES = {family.name: family.title for family in FAMILIES}
MARKS = {True: "✓", False: "!"}


@dataclass(frozen=True)
class Receipt:
    """What was done, as data (for JSON) and as text (for a node or a terminal)."""

    data: Mapping[str, Any]
    text: str


def receipt(
    landing: Landing,
    seconds: float,
    how: Mapping[str, str] | None = None,
    survival: Mapping[str, Survival] | None = None,
    *,
    predicted: bool = True,
    weights: int | None = None,
) -> Receipt:
    """The receipt of a landing that took so many seconds, of how each part was changed (patched or live, and why), and
    of how much of the update survives in the weights that are stored too coarsely for all of it.

    The host patches weights later, when it samples: their survival is predicted then, from a few of them.
    weights is how many were changed, where that is more than the landing's.
    """
    how = how or {}
    weights = len(landing.pieces) if weights is None else weights
    rows = [_row(row, landing) for row in landing.rows]
    data = {
        "version": VERSION,
        "family": landing.family,
        "connected": sorted(landing.parts),
        "mode": dict(how),
        "rows": rows,
        "weights": weights,
        "landing_seconds": round(seconds, 4),
        "survival": _survival(survival, predicted) if survival else None,
    }
    head = f"{TITLES.get(landing.family, 'unknown family')}: {weights} weights changed"
    head += "".join(f"\n{part}: {told}" for part, told in sorted(how.items()) if told != "patch")
    lines = [*(line for row in rows for line in _lines(row)), *_survives(data["survival"])]
    return Receipt(data, "\n".join([head, *lines]))


def _survival(found: Mapping[str, Survival], predicted: bool) -> dict[str, Any]:
    whole = reduce(Survival.and_of, found.values())
    worst = sorted(found, key=lambda key: found[key].cosine)[:FIRST]
    each = by_weight({key: found[key] for key in worst})
    return {
        "predicted": predicted,
        "layers": len(found),
        "cosine": round(whole.cosine, 4),
        "norm": round(whole.norm, 4),
        "little": whole.little,
        "worst": [{"weight": key, **told} for key, told in each.items()],
    }


def by_weight(found: Mapping[str, Survival]) -> dict[str, dict[str, float]]:
    """How much of the update survives in each weight: cosine and norm."""
    return {key: {"cosine": round(each.cosine, 4), "norm": round(each.norm, 4)} for key, each in found.items()}


def _survives(found: Mapping[str, Any] | None) -> Iterable[str]:
    if found is None:
        return
    figures = f"cosine {found['cosine']:.3f}, norm × {found['norm']:.2f}"
    source = f"predicted from {found['layers']} layers" if found["predicted"] else f"measured, {found['layers']} layers"
    yield f"{MARKS[not found['little']]} what survives of the update as the weights are stored: {figures} ({source})"
    for worst in found["worst"]:
        yield f"   worst: {shown(worst['weight'])}, cosine {worst['cosine']:.3f}, norm × {worst['norm']:.2f}"
    if found["little"]:
        yield "   Little does: the rounding is as large as the update. Use mode live, or bf16."


def _row(row: RowLanding, landing: Landing) -> dict[str, Any]:
    lora = row.entry.lora
    used = {part: row.entry.strengths[part] for part in sorted(landing.parts)}
    return {
        "lora": lora.name,
        "asked": row.entry.asked or None,
        "other_tensors": row.entry.other_tensors,
        "strength": used,
        "dialect": most(named.dialect for named in row.landed.values()),
        "parts": {
            part: {"matched": row.matched(part), "total": row.matched(part) + row.refused_parts.get(part, 0)}
            for part in sorted(landing.parts)
        },
        "matched": len(row.landed),
        "total": row.total,
        "coverage": round(row.coverage, 6),
        "unconnected": {part: len(modules) for part, modules in row.unconnected.items()},
        "refused": by_reason(row.refused),
        "energy_landed": _energy_landed(row),
        "blocks": {str(each): count for each, count in zip(row.entry.blocks, row.chosen, strict=True)},
        "idle": sum(lora.modules[module].idle for module in row.landed),
        **numbers(lora, row.landed),
    }


def numbers(lora: Lora, modules: Iterable[str]) -> dict[str, Any]:
    """Algebra, rank, alpha source and scale of these modules, as value -> how many have it; a difference has neither
    rank nor alpha."""
    names = list(modules)
    adapters = [lora.modules[module] for module in names]
    factored = [module for module, adapter in zip(names, adapters, strict=True) if not isinstance(adapter, Full)]
    return {
        "algebra": _tally(adapter.ALGEBRA for adapter in adapters),
        "rank": _tally(lora.modules[module].rank for module in factored),
        "alpha": _tally(lora.alpha_source(module) for module in factored),
        "scale": _tally(f"{adapter.scale:.6g}" for adapter in adapters),
    }


def figures(found: Mapping[str, Mapping[str, int]]) -> str:
    """What numbers found, as a line."""
    algebra, rank, scale, alpha = (", ".join(found[name]) for name in ("algebra", "rank", "scale", "alpha"))
    if len(found["algebra"]) > 1:
        algebra = ", ".join(f"{count} {name}" for name, count in found["algebra"].items())
    return f"{algebra}{f', rank {rank}' if rank else ''}; scale {scale}{f', alpha from: {alpha}' if alpha else ''}"


def by_reason(refused: Iterable[Refusal]) -> list[dict[str, Any]]:
    """Refusals grouped by reason, with the first names and what to do."""
    groups: dict[tuple[str, str], list[str]] = {}
    for module, *why in refused:
        groups.setdefault((why[0], why[1]), []).append(module)
    return [
        {
            "reason": shown(reason, REASON),
            "remedy": remedy,
            "count": len(modules),
            "first": [shown(module) for module in modules[:FIRST]],
        }
        for (reason, remedy), modules in sorted(groups.items(), key=lambda group: -len(group[1]))
    ]


def most(values: Iterable[str]) -> str | None:
    """The most frequent value, None of none."""
    common = Counter(values).most_common(1)
    return common[0][0] if common else None


def _tally(values: Iterable[object]) -> dict[str, int]:
    return {str(value): count for value, count in Counter(values).most_common()}


def _energy_landed(row: RowLanding) -> float | None:
    """Share of ‖ΔW‖² that landed, among the modules that could be read; None where none of them says anything, or where
    only the weight could tell.

    Modules for a part that is not connected do not count. Without refusals there is nothing to compute.
    """
    if not row.refused:
        return 1.0 if row.landed else None
    modules = row.entry.lora.modules
    landed = [modules[module].energy() for module in row.landed]
    lost = [modules[module].energy() for module, *_ in row.refused if module in modules]
    known = [energy for energy in (*landed, *lost) if energy is not None]
    if not sum(known) or len(known) < len(landed) + len(lost):
        return None
    return round(sum(known[: len(landed)]) / sum(known), 6)


def _lines(row: Mapping[str, Any]) -> Iterable[str]:
    strengths = ", ".join(f"{part} {strength:g}" for part, strength in row["strength"].items())
    whole = row["matched"] == row["total"] and row["matched"] > 0 and all(row["blocks"].values())
    yield f"{MARKS[whole]} {shown(row['lora'])} ({strengths})"
    if row["asked"]:
        yield f"   asked for as {shown(row['asked'])}"
    if row["other_tensors"]:
        yield "   other tensors than those the row was written for"
    parts = ", ".join(f"{part} {n['matched']}/{n['total']}" for part, n in row["parts"].items() if n["total"])
    counts = f"{row['matched']} of {row['total']} modules landed{f' ({parts})' if parts else ''}"
    yield f"   {counts}; {row['dialect'] or 'no dialect'}"
    if row["matched"]:
        yield f"   {figures(row)}"
    if row["blocks"]:
        yield f"   blocks: {', '.join(f'{shown(each)} ({count} modules)' for each, count in row['blocks'].items())}"
    if row["energy_landed"] is not None and row["energy_landed"] < 1:
        yield f"   {row['energy_landed']:.1%} of the update's energy landed"
    if row["idle"]:
        yield f"   {row['idle']} of the landed modules are all zero: scaled to 0, untrained, or the file is incomplete"
    for part, count in row["unconnected"].items():
        yield f"   {count} modules for {part}, which is not connected"
    for group in row["refused"]:
        yield f"   {group['count']} refused: {group['reason']} (first: {group['first'][0]}). {group['remedy']}"
