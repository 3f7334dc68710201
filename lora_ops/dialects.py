"""Dialects: how writers spell a module's name, one line each.

To add a dialect: add a line to `DIALECTS`, and its prefixes to the components of the families that it writes
(`lora_ops/families/`). A dialect only has a name to speak; which factors follow is the spelling table's business
(`lora_ops/lora.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .families import FAMILIES, Component, Family, Place, Shapes
from .lora import Named, Target, TargetMap


def _native(place: Place) -> str | None:
    return place.native


def _diffusers(place: Place) -> str | None:
    return place.diffusers


def _processor(place: Place) -> str | None:
    """Attention processors (diffusers until 0.26) stood between an attention and its projections."""
    head, dot, projection = (place.diffusers or "").rpartition(".to_")
    return f"{head}.processor.to_{projection.removesuffix('.0')}" if dot and ".attn" in head else None


@dataclass(frozen=True)
class Dialect:
    name: str
    prefix: str  # which of a component's prefixes it uses
    speak: Callable[[Place], str | None]  # which of a place's names it writes
    flat: bool = False  # underscores instead of dots

    def spell(self, prefix: str, place: Place) -> str | None:
        """The module's name in a file, or None where this dialect has none for the place."""
        name = self.speak(place)
        return None if name is None else prefix + (name.replace(".", "_") if self.flat else name)


DIALECTS: tuple[Dialect, ...] = (
    Dialect("kohya", "kohya", _native, flat=True),
    Dialect("kohya, diffusers names", "kohya", _diffusers, flat=True),
    Dialect("comfy", "comfy", _native),
    Dialect("diffusers", "diffusers", _diffusers),
    Dialect("diffusers, attention processors", "processor", _processor),
    Dialect("peft", "peft", _diffusers),
)


def target_map(family: Family, shapes: Shapes) -> TargetMap:
    """Every name that a file may use for the weights in hand (keys as in the model or checkpoint -> shapes).

    A name that would mean two places means none: a model of no known family may have both `a.b_c` and `a_b.c`.
    """
    names: dict[str, Named] = {}
    ambiguous: set[str] = set()
    for component, prefix, inside in family.located(shapes):
        for name, named in _spellings(component, prefix, inside):
            if names.setdefault(name, named).target != named.target:
                ambiguous.add(name)
    return TargetMap(family.name, {name: named for name, named in names.items() if name not in ambiguous})


def published_map(family: Family) -> TargetMap:
    """The TargetMap of the published model of a family, text encoders included."""
    return target_map(family, family.published())


def _spellings(component: Component, source: str, shapes: Shapes) -> Iterator[tuple[str, Named]]:
    for place in component.places(shapes):
        target = Target(component.part, source + place.key, shapes[place.key], place.band, place.swap)
        for dialect in DIALECTS:
            for prefix in component.prefixes.get(dialect.prefix, ()):
                if name := dialect.spell(prefix, place):
                    yield name, Named(target, dialect.name)


def published_maps() -> Iterator[TargetMap]:
    """One map per family, made when asked for: they tell what a file is for."""
    return (published_map(family) for family in FAMILIES)
