"""Landing: a Stack put on a TargetMap. Patching, merging, ledgers and receipts all consume it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .adapters import Adapter, fused
from .dialects import published_map, published_maps
from .errors import ShapeError, TargetError, shown
from .families import FAMILIES
from .lora import Band, Lora, Named, Refusal, Target, TargetMap
from .stack import PARTS, Entry


@dataclass(frozen=True, eq=False)
class Piece:
    """One adapter on one weight: delta times strength is added to the band (None: to the whole weight).

    entry is the place in the stack of the LoRA it came from.
    """

    adapter: Adapter
    band: Band | None
    strength: float
    entry: int = 0

    def packed(self) -> tuple[Any, ...]:
        """The piece as plain tuples of tensors and numbers, for those who move tensors without knowing pieces."""
        band = None if self.band is None else (self.band.start, self.band.length)
        return type(self.adapter), self.adapter.packed(), band, self.strength

    @classmethod
    def unpacked(cls, packed: tuple[Any, ...], move: Callable[[Tensor], Tensor]) -> Piece:
        """The inverse of packed, each tensor passed through move."""
        algebra, fields, band, strength = packed
        moved = (move(value) if isinstance(value, Tensor) else value for value in fields)
        return cls(algebra(*moved), None if band is None else Band(*band), strength)


@dataclass(frozen=True, eq=False)
class RowLanding:
    """How one LoRA of the stack landed: every module of the file is in exactly one of the three."""

    entry: Entry
    landed: Mapping[str, Named]  # module -> where
    refused: tuple[Refusal, ...]
    unconnected: Mapping[str, tuple[str, ...]]  # part that is not connected -> its modules
    refused_parts: Mapping[str, int]  # part -> how many of the refused are known to belong there

    @property
    def total(self) -> int:
        """Modules that the connected parts should have taken."""
        return len(self.landed) + len(self.refused)

    @property
    def coverage(self) -> float:
        return len(self.landed) / self.total if self.total else 0.0

    def matched(self, part: str) -> int:
        return sum(named.target.part == part for named in self.landed.values())


@dataclass(frozen=True, eq=False)
class Landing:
    """(part, weight key) -> pieces in stack order; rows in stack order, those at strength 0 too."""

    family: str
    parts: frozenset[str]
    pieces: Mapping[tuple[str, str], tuple[Piece, ...]]
    rows: tuple[RowLanding, ...]

    def of_part(self, part: str) -> Mapping[str, tuple[Piece, ...]]:
        """Weight key -> pieces, of one part."""
        return {key: there for (where, key), there in self.pieces.items() if where == part}


def land(stack: Sequence[Entry], targets: TargetMap) -> Landing:
    """Find every module's place. Nothing is multiplied; what does not fit is refused in the row, not dropped.

    Strength 0 makes no piece, so that it is bit-identical to no LoRA.
    """
    pieces: dict[tuple[str, str], list[Piece]] = {}
    rows: list[RowLanding] = []
    for number, entry in enumerate(stack):
        row = _land_row(entry, targets)
        rows.append(row)
        for module, (target, _) in row.landed.items():
            if strength := entry.strengths[target.part]:
                adapter = entry.lora.modules[module]
                piece = Piece(adapter.swapped if target.swap else adapter, target.band, strength, number)
                pieces.setdefault((target.part, target.key), []).append(piece)
    found = {place: tuple(there) for place, there in pieces.items()}
    return Landing(targets.family, targets.parts, found, tuple(rows))


def _land_row(entry: Entry, targets: TargetMap) -> RowLanding:
    landed: dict[str, Named] = {}
    refused: list[Refusal] = []
    refused_parts = dict.fromkeys(sorted(targets.parts), 0)
    unconnected: dict[str, list[str]] = {}
    taken: dict[tuple[str, str], list[tuple[Band, str]]] = {}
    elsewhere = _Elsewhere(targets)
    readable = ((module, adapter, "") for module, adapter in entry.lora.modules.items())
    unreadable = ((module, None, reason) for module, reason in entry.lora.leftover)
    for module, adapter, reason in (*readable, *unreadable):
        named = targets.names.get(module)
        if named is not None:
            part = named.target.part
            there = taken.setdefault((part, named.target.key), [])
            if adapter is not None:
                reason = _misfit(adapter, named.target) or _collision(named.target.rows, there)
            if not reason:
                there.append((named.target.rows, module))
                landed[module] = named
                continue
        else:
            part = elsewhere.part(module)
            if part is not None and part not in targets.parts:
                unconnected.setdefault(part, []).append(module)
                continue
            reason = reason or ("no such weight in this model" if part else "name not known")
        refused.append(Refusal(module, reason))
        if part is not None:
            refused_parts[part] += 1
    silent = {part: tuple(modules) for part, modules in unconnected.items()}
    return RowLanding(entry, landed, tuple(refused), silent, refused_parts)


def _misfit(adapter: Adapter, target: Target) -> str:
    try:
        adapter.require_fit(target.delta_shape)
    except ShapeError as error:
        return error.what
    return ""


def _collision(rows: Band, there: Iterable[tuple[Band, str]]) -> str:
    """Two modules of one file for the same rows: nobody can say which one its writer meant."""
    for other, module in there:
        if rows.start < other.start + other.length and other.start < rows.start + rows.length:
            return f"the same place as '{shown(module)}'"
    return ""


class _Elsewhere:
    """The part a name belongs to in the published models, built only when a name is not in the model at hand."""

    def __init__(self, targets: TargetMap) -> None:
        self._family = targets.family
        self._maps: tuple[TargetMap, ...] | None = None

    def part(self, module: str) -> str | None:
        if self._maps is None:
            known = [published_map(family) for family in FAMILIES if family.name == self._family]
            self._maps = tuple(known or published_maps())
        return next((found.names[module].target.part for found in self._maps if module in found.names), None)


def guess(lora: Lora) -> TargetMap | None:
    """The published model that a file is for: the one most of its modules land on, None if none of them does.

    Shapes decide, names break ties: SD1.5 and SDXL share most names, small test models no shapes.
    """
    entry = Entry(lora, dict.fromkeys(PARTS, 1.0))

    def score(targets: TargetMap) -> tuple[int, int]:
        return len(_land_row(entry, targets).landed), sum(module in targets.names for module in names)

    names = [*lora.modules, *(refusal.module for refusal in lora.leftover)]
    scored = [(score(targets), targets) for targets in published_maps()]
    best, targets = max(scored, key=lambda pair: pair[0])
    return targets if any(best) else None


def require_coverage(landing: Landing, minimum: float) -> None:
    """Raises TargetError for a row of which nothing, or a smaller share than minimum, landed.

    Rows at strength 0 pass: they change nothing, so nothing can be missing.
    """
    for row in landing.rows:
        lost = row.coverage < minimum or not row.landed
        if lost and any(row.entry.strengths[part] for part in landing.parts):
            raise _not_covered(row, landing, minimum)


def _not_covered(row: RowLanding, landing: Landing, minimum: float) -> TargetError:
    lora = row.entry.lora
    missing = row.total - len(row.landed)
    titles = {family.name: family.title for family in FAMILIES}
    model = titles.get(landing.family, "of a family this version does not know")
    remedy = f"Set min_coverage to {row.coverage:.2f} or less to use what fits." if row.landed else ""
    facts = {"matched": len(row.landed), "total": row.total, "minimum": minimum, "refused": row.refused}
    if not row.total:
        where = " and ".join("CLIP" if part == "clip" else part.upper() for part in row.unconnected) or "nothing"
        what = f"all its {sum(map(len, row.unconnected.values()))} modules are for the {where}, which is not connected."
        return TargetError(what, file=lora.name, remedy=f"Connect {where}." if row.unconnected else "", **facts)
    first = row.refused[0]
    what = (
        f"{missing} of {row.total} modules are not in this model (first: {shown(first.module)}: {shown(first.reason)})."
    )
    likely = guess(lora)
    if likely is not None and likely.family != landing.family:
        what += f" The file looks made for {titles[likely.family]}; the model is {model}."
        remedy = remedy or f"Use it with a {titles[likely.family]} model."
    elif likely is None and not row.landed:
        what += " Its names are in no dialect this version knows."
        remedy = remedy or "Check that the file is a LoRA for this kind of model."
    return TargetError(what, file=lora.name, remedy=remedy, guess=likely and likely.family, **facts)


def merged(weight: Tensor, pieces: Sequence[Piece]) -> Tensor:
    """W + Σ strength · ΔW in float32, rounded once to the weight's dtype. The weight is not changed."""
    total = weight.to(torch.float32, copy=True)
    add_(total, pieces)
    return total.to(weight.dtype)


def add_(weight: Tensor, pieces: Sequence[Piece], strength: float = 1.0) -> None:
    """Add strength · Σ pieces to a weight in place, each band in one pass."""
    for band, there in by_band(pieces):
        rows = weight if band is None else weight.narrow(0, band.start, band.length)
        for adapter, factor in fused([(piece.adapter, piece.strength * strength) for piece in there], weight.dtype):
            adapter.add_(rows, factor)


def by_band(pieces: Iterable[Piece]) -> list[tuple[Band | None, list[Piece]]]:
    """The pieces of one weight, those of the same band together, in stack order within a band."""
    bands: dict[Band | None, list[Piece]] = {}
    for piece in pieces:
        bands.setdefault(piece.band, []).append(piece)
    return list(bands.items())
