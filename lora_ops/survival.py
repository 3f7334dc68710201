"""Survival: how much of an update is left when a changed weight is stored in its dtype.

A float of few bits holds a weight to a part in 2^bits of itself; an update smaller than that drowns in the rounding.
Survival compares three weights: as it is stored, with the update, and with the update as that is stored.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

LITTLE = 0.9  # a cosine below this means that more than half as much noise as update was stored


class Survival(NamedTuple):
    """What was wanted of a weight (or of several, added up) and what became of it; sums of squares over entries."""

    wanted: float = 0.0  # ‖ΔW‖²
    stored: float = 0.0  # ‖ΔW as stored‖²
    both: float = 0.0  # their inner product

    def and_of(self, other: Survival) -> Survival:
        """The survival of both together."""
        return Survival(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    @property
    def cosine(self) -> float:
        """Of the stored update with the wanted one: 1 is all of it, 0 none; 1 where there was nothing to store."""
        if not self.wanted:
            return 1.0
        return self.both / math.sqrt(self.wanted * self.stored) if self.stored else 0.0

    @property
    def norm(self) -> float:
        """Of the stored update, in that of the wanted one: above 1 by noise, below by loss."""
        return math.sqrt(self.stored / self.wanted) if self.wanted else 1.0

    @property
    def little(self) -> bool:
        return self.cosine < LITTLE


def measured(base: Tensor, wanted: Tensor, stored: Tensor) -> Survival:
    """Of a weight as it was, with the update, and as that was stored, each de-quantised to float32."""
    update, found = (wanted - base).flatten(), (stored.to(wanted.dtype) - base).flatten()
    return Survival(float(update.dot(update)), float(found.dot(found)), float(update.dot(found)))


def predicted(base: Tensor, wanted: Tensor, dtype: torch.dtype) -> Survival:
    """The survival to expect of some rows of a weight (float32), before anything is stored.

    Float8 is rounded up or down by chance, with the mean where the value was, as the host does it: a value v between
    the neighbours a and b of its dtype then has the variance (v - a)·(b - v). Wider floats go to the nearest.
    """
    if dtype.itemsize > 1:
        return measured(base, wanted, wanted.to(dtype))
    update = (wanted - base).flatten()
    whole = float(update.dot(update))
    return Survival(whole, whole + float(_variance(wanted, dtype).sum(dtype=torch.float64)), whole)


def _variance(values: Tensor, dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(values.abs().clamp(info.tiny, info.max))  # below tiny the steps stay as they are
    step = torch.ldexp(torch.full_like(values, info.eps), exponent - 1)
    part = (values / step).remainder(1)
    return step.square() * part * (1 - part)
