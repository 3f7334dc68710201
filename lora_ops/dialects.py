"""Dialects: how writers spell a module's name, one line each.

To add a dialect: add a line to `DIALECTS`, and its prefixes to the components that it writes: `DENOISER`
(`lora_ops/families/base.py`) for all families at once, the text encoders' own in `lora_ops/families/text.py`. A dialect
only has a name to speak; which factors follow is the spelling table's business (`lora_ops/lora.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property

from .families import FAMILIES, Component, Family, Place, Shapes
from .lora import BIAS, Named, Target, TargetMap


def _native(place: Place) -> str | None:
    return place.native


def _diffusers(place: Place) -> str | None:
    return place.diffusers


def _processor(place: Place) -> str | None:
    """Attention processors (diffusers until 0.26) stood between an attention and its projections."""
    if place.processor:
        return place.processor
    head, _, projection = (place.diffusers or "").removesuffix(".0").rpartition(".")
    return f"{head}.processor.{projection}" if ".att" in head and projection.startswith(("to_", "add_")) else None


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


# Every prefix goes with both of a model's names: sooner or later somebody writes each pair. Where two dialects spell a
# name alike, the first is the one that is told.
DIALECTS: tuple[Dialect, ...] = (
    Dialect("kohya", "kohya", _native, flat=True),
    Dialect("kohya, diffusers names", "kohya", _diffusers, flat=True),
    Dialect("onetrainer, native names", "onetrainer", _native, flat=True),
    Dialect("onetrainer", "onetrainer", _diffusers, flat=True),
    Dialect("lycoris", "lycoris", _diffusers, flat=True),
    Dialect("lycoris, native names", "lycoris", _native, flat=True),
    Dialect("comfy", "comfy", _native),
    Dialect("comfy, diffusers names", "comfy", _diffusers),
    Dialect("diffusers", "diffusers", _diffusers),
    Dialect("diffusers, native names", "diffusers", _native),
    Dialect("attention processors", "processor", _processor),
    Dialect("peft", "peft", _diffusers),
    Dialect("peft, native names", "peft", _native),
    Dialect("bare", "bare", _native),
    Dialect("bare, diffusers names", "bare", _diffusers),
)

_Spelled = Mapping[str, tuple[Target, ...]]  # a name without its prefix -> what it may mean


class Names(Mapping[str, Named]):
    """Every name that a file may use for one model, found prefix by prefix: written out they are a hundred thousand.

    A name that would mean two places is none: a model of no known family may have both `a.b_c` and `a_b.c`. A name with
    `.bias` after it means the module's bias, if there is one; these are not written out.
    """

    def __init__(self, spoken: Mapping[str, list[tuple[Dialect, _Spelled]]], biases: Mapping[Target, Target]) -> None:
        self._spoken = spoken  # prefix -> who uses it, for which component's names
        self._biases = biases  # of the targets that are weights
        letters = {prefix[:1] for prefix in spoken}
        self._by_letter = {  # a name's first letter -> the prefixes that it may begin with
            letter: [(prefix, users) for prefix, users in spoken.items() if prefix[:1] in ("", letter)]
            for letter in letters
        }

    def __getitem__(self, name: str) -> Named:
        found = self.meanings(name)
        if len(found) != 1:
            raise KeyError(name)
        return found[0]

    def meanings(self, name: str) -> tuple[Named, ...]:
        """All places that a name could mean, each under the first dialect that calls it so."""
        if not name.endswith(BIAS):
            return self._weights(name)
        weights = self._weights(name.removesuffix(BIAS))
        return tuple(Named(self._biases[weight], told) for weight, told in weights if weight in self._biases)

    def _weights(self, name: str) -> tuple[Named, ...]:
        found: dict[Target, Named] = {}
        for prefix, users in self._by_letter.get(name[:1]) or self._by_letter.get("", ()):
            if name.startswith(prefix):
                rest = name[len(prefix) :]
                for dialect, spelled in users:
                    # Some converters leave dots in a flat name, or an underscore at its ends.
                    written = rest.replace(".", "_").strip("_") if dialect.flat and rest not in spelled else rest
                    for target in spelled.get(written, ()):
                        found.setdefault(target, Named(target, dialect.name))
        return tuple(found.values())

    def __iter__(self) -> Iterator[str]:
        return iter(self._written_out)

    def __len__(self) -> int:
        return len(self._written_out)

    @cached_property
    def _written_out(self) -> tuple[str, ...]:
        names = (prefix + rest for prefix, users in self._spoken.items() for _, spelled in users for rest in spelled)
        return tuple(name for name in dict.fromkeys(names) if name in self)


def target_map(family: Family, shapes: Shapes) -> TargetMap:
    """Every name that a file may use for the weights in hand (keys as in the model or checkpoint -> shapes)."""
    spoken: dict[str, list[tuple[Dialect, _Spelled]]] = {}
    targets: list[Target] = []
    biases: list[tuple[Target, Target]] = []  # of equal targets each has names of its own
    for component, source, inside in family.located(shapes):
        places = [(place, _target(component, source, place, inside[place.key])) for place in component.places(inside)]
        targets += (target for _, target in places)
        biases += ((target, bias) for _, target in places if (bias := _bias(target, shapes)))
        once: dict[object, _Spelled] = {}  # dialects differ in their prefixes more than in what follows
        for dialect in DIALECTS:
            for prefix in component.prefixes.get(dialect.prefix, ()):
                how = dialect.speak, dialect.flat
                if how not in once:
                    once[how] = _spelled(dialect, places)
                spoken.setdefault(prefix, []).append((dialect, once[how]))
    names = Names(spoken, dict(biases))
    return TargetMap(family.name, names, names.meanings, (*targets, *(bias for _, bias in biases)))


def _spelled(dialect: Dialect, places: list[tuple[Place, Target]]) -> _Spelled:
    found: dict[str, tuple[Target, ...]] = {}
    for place, target in places:
        if name := dialect.spell("", place):
            found[name] = (*found.get(name, ()), target)
    return found


@cache
def published_map(family: Family) -> TargetMap:
    """The TargetMap of the published model of a family, text encoders included; made when first asked for."""
    return target_map(family, family.published())


def _target(component: Component, source: str, place: Place, shape: tuple[int, ...]) -> Target:
    key = source + place.key
    names = tuple(name for name in (place.native, place.diffusers, key) if name)
    return Target(component.part, key, shape, place.band, place.swap, names, component.role(place, shape))


def _bias(target: Target, shapes: Shapes) -> Target | None:
    """The same rows of the bias beside a weight; selectors call it as the weight."""
    key = re.sub("weight$", "bias", target.key)
    if key == target.key or key not in shapes:
        return None
    return replace(target, key=key, shape=shapes[key], names=(*target.names[:-1], key))


def published_maps() -> Iterator[TargetMap]:
    """One map per family, made when asked for: they tell what a file is for."""
    return (published_map(family) for family in FAMILIES)
