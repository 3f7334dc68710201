"""What a hook runs: the factors of pieces, joined where one product holds them, and Transforms among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapters.base import Product, Turn
from ..landing import Piece
from ..lora import Band


@dataclass(eq=False)
class Term:
    """What goes through one product: the low-rank updates of a band of a module, or one of another form."""

    band: Band | None
    product: Product  # its down is (rank, in, kernel…)
    gains: Tensor  # (rank,) or (1,)


@dataclass(eq=False)
class Turned:
    """A Transform in the chain of what a hook adds."""

    band: Band | None
    turn: Turn
    gains: Tensor  # (1,)
    matrices: tuple[Tensor, ...]
    inside: Term | None
    part: Part
    strengths: tuple[float, ...] = ()  # of the pieces before it, when its last matrix was made


@dataclass(frozen=True, eq=False)
class Part:
    """A piece, and the factors that the input goes through; None if that is the whole ΔW.

    of a Transform: all pieces before it on the weight; None of what is none.
    """

    piece: Piece
    product: Product | None
    before: tuple[Piece, ...] | None = None

    @property
    def gains(self) -> int:
        return 1 if self.product is None else len(self.product.down)

    @property
    def scale(self) -> float:
        """What its gains are at strength 1: ΔW has the adapter's scale in it, factors have not."""
        return self.piece.factor * (1.0 if self.product is None else self.piece.adapter.scale)

    @property
    def low_rank(self) -> bool:
        return self.product is not None and self.product.up is not None and self.product.left is None

    def on(self, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> Product:
        """The factors for a weight of this shape, or ΔW, computed on the device in float32. Copies: no gradient could
        pass what was read in inference mode."""
        if self.product is None:
            return Product(moved(self.piece, device).adapter.delta(shape).to(dtype))
        down, up, left = (None if each is None else each.to(device, dtype, copy=True) for each in self.product)
        assert down is not None
        return Product(down.reshape(len(down), -1, *shape[2:]), up, left)


def runs(band: Band | None, parts: Sequence[Part]) -> list[tuple[Band | None, list[Part]]]:
    """What one product can hold: all that is of low rank, anything else alone."""
    low = [part for part in parts if part.low_rank]
    return [(band, there) for there in (low, *([part] for part in parts if not part.low_rank)) if there]


def joined(products: Sequence[Product]) -> Product:
    if len(products) == 1:
        return products[0]
    ups = [product.up for product in products if product.up is not None]
    return Product(torch.cat([product.down for product in products]), torch.cat(ups, dim=1))


def below(term: Turned, before: Sequence[Term | Turned]) -> list[Term | Turned]:
    """Those before a term that its rows depend on, through each other too."""
    bands, found = [term.band], []
    for other in reversed(before):
        if any(_meet(other.band, band) for band in bands):
            bands.append(other.band)
            found.append(other)
    return found[::-1]


def _meet(one: Band | None, other: Band | None) -> bool:
    return one is None or other is None or (one.start < other.end and other.start < one.end)


def moved(piece: Piece, device: torch.device) -> Any:
    """The piece with its tensors on the device."""
    return Piece.unpacked(piece.packed(), lambda tensor: tensor.to(device))
