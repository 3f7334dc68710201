"""A Lora's modules as a layout has them: landed on the family, each weight spelled in the layout's dialect."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from ..dialects import DIALECTS, published_map, target_map
from ..errors import AdapterError, LoraOpsError, TargetError, shown
from ..families import Family, Shapes
from ..landing import Landing, Piece, land
from ..lora import BIAS, Band, Lora, Target, TargetMap
from ..stack import PARTS, Entry
from .base import RANKED, Factors, Layout, Module
from .factors import alpha_of, factors, overlap

PEFT_PREFIX = "base_model.model."  # PEFT looks for these names only


class _Spelled(NamedTuple):
    target: Target
    network: str
    prefix: str
    name: str


def modules(lora: Lora, layout: Layout, family: Family, shapes: Shapes | None) -> Iterator[Module]:
    """Every module of the file to be, in the order of the source's. shapes are None for the published model's.

    Raises TargetError or AdapterError, naming the module, if anything of the LoRA would be left out.
    """
    _require_readable(lora)
    targets = target_map(family, shapes) if shapes else published_map(family)
    landing = land([Entry(lora, dict.fromkeys(PARTS, 1.0))], targets)
    _require_landed(landing, family)
    spelled = _spelled(layout, family, shapes or family.published(), targets, landing.pieces.keys())
    (row,) = landing.rows
    source = {(target.part, target.key): module for module, (target, _) in row.landed.items()}
    networks: set[str] = set()
    for place, pieces in landing.pieces.items():
        try:
            _require_named(pieces, spelled[place], layout)
            for each in spelled[place]:
                if found := factors(pieces, each.target):
                    yield Module(each.network, each.prefix, each.name, _in_words(found, pieces, layout))
        except LoraOpsError as error:
            error.module, error.remedy = source[place], error.remedy or "Choose another layout."
            raise
        networks.update(each.network for each in spelled[place])
        if layout.folder and len(networks) > 1:
            what = "is of a second network, and a PEFT folder is for one."
            raise TargetError(what, module=source[place], remedy="Choose another layout.", networks=networks)


def _require_readable(lora: Lora) -> None:
    for module, reason, _ in lora.leftover:
        raise AdapterError(f"cannot be read: {shown(reason)}.", module=module, remedy="Only a whole LoRA is written.")
    if not lora.modules:
        raise AdapterError("has no modules.", remedy="There is nothing to write.")


def _in_words(found: Factors, pieces: Sequence[Piece], layout: Layout) -> Factors:
    """The factors as a layout calls them. Raises AdapterError for those that it has no words for."""
    tensors, alpha = dict(found.tensors), found.alpha
    if not layout.alpha:  # PEFT's: a magnitude is of the outputs, and every module has an alpha
        magnitude = tensors.get("dora_scale")
        if magnitude is not None and (magnitude.ndim == 1 or magnitude.shape[0] > 1):
            inputs = [1] * (magnitude.ndim - 2)
            tensors["magnitude"] = tensors.pop("dora_scale").reshape(*([1, -1, *inputs] if inputs else [-1]))
            alpha = alpha_of(pieces[0].adapter.scale, found.rank)
    if layout.alpha_needed and alpha is None and any(name in tensors for name in RANKED):
        alpha = float(found.rank)
    if tensors.keys() - layout.words or (alpha is None and not layout.alpha):
        names = ", ".join(sorted({piece.adapter.ALGEBRA for piece in pieces}))
        raise AdapterError(f"is {names} ({', '.join(tensors)}), which the layout '{layout.name}' cannot hold.")
    return found._replace(tensors=tensors, alpha=alpha)


def _require_landed(landing: Landing, family: Family) -> None:
    (row,) = landing.rows
    for module, reason, _ in row.refused:
        what = f"has no place in {family.title}: {shown(reason)}."
        raise TargetError(
            what,
            module=module,
            remedy="Name the family or the model it was made for, or connect it.",
            family=family.name,
        )
    for part, (module, *_) in row.unconnected.items():
        what = f"is for the {part}, of which no shapes are given."
        raise TargetError(what, module=module, remedy="Give the shapes of all that it is for.", family=family.name)


def _spelled(
    layout: Layout, family: Family, shapes: Shapes, targets: TargetMap, places: Collection[tuple[str, str]]
) -> Mapping[tuple[str, str], Sequence[_Spelled]]:
    """Weight -> the names that mean its rows, none twice. A name that the reader takes for another place is none."""
    (dialect,) = (dialect for dialect in DIALECTS if dialect.name == layout.name)
    found: dict[tuple[str, str], list[_Spelled]] = {place: [] for place in places}
    for component, network, inside in family.located(shapes):
        (prefix, *_) = component.prefixes.get(dialect.prefix) or ("",)
        if not prefix or (layout.folder and prefix != PEFT_PREFIX):
            continue
        for place in component.places(inside):
            there, name = (component.part, network + place.key), dialect.spell("", place)
            if name and there in found:
                target = Target(*there, inside[place.key], place.band, place.swap)
                read = targets.names.get(prefix + name)
                if read and read.target == target:
                    found[there].append(_Spelled(target, network, prefix, name))
            key = re.sub("weight$", "bias", network + place.key)
            if name and (component.part, key) in found and (bias := targets.names.get(f"{prefix}{name}{BIAS}")):
                found[component.part, key].append(_Spelled(bias.target, network, prefix, name + BIAS))
    return {place: _disjoint(names) for place, names in found.items()}


def _disjoint(names: Sequence[_Spelled]) -> Sequence[_Spelled]:
    """The name of the whole weight where there is one, else names of bands; the first of those for the same rows."""
    chosen: list[_Spelled] = []
    for each in sorted(names, key=lambda each: each.target.band is not None):
        if not any(overlap(each.target.rows, other.target.rows).length for other in chosen):
            chosen.append(each)
    return chosen


def _require_named(pieces: Sequence[Piece], names: Sequence[_Spelled], layout: Layout) -> None:
    """Raises TargetError for rows that no name means."""
    for piece in pieces:
        bands = [each.target.rows for each in names]
        rows = piece.band or Band(0, names[0].target.shape[0] if names else 1)
        if sum(overlap(rows, band).length for band in bands) < rows.length:
            raise TargetError(f"has no name in the layout '{layout.name}'.", layout=layout.name)
