"""Selectors: which places of a model, and what factor: `double_blocks.0-9=0.5, *.attn.*=1, role:mlp=0`.

`PATTERN=FACTOR`, separated by commas or lines. A pattern is a role (`role:mlp`), or a name, in which `*` stands for
anything and `0-9` between dots for these numbers; all that lies below a name belongs to it. Overlapping selectors
multiply.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from .dialects import published_map
from .errors import StackError, shown
from .families import FAMILIES, ROLES, UNKNOWN, Family
from .lora import Band, Target, TargetMap

_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
LIMIT = 200  # selectors in one text
_RANGE = re.compile(r"([0-9]{1,3})-([0-9]{1,3})")


@dataclass(frozen=True)
class Pattern:
    """Places of a model, by role or by name."""

    text: str

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Raises StackError for no text and for a role that there is not."""
        pattern = cls(text.strip())
        if not pattern.text:
            raise StackError("A selector names no place.", remedy="Write one like double_blocks.0-9=0.5 or role:mlp=0.")
        if pattern.role not in (None, *ROLES):
            raise StackError(f"'{shown(pattern.role)}' is no role.", remedy=f"Roles are {', '.join(ROLES)}.")
        return pattern

    @property
    def role(self) -> str | None:
        return self.text[5:].strip() if self.text.startswith("role:") else None

    def matches(self, names: Iterable[str], role: str) -> bool:
        """Whether a place that has these names and this role is meant."""
        return any(map(self._matches, names)) if self.role is None else self.role == role

    def _matches(self, name: str) -> bool:
        first, *others = self._chunks
        found = first.match(name)
        for chunk in others:  # each where it comes first: that leaves the most to the next
            found = found and chunk.search(name, found.end())
        return found is not None

    @cached_property
    def _chunks(self) -> list[re.Pattern[str]]:
        """What stands between the stars; after the last comes a dot or nothing."""
        written = r"\.".join(map(_component, self.text.split("."))) + r"(?![^.])"
        return [re.compile(chunk) for chunk in written.split(r"\*")]


def _component(text: str) -> str:
    """A regular expression for what stands between two dots. A range may also be a name: Z-Image has a `2-1`."""
    found = _RANGE.fullmatch(text)
    if found is None:
        return re.escape(text)
    return f"(?:{'|'.join([re.escape(text), *map(str, range(int(found[1]), int(found[2]) + 1))])})"


class Selector(NamedTuple):
    pattern: Pattern
    factor: float

    def __str__(self) -> str:
        return f"{self.pattern.text}={str(self.factor).removesuffix('.0')}"


def parse_selectors(text: str) -> tuple[Selector, ...]:
    """Raises StackError for what is no list of PATTERN=FACTOR. Whether a pattern means anything, a model must say."""
    items = [item for item in re.split(r"[,\n]", text) if item.strip()]
    if len(items) > LIMIT:
        what = f"{len(items)} selectors are too many: the limit is {LIMIT}."
        raise StackError(what, remedy="Choose more places at once, by range, * or role.")
    return tuple(map(_selector, items))


def decimal(text: str) -> float:
    """A decimal number, NaN for what is none: Python's own float also takes 1_0."""
    return float(text) if _NUMBER.fullmatch(text.strip()) else math.nan


def _selector(text: str) -> Selector:
    pattern, equals, written = text.rpartition("=")
    factor = decimal(written) if equals else math.nan
    if not math.isfinite(factor):
        what = f"The selector '{shown(text.strip())}' has no finite number as its factor."
        raise StackError(what, remedy="Write PATTERN=FACTOR, like role:mlp=0.5.")
    return Selector(Pattern.parse(pattern), factor)


class Share(NamedTuple):
    """Rows of a weight, the product of the factors that they get, and the selectors (by number) that it comes from."""

    band: Band
    factor: float
    chosen_by: frozenset[int]


