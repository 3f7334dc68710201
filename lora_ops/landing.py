"""Landing: a Stack put on a TargetMap. Patching, merging, ledgers and receipts all consume it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from .adapters import Adapter, Additive, add_all_
from .dialects import published_map, published_maps
from .errors import AdapterError, ShapeError, StackError, TargetError, shown
from .families import FAMILIES
from .lora import BIAS, Band, Lora, Named, Refusal, Target, TargetMap
from .select import Choice, choose
from .stack import PARTS, Entry

OTHER_MODEL = "Use it with the model it was made for."


@dataclass(frozen=True, eq=False)
class Piece:
    """One adapter on one weight: what it does to the band (None: to the whole weight) at a strength.

    entry is the place in the stack of the LoRA it came from, factor what its selectors put into the strength.
    """

    adapter: Adapter
    band: Band | None
    strength: float
    entry: int = 0
    factor: float = 1.0

    def packed(self) -> tuple[Any, ...]:
        """The piece as plain tuples of tensors and numbers, for those who move tensors without knowing pieces."""
        band = None if self.band is None else (self.band.start, self.band.length)
        return type(self.adapter), self.adapter.packed(), band, self.strength

    @classmethod
    def unpacked(cls, packed: tuple[Any, ...], move: Callable[[Tensor], Tensor]) -> Piece:
        """The inverse of packed, each tensor passed through move."""
        algebra, fields, band, strength = _moved(packed, move)
        return cls(algebra.unpacked(fields), None if band is None else Band(*band), strength)


def _moved(value: Any, move: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, tuple):
        return tuple(_moved(each, move) for each in value)
    return move(value) if isinstance(value, Tensor) else value


@dataclass(frozen=True, eq=False)
class RowLanding:
    """How one LoRA of the stack landed: every module of the file is in exactly one of the three."""

    entry: Entry
    landed: Mapping[str, Named]  # module -> where
    refused: tuple[Refusal, ...]
    unconnected: Mapping[str, tuple[str, ...]]  # part that is not connected -> its modules
    refused_parts: Mapping[str, int]  # part -> how many of the refused are known to belong there
    chosen: tuple[int, ...] = ()  # how many of the landed modules each of the entry's selectors touched

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

    Raises StackError for a selector that chooses nothing in the model, AdapterError for an update that is to be cut
    and cannot be.
    """
    pieces: dict[tuple[str, str], list[Piece]] = {}
    rows: list[RowLanding] = []
    for number, entry in enumerate(stack):
        row = _land_row(entry, targets)
        module = None
        try:
            choice = choose(entry.blocks, targets)
            for module, (target, _) in row.landed.items():
                there = pieces.setdefault((target.part, target.key), [])
                there.extend(_pieces(entry, number, entry.lora.modules[module], choice, target))
        except (AdapterError, StackError) as error:
            error.file, error.module = entry.lora.name, module
            raise
        rows.append(replace(row, chosen=choice.counts(named.target for named in row.landed.values())))
    found = {place: tuple(there) for place, there in pieces.items() if there}
    return Landing(targets.family, targets.parts, found, tuple(rows))


def _pieces(entry: Entry, number: int, adapter: Adapter, choice: Choice, target: Target) -> Iterator[Piece]:
    """One piece for all rows of the target, or one for each share of them that has a factor of its own."""
    adapter, rows = adapter.swapped if target.swap else adapter, target.rows
    for band, factor, _ in choice.of(target):
        if strength := entry.strengths[target.part] * factor:
            if band == rows:
                yield Piece(adapter, target.band, strength, number, factor)
            else:
                yield Piece(adapter.narrowed(band.start - rows.start, band.length), band, strength, number, factor)


