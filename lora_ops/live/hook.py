"""What is added to one module's output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..adapters import Additive
from ..adapters.base import Transform, Turn
from ..errors import TargetError
from ..landing import Piece, add_, by_band
from ..lora import BIAS, Band
from .modules import CONVOLUTION, REMEDY, Link, Weight, kind_of
from .terms import Part, Term, Turned, below, joined, moved, runs


class Hook:
    """What is added to one module's output."""

    def __init__(
        self,
        module: nn.Module,
        name: str,
        pieces: Sequence[Piece],
        gains: Callable[[torch.device, torch.dtype], Tensor],
        strength: Callable[[int], float],
        weight: Weight,
    ) -> None:
        self.module = module
        self.terms: list[Term | Turned] = []
        self._of_bias = name.endswith(BIAS)
        self._axis, self._run, shape = kind_of(module, name)
        self._shape = (-1,) if self._of_bias else shape
        self._parts = list(self._in_order(pieces, name))
        self._turns = any(part.before is not None for _, there in self._parts for part in there)
        self.scales = [  # (scale, entry of the stack) of every gain
            (part.scale, part.piece.entry) for _, there in self._parts for part in there for _ in range(part.gains)
        ]
        self._gains, self._strength, self._weight = gains, strength, weight
        self._offset: Tensor | None = None  # the module's bias, in the shape of its output
        self._links: list[Link] = []

    def _in_order(self, pieces: Sequence[Piece], name: str) -> Iterator[tuple[Band | None, list[Part]]]:
        """What goes through one product each, in an order that gives what the stack's gives."""
        done: list[Piece] = []
        for additive, run in groupby(pieces, key=lambda piece: isinstance(piece.adapter, Additive)):
            if additive:
                there = list(run)
                yield from self._added(there, name)
                done += there
                continue
            for piece in run:
                turn = self._turn_of(piece, name)
                yield piece.band, [Part(piece, None, tuple(done))]
                if turn.beside is not None:
                    yield from self._added([replace(piece, adapter=turn.beside)], name)
                done.append(piece)

    def _added(self, pieces: Iterable[Piece], name: str) -> Iterator[tuple[Band | None, list[Part]]]:
        for band, there in by_band(pieces):
            yield from runs(band, [self._part(each, name) for each in there])

    def _part(self, piece: Piece, name: str) -> Part:
        assert isinstance(piece.adapter, Additive)
        product = piece.adapter.product()
        if product is not None and len(self._shape) == 1:
            raise _cannot(piece, name)
        return Part(piece, product)

    def _turn_of(self, piece: Piece, name: str) -> Turn:
        assert isinstance(piece.adapter, Transform)
        runs = piece.adapter.with_bias if self._of_bias else len(self._shape) > 1
        turn = piece.adapter.turn(self._shape) if runs else None
        if turn is None:
            raise _cannot(piece, name)
        return turn

    def install(self) -> None:
        if not any(link.active for link in self._links):
            self._links.append(Link(self))
        weight = self.module.weight
        if not self.terms and isinstance(weight, Tensor) and weight.is_floating_point() and weight.dtype.itemsize > 1:
            self._prepare(weight.device, weight.dtype)  # before a compiler sees the hook: it would compile it again

    def remove(self) -> None:
        self._links = [link for link in reversed(self._links) if not link.end()][::-1]

    def forget_weight(self) -> None:
        if self._turns:
            self.terms = []

    @torch.no_grad()
    def renew(self) -> None:
        """The matrices that depend on strengths which have changed, in their place."""
        for term in self.terms:
            if isinstance(term, Turned) and term.turn.of_weight and term.strengths != self._before(term.part):
                term.strengths = self._before(term.part)
                term.matrices[-1].copy_(self._of_weight(term.part, term.turn, term.gains.device))

    def added(self, x: Tensor, y: Tensor, *, alone: bool = True) -> Tensor:
        """y with the update for x, added in place unless y's gradient is wanted. alone: y is the module's own."""
        if not self.terms or self.terms[0].gains.dtype != x.dtype or self.terms[0].gains.device != x.device:
            self._prepare(x.device, x.dtype)
        if y.requires_grad:
            y = y.clone()
        if self._turns:
            return y.add_(self._change(x, self._own(x, y, alone=alone), self.terms))
        for term in self.terms:
            assert isinstance(term, Term)
            self._add(x, y, term)
        return y

    def _prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """The factors where the module's input is, in its dtype, those of low rank joined to one pair."""
        # else neither gradients nor later strengths could pass; and what is kept is a constant to both
        with torch.inference_mode(False), torch.no_grad():
            gains, terms = self._gains(device, dtype), []
            for band, there in self._parts:
                count = sum(part.gains for part in there)
                terms.append(self._term(band, there, gains[:count]))
                gains = gains[count:]
            if self._turns:
                _, bias = self._weight(self.module, device)
                ones = [1] * (len(self._shape) - 2)
                self._offset = None if bias is None else bias.to(dtype).reshape(-1, *ones)
        self.terms = terms

    def _term(self, band: Band | None, parts: Sequence[Part], gains: Tensor) -> Term | Turned:
        device, dtype = gains.device, gains.dtype
        (part, *_) = parts
        if part.before is None:
            return Term(band, joined([part.on(device, dtype, self._shape) for part in parts]), gains)
        turn = moved(part.piece, device).adapter.turn(self._shape)
        inside = None
        if turn.inside is not None:
            within = Part(Piece(turn.inside, None, 1.0), turn.inside.product())
            scale = torch.full((within.gains,), within.scale, device=device, dtype=dtype)
            inside = Term(None, within.on(device, dtype, self._shape), scale)
        matrices = [matrix.to(dtype, copy=True) for matrix in turn.matrices]
        if turn.of_weight is not None:
            matrices.append(self._of_weight(part, turn, device).to(dtype))
        return Turned(band, turn, gains, tuple(matrices), inside, part, self._before(part))

    def _before(self, part: Part) -> tuple[float, ...]:
        """The strengths now of the pieces before a Transform."""
        return tuple(self._strength(piece.entry) * piece.factor for piece in part.before or ())

    def _of_weight(self, part: Part, turn: Turn, device: torch.device) -> Tensor:
        """The matrix of a Transform for the weight with the pieces before it, at the strengths of now."""
        assert turn.of_weight is not None and part.before is not None
        weight, _ = self._weight(self.module, device)
        weight = weight.clone()
        there = zip(part.before, self._before(part), strict=True)
        add_(weight, [replace(moved(piece, device), strength=now) for piece, now in there if now])
        return turn.of_weight(self._rows(weight, part.piece.band, 0))

    def _own(self, x: Tensor, y: Tensor, *, alone: bool) -> Tensor:
        """What the module's own weight, or bias, puts into its output y."""
        if self._of_bias:
            assert self._offset is not None
            return self._offset.reshape(-1, *[1] * (y.ndim - 2 if self._axis == 1 else 0)).expand_as(y)
        if not alone:
            return self._bare(x)
        return y if self._offset is None else y - self._offset

    def _bare(self, x: Tensor) -> Tensor:
        """The module's own output without its bias, as a linear map: no hook runs."""
        y = self._links[-1].bare(x)
        return y if self._offset is None else y - self._offset

    def _rows(self, y: Tensor, band: Band | None, axis: int | None = None) -> Tensor:
        return y if band is None else y.narrow(self._axis if axis is None else axis, band.start, band.length)

    def _change(self, x: Tensor, bare: Tensor, terms: Sequence[Term | Turned]) -> Tensor:
        """What terms add to the module's output for x, which is bare without its bias."""
        total = torch.zeros_like(bare)
        for number, term in enumerate(terms):
            if isinstance(term, Term):
                self._add(x, total, term)
            else:
                found = self._turn(x, bare + total, term, below(term, terms[:number]))
                self._rows(total, term.band).add_(found * term.gains)
        return total

    def _turn(self, x: Tensor, y: Tensor, term: Turned, before: Sequence[Term | Turned]) -> Tensor:
        """What a Transform adds at strength 1 to y, the output for x of all before it."""
        if not term.turn.of_inputs:
            inside = torch.zeros_like(self._rows(y, term.band))
            if term.inside is not None:
                self._add(x, inside, term.inside)
            return inside + self._difference(self._rows(y, term.band) + inside, term)
        moved = self._difference(x, term)
        bare = self._bare(moved)
        change = self._rows(bare + self._change(moved, bare, before), term.band)
        if term.inside is not None:
            self._add(x + moved, change, term.inside)
        return change

    def _difference(self, v: Tensor, term: Turned) -> Tensor:
        return term.turn.difference(v.movedim(self._axis, -1), *term.matrices).movedim(-1, self._axis)

    def _add(self, x: Tensor, y: Tensor, term: Term) -> None:
        axis, (down, up, left) = self._axis, term.product
        out = y if term.band is None else y.narrow(axis, term.band.start, term.band.length)
        ones = [1] * (y.ndim - 2 if axis == 1 else 0)  # after the axis
        gains = term.gains.reshape(-1, *ones)
        if self._of_bias:
            out += down.reshape(-1, *ones) * gains
            return
        if left is not None:  # the inputs are outer ones of inner ones; what is inside sees the outer as a batch
            x = x.unflatten(axis, (left.shape[1], -1))
            x = x.flatten(0, 1) if axis == 1 else x
        hidden = self._run(x, down) * gains
        if up is not None and axis == 1:
            hidden = CONVOLUTION[len(ones)](hidden, up.reshape(*up.shape, *ones))
        elif up is not None and left is None and out.is_contiguous() and not y.requires_grad and out.dtype == up.dtype:
            out.view(-1, out.shape[-1]).addmm_(hidden.reshape(-1, hidden.shape[-1]), up.T)
            return
        elif up is not None:
            hidden = functional.linear(hidden, up)
        if left is not None:
            hidden = hidden.unflatten(0, (-1, left.shape[1])).flatten(2) if axis == 1 else hidden
            hidden = torch.matmul(left, hidden).reshape(out.shape)
        out += hidden


def _cannot(piece: Piece, name: str) -> TargetError:
    what = f"gets a {piece.adapter.ALGEBRA} update, which cannot run live."
    return TargetError(what, module=name, remedy=REMEDY)
