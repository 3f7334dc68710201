"""Adapters: the change one LoRA makes to one weight, one algebra a file.

To add an algebra: write its class beside `lora.py` (an `Additive`, or a `Transform` if its change depends on the weight
in hand, with its factors and `build`), and name it in `ALGEBRAS` below. The suffixes of its factors belong in the
spelling table of `lora_ops/lora.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from torch import Tensor

from ..errors import AdapterError
from .base import Adapter, Additive, Term, Transform
from .dora import DoRA
from .full import Full
from .glora import GLoRA
from .ia3 import IA3, PeftIA3
from .loha import LoHa
from .lokr import LoKr
from .lora import LowRank
from .oft import BOFT, DiagOFT, InputOFT

# And DoRA, in which any additive one can be, and BOFT, which Diag-OFT builds where the blocks come in stages.
ALGEBRAS: tuple[type[Adapter], ...] = (LowRank, LoHa, LoKr, GLoRA, Full, DiagOFT, InputOFT, IA3, PeftIA3)

REPLACING = frozenset({"set_weight", "reshape_weight"})  # as Black Forest Labs' control LoRAs have them


def build(factors: Mapping[str, Tensor]) -> Adapter:
    """The adapter that these named factors make.

    Raises AdapterError if no algebra here takes exactly these factors, ShapeError if they do not fit each
    other: a factor that would be left out is never left out quietly.
    """
    magnitudes = factors.keys() & DoRA.FACTORS
    if not magnitudes:
        return _build(factors)
    inner = _build({name: factor for name, factor in factors.items() if name not in magnitudes})
    if len(magnitudes) > 1 or not isinstance(inner, Additive) or isinstance(inner, Full):
        raise AdapterError(f"has {' and '.join(sorted(magnitudes))} around {inner.ALGEBRA}, which means nothing here")
    (name,) = magnitudes
    return DoRA.around(inner, name, factors[name])


def _build(factors: Mapping[str, Tensor]) -> Adapter:
    names = factors.keys()
    for algebra in ALGEBRAS:
        if names - {"alpha"} and algebra.REQUIRED <= names <= algebra.REQUIRED | algebra.OPTIONAL:
            return algebra.build(factors)
    for algebra in ALGEBRAS:
        if names <= algebra.REQUIRED | algebra.OPTIONAL:
            missing = ", ".join(sorted(algebra.REQUIRED - names))
            raise AdapterError(f"lacks its {missing}", remedy="The file is incomplete: get another version.")
    foreign = sorted(names - {name for algebra in ALGEBRAS for name in algebra.REQUIRED | algebra.OPTIONAL})
    if not foreign:
        raise AdapterError(f"has {', '.join(sorted(names))}: they are no one algebra's")
    if names & REPLACING:
        what = f"has {', '.join(foreign)}, which no strength scales: it replaces the weight, or makes it wider"
        raise AdapterError(what, remedy="Load a control LoRA with ComfyUI's own loader.")
    raise AdapterError(f"has {', '.join(foreign)}: no algebra of this version applies it")


def add_all_(rows: Tensor, terms: Sequence[Term]) -> None:
    """Put terms (adapter, strength) on a weight (or band) in place, in order, neighbours of one algebra together."""
    for algebra, there in groupby(terms, key=lambda term: type(term[0])):
        algebra.add_all_(rows, list(there))


__all__ = [
    "ALGEBRAS",
    "BOFT",
    "IA3",
    "Adapter",
    "Additive",
    "DiagOFT",
    "DoRA",
    "Full",
    "GLoRA",
    "InputOFT",
    "LoHa",
    "LoKr",
    "LowRank",
    "PeftIA3",
    "Transform",
    "add_all_",
    "build",
]