def _land_row(entry: Entry, targets: TargetMap) -> RowLanding:
    landed: dict[str, Named] = {}
    refused: list[Refusal] = []
    refused_parts = dict.fromkeys(sorted(targets.parts), 0)
    unconnected: dict[str, list[str]] = {}
    taken: dict[tuple[str, str], list[tuple[Band, str]]] = {}
    elsewhere = _Elsewhere(targets)
    readable = ((module, adapter, ("", OTHER_MODEL)) for module, adapter in entry.lora.modules.items())
    unreadable = ((module, None, unread) for module, *unread in entry.lora.leftover)
    for module, adapter, (reason, remedy) in (*readable, *unreadable):
        named = meant(module, adapter, targets)
        if named is not None:
            part = named.target.part
            there = taken.setdefault((part, named.target.key), [])
            if adapter is not None:
                reason = _misfit(adapter, named.target)
                if not reason and (reason := _collision(named.target.rows, there)):
                    remedy = "Get another version of the file."
            if not reason:
                there.append((named.target.rows, module))
                landed[module] = named
                continue
        elif module.endswith(BIAS) and (weights := targets.meanings(module.removesuffix(BIAS))):
            if adapter is not None and adapter.with_bias:
                continue  # it is there with its weight
            part = weights[0].target.part
            reason = reason or "this module has no bias"
        else:
            part = elsewhere.part(module)
            if part is not None and part not in targets.parts:
                unconnected.setdefault(part, []).append(module)
                continue
            unknown = "could be several places of this model" if targets.meanings(module) else "name not known"
            reason = reason or ("no such weight in this model" if part else unknown)
        refused.append(Refusal(module, reason, remedy))
        if part is not None:
            refused_parts[part] += 1
    silent = {part: tuple(modules) for part, modules in unconnected.items()}
    return RowLanding(entry, landed, tuple(refused), silent, refused_parts)


def meant(module: str, adapter: Adapter | None, targets: TargetMap) -> Named | None:
    """The place that a name means. Where it could mean several, the one that the adapter fits, if that is one: PEFT
    names the modules of all text encoders alike."""
    found = targets.meanings(module)
    if len(found) > 1 and adapter is not None:
        found = tuple(named for named in found if not _misfit(adapter, named.target))
    return found[0] if len(found) == 1 else None


def _misfit(adapter: Adapter, target: Target) -> str:
    try:
        adapter.require_fit(target.delta_shape)
    except ShapeError as error:
        return error.what
    return ""


def _collision(rows: Band, there: Iterable[tuple[Band, str]]) -> str:
    """Two modules of one file for the same rows: nobody can say which one its writer meant."""
    for other, module in there:
        if rows.start < other.end and other.start < rows.end:
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
        known = sum(module in targets.names for module in names)
        return len(_land_row(entry, targets).landed) if known else 0, known

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


def merged(weight: Tensor, pieces: Sequence[Piece], dtype: torch.dtype | None = None) -> Tensor:
    """The weight with all pieces, in float32 at least, rounded once to dtype (None: the weight's own). The weight
    itself is not changed."""
    total = weight.to(torch.float64 if weight.dtype == torch.float64 else torch.float32, copy=True)
    add_(total, pieces)
    return total.to(dtype or weight.dtype)


def of_rows(pieces: Iterable[Piece], start: int, length: int) -> tuple[Piece, ...]:
    """What pieces of a weight do to these rows of it, for the rows alone.

    Raises AdapterError for a piece that is to be cut and cannot be.
    """
    found = []
    for piece in pieces:
        rows = piece.band or Band(start, length)  # a piece without a band is of all rows
        low, high = max(rows.start, start), min(rows.end, start + length)
        if low < high:
            whole = piece.band is not None and (low, high) == (rows.start, rows.end)
            first = low - piece.band.start if piece.band else start
            adapter = piece.adapter if whole else piece.adapter.narrowed(first, high - low)
            band = None if high - low == length else Band(low - start, high - low)
            found.append(replace(piece, adapter=adapter, band=band))
    return tuple(found)


def add_(weight: Tensor, pieces: Iterable[Piece], strength: float = 1.0) -> None:
    """Put pieces, each at strength times its own, on a weight in place.

    Each Transform finds the weight as those before it have left it; between two of them each band takes one pass.
    """
    for additive, run in groupby(pieces, key=lambda piece: isinstance(piece.adapter, Additive)):
        for band, there in by_band(run) if additive else ((piece.band, [piece]) for piece in run):
            rows = weight if band is None else weight.narrow(0, band.start, band.length)
            add_all_(rows, [(piece.adapter, piece.strength * strength) for piece in there])


def by_band(pieces: Iterable[Piece]) -> list[tuple[Band | None, list[Piece]]]:
    """The pieces of one weight, those of the same band together, in stack order within a band."""
    bands: dict[Band | None, list[Piece]] = {}
    for piece in pieces:
        bands.setdefault(piece.band, []).append(piece)
    return list(bands.items())
