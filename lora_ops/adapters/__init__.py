"""Adapters: the change one LoRA makes to one weight, one algebra a file.

To add an algebra: write its class beside `lora.py` (an `Adapter` with `FACTORS` and `build`), and name it in
`ALGEBRAS` below. The suffixes of its factors belong in the spelling table of `lora_ops/lora.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor

from ..errors import AdapterError
from .base import Adapter, Term
from .lora import LowRank

ALGEBRAS: tuple[type[Adapter], ...] = (LowRank,)


def build(factors: Mapping[str, Tensor]) -> Adapter:
    """The adapter that these named factors make.

    Raises AdapterError if no algebra here takes exactly these factors, ShapeError if they do not fit each
    other: a factor that would be left out is never left out quietly.
    """
    names = factors.keys()
    for algebra in ALGEBRAS:
        if algebra.REQUIRED <= names <= algebra.REQUIRED | algebra.OPTIONAL:
            return algebra.build(factors)
    for algebra in ALGEBRAS:
        if names <= algebra.REQUIRED | algebra.OPTIONAL:
            missing = ", ".join(sorted(algebra.REQUIRED - names))
            raise AdapterError(f"lacks its {missing}", remedy="The file is incomplete: get another version.")
    foreign = sorted(names - {name for algebra in ALGEBRAS for name in algebra.REQUIRED | algebra.OPTIONAL})
    raise AdapterError(f"has {', '.join(foreign)}: no algebra of this version applies it")


def fused(terms: Sequence[Term], dtype: torch.dtype) -> Iterator[Term]:
    """Terms (adapter, strength) on one weight, in order, with neighbours of one algebra made one where they can be."""
    for algebra, there in groupby(terms, key=lambda term: type(term[0])):
        yield from algebra.join(list(there), dtype)


__all__ = ["ALGEBRAS", "Adapter", "LowRank", "build", "fused"]