@dataclass(frozen=True, eq=False)
class Choice:
    """What selectors choose in one model: (part, weight key) -> the weight's rows, first to last."""

    shares: Mapping[tuple[str, str], Sequence[Share]]
    selectors: int  # how many there are

    @property
    def neutral(self) -> bool:
        """Whether all factors come out as 1."""
        return all(share.factor == 1 for there in self.shares.values() for share in there)

    def of(self, target: Target) -> list[Share]:
        """The target's rows, as few shares as there are factors; without selectors one of factor 1."""
        rows = target.rows
        found: list[Share] = []
        for band, factor, chosen_by in self.shares.get((target.part, target.key), [Share(rows, 1.0, frozenset())]):
            start, end = max(band.start, rows.start), min(band.end, rows.end)
            if start < end:
                if found and found[-1].factor == factor:
                    start, chosen_by = found[-1].band.start, chosen_by | found.pop().chosen_by
                found.append(Share(Band(start, end - start), factor, chosen_by))
        return found

    def counts(self, targets: Iterable[Target]) -> tuple[int, ...]:
        """How many of these targets each selector has a share in."""
        chosen = Counter(n for target in targets for n in {n for share in self.of(target) for n in share.chosen_by})
        return tuple(chosen[number] for number in range(self.selectors))


def choose(selectors: Sequence[Selector], targets: TargetMap) -> Choice:
    """Put selectors on a model, and on what a published model of its family has in the parts that are not connected.

    Raises StackError for a selector that chooses nothing there. Where nothing is connected nobody can tell.
    """
    if not selectors or not targets.targets:
        return Choice({}, len(selectors))
    weights: dict[tuple[str, str], list[Target]] = {}
    for target in (*targets.targets, *_unconnected(targets)):
        weights.setdefault((target.part, target.key), []).append(target)
    shares = {weight: list(_shares(selectors, there)) for weight, there in weights.items()}
    chosen = {number for there in shares.values() for share in there for number in share.chosen_by}
    for number, selector in enumerate(selectors):
        if number not in chosen:
            raise _chooses_nothing(selector, targets)
    return Choice(shares, len(selectors))


def family_of(targets: TargetMap) -> Family:
    """The family of the model that these targets are in."""
    return next((family for family in FAMILIES if family.name == targets.family), UNKNOWN)


def _unconnected(targets: TargetMap) -> Iterator[Target]:
    """Text encoders tell their own family only: without a MODEL the selectors may be for any that has them."""
    for family in (family_of(targets),) if "model" in targets.parts else FAMILIES:
        if {component.part for component in family.components} - targets.parts:
            yield from (target for target in published_map(family).targets if target.part not in targets.parts)


def _shares(selectors: Sequence[Selector], there: Sequence[Target]) -> Iterator[Share]:
    """A weight cut wherever one of its targets begins or ends. Rows answer to every target they belong to, and have the
    role of the smallest: FLUX's `linear1` is one matrix to some writers and q, k, v and mlp to others."""
    edges = sorted({edge for target in there for edge in (target.rows.start, target.rows.end)})
    for start, end in pairwise(edges):
        around = [target for target in there if target.rows.start <= start and end <= target.rows.end]
        if around:
            names = {name for target in around for name in target.names}
            role = min(around, key=lambda target: target.rows.length).role
            chosen_by = frozenset(n for n, each in enumerate(selectors) if each.pattern.matches(names, role))
            yield Share(Band(start, end - start), _product([selectors[n].factor for n in chosen_by]), chosen_by)


def _product(factors: Sequence[float]) -> float:
    """In an order of its own, so that the selectors' order changes no bit."""
    product = math.prod(sorted(factors))
    if not math.isfinite(product):
        raise StackError(f"Selectors multiply to {product}.", remedy="Use smaller factors.")
    return product


def _chooses_nothing(selector: Selector, targets: TargetMap) -> StackError:
    if selector.pattern.role is not None:
        near = sorted({target.role for target in targets.targets})
        remedy = f"Its roles are {', '.join(near)}."
    else:
        names = {name for target in targets.targets for name in target.names}
        words = sorted(names | {word for name in names for word in name.split(".")})
        near = difflib.get_close_matches(selector.pattern.text.strip("*."), words, cutoff=0)
        remedy = f"Did you mean {' or '.join(near)}?"
    what = f"The selector '{shown(selector)}' chooses nothing in the model ({family_of(targets).title})."
    return StackError(what, remedy=remedy, selector=selector, near=near, family=targets.family)
