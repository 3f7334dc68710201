"""Live: an update added to a module's output while it runs, y = f(x) + Σ s·ΔW(x); no weight is touched.

Exact on any base, also on one whose stored weights are too coarse to hold the update. The input goes through the
factors of an update (LoRA: up(down(x))). Only where they would cost more is ΔW built, which takes the memory of its
weight, and runs as the module with ΔW for its weight: all that run here are linear in it. Strengths are read at every
call: changing one changes a short vector, no weight and no compiled graph.

A Transform runs as what it does to the module's inputs or outputs, with all that comes before it in the stack
(adapters.base.Turn). One that turns inputs runs the module once more, and what is before it on the same rows. DoRA's
norms are those of the weight as it runs, with what is live before it: taken once, and again when a strength before it
changes, which takes as long as patching.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .adapters import Additive
from .adapters.base import Product, Transform, Turn
from .errors import TargetError
from .landing import Piece, add_, by_band
from .lora import BIAS, Band

CONVOLUTION = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}  # by dimensions of the kernel
Weight = Callable[[nn.Module, torch.device], tuple[Tensor, Tensor | None]]
NORMS = nn.GroupNorm | nn.LayerNorm | nn.RMSNorm
REMEDY = "Use mode patch for this LoRA."


def weight_and_bias(module: nn.Module, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Those that a module runs with, in float32 on a device; not to be changed."""
    there: list[Any] = [module.weight, module.bias]
    weight, bias = (None if each is None else each.to(device, torch.float32) for each in there)
    assert weight is not None
    return weight, bias


class Live:
    """The hooks of all modules that a landing touches, and the strengths they read.

    modules and pieces go by the same names, the keys of their weights or biases. One set of hooks serves every
    strength: set_strengths, then install.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        pieces: Mapping[str, Sequence[Piece]],
        weight: Weight = weight_and_bias,
    ) -> None:
        self._gains: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._hooks: list[Hook] = []
        scales: list[float] = []
        entries: list[int] = []
        for name, there in pieces.items():
            hook = Hook(modules[name], name, there, self._gains_of(len(scales)), self._strength, weight)
            self._hooks.append(hook)
            scales += [scale for scale, _ in hook.scales]
            entries += [entry for _, entry in hook.scales]
        self._scales, self._entries = torch.tensor(scales, dtype=torch.float64), torch.tensor(entries)
        self._strengths = torch.zeros(max(entries) + 1, dtype=torch.float64)
        self._base: object = None

    def set_strengths(self, strengths: Mapping[int, float]) -> None:
        """The strength of each entry of the stack from the next call on, 0 for those not named."""
        wanted = torch.zeros_like(self._strengths)
        for entry, strength in strengths.items():
            wanted[entry] = strength
        if not torch.equal(wanted, self._strengths):
            self._strengths = wanted
            for gains in self._gains.values():
                gains.copy_(self._values())
            for hook in self._hooks:
                hook.renew()

    def stand_on(self, base: object) -> None:
        """base tells which weights the modules run with: where they are others, their norms are taken anew."""
        if base != self._base:
            self._base = base
            for hook in self._hooks:
                hook.forget_weight()

    def install(self) -> None:
        for hook in self._hooks:
            hook.install()

    def remove(self) -> None:
        """Take the hooks out. One on which another's hook stands passes through from now on, and goes at the next
        remove that finds it outermost."""
        for hook in reversed(self._hooks):  # a weight's and a bias's may be on one module
            hook.remove()

    def forget(self) -> None:
        """Free what the hooks keep on the device; they make it again when they are called."""
        self._gains.clear()
        for hook in self._hooks:
            hook.terms = []

    def _strength(self, entry: int) -> float:
        return float(self._strengths[entry])

    def _values(self) -> Tensor:
        return self._scales * self._strengths[self._entries]

    def _gains_of(self, start: int) -> Callable[[torch.device, torch.dtype], Tensor]:
        def gains(device: torch.device, dtype: torch.dtype) -> Tensor:
            """The gains from a hook's first on, on a device in a dtype: a view that changes in place."""
            if (device, dtype) not in self._gains:
                self._gains[device, dtype] = self._values().to(device, dtype)
            return self._gains[device, dtype][start:]

        return gains


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
        """The factors for a weight of this shape, or ΔW, computed on the device in float32."""
        if self.product is None:
            return Product(_moved(self.piece, device).adapter.delta(shape).to(dtype))
        down, up, left = (None if each is None else each.to(device, dtype) for each in self.product)
        assert down is not None
        return Product(down.reshape(len(down), -1, *shape[2:]), up, left)


class Link:
    """One turn of a hook in a module's chain of forwards. A turn that is over passes through, wherever it still is."""

    def __init__(self, hook: Hook) -> None:
        self.hook = hook
        self.below: Callable[..., Tensor] = hook.module.forward
        self.alone = getattr(self.below, "__func__", None) is type(hook.module).forward  # with no other hook below
        self.active = True
        hook.module.forward = self.forward

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        y = self.below(x, *args, **kwargs)
        return self.hook.added(x, y, alone=self.alone) if self.active else y

    def end(self) -> bool:
        """True once this link is out of the chain; False while another's hook may still call it."""
        self.active = False
        module = self.hook.module
        outermost = module.__dict__.get("forward")
        owner = getattr(outermost, "__self__", None)
        if owner is self:
            if getattr(self.below, "__func__", None) is type(module).forward:
                del module.forward  # the class's own again
            else:
                module.forward = self.below
        return outermost is None or owner in (self, module)


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
        self._axis, self._run, shape = _kind(module, name)
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
            yield from _runs(band, [self._part(each, name) for each in there])

    def _part(self, piece: Piece, name: str) -> Part:
        assert isinstance(piece.adapter, Additive)
        product = piece.adapter.product()
        if product is not None and len(self._shape) == 1:
            raise _cannot(piece, name)
        return Part(piece, product)

    def _turn_of(self, piece: Piece, name: str) -> Turn:
        assert isinstance(piece.adapter, Transform)
        turn = piece.adapter.turn(self._shape) if len(self._shape) > 1 else None
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
            bare = self._bare(x) if not alone else y if self._offset is None else y - self._offset
            return y.add_(self._change(x, bare, self.terms))
        for term in self.terms:
            assert isinstance(term, Term)
            self._add(x, y, term)
        return y

    def _prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """The factors where the module's input is, in its dtype, those of low rank joined to one pair."""
        with torch.inference_mode(False):  # else neither gradients nor later strengths could pass
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
            return Term(band, _joined([part.on(device, dtype, self._shape) for part in parts]), gains)
        turn = _moved(part.piece, device).adapter.turn(self._shape)
        inside = None
        if turn.inside is not None:
            within = Part(Piece(turn.inside, None, 1.0), turn.inside.product())
            scale = torch.full((within.gains,), within.scale, device=device, dtype=dtype)
            inside = Term(None, within.on(device, dtype, self._shape), scale)
        matrices = [matrix.to(dtype) for matrix in turn.matrices]
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
        add_(weight, [replace(_moved(piece, device), strength=now) for piece, now in there if now])
        return turn.of_weight(self._rows(weight, part.piece.band, 0))

    def _bare(self, x: Tensor) -> Tensor:
        """The module's own output without its bias, as a linear map: no hook runs."""
        y = type(self.module).forward(self.module, x)
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
                found = self._turn(x, bare + total, term, _below(term, terms[:number]))
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
        elif up is not None and left is None and out.is_contiguous() and not y.requires_grad:
            out.view(-1, out.shape[-1]).addmm_(hidden.reshape(-1, hidden.shape[-1]), up.T)
            return
        elif up is not None:
            hidden = functional.linear(hidden, up)
        if left is not None:
            hidden = hidden.unflatten(0, (-1, left.shape[1])).flatten(2) if axis == 1 else hidden
            hidden = torch.matmul(left, hidden).reshape(out.shape)
        out += hidden


class Kind(NamedTuple):
    """What a module does with its weight."""

    axis: int  # of the output, along which the rows of its weight lie
    run: Callable[[Tensor, Tensor], Tensor]  # its output for an input and another weight, without its bias
    shape: tuple[int, ...]  # of its weight: (-1, in, kernel…)


def _kind(module: nn.Module, name: str) -> Kind:
    """Raises TargetError for what live mode cannot add to."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        if module.groups != 1:
            raise TargetError("is a grouped convolution, which cannot run live.", module=name, remedy=REMEDY)
        convolved: Any = module._conv_forward  # with its stride and padding
        shape = (-1, module.in_channels, *module.kernel_size)
        return Kind(1, lambda x, weight: convolved(x, weight, None), shape)
    if isinstance(module, nn.Linear) or hasattr(module, "in_features"):  # the host's quantised Linear is no nn.Linear
        return Kind(-1, functional.linear, (-1, module.in_features))  # pyright: ignore
    if isinstance(module, nn.GroupNorm):
        return Kind(1, lambda x, weight: functional.group_norm(x, module.num_groups, weight, None, module.eps), (-1,))
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
        return Kind(-1, lambda x, weight: functional.layer_norm(x, weight.shape, weight, None, module.eps), (-1,))
    if isinstance(module, nn.RMSNorm) and len(module.normalized_shape) == 1:
        return Kind(-1, lambda x, weight: functional.rms_norm(x, weight.shape, weight, module.eps), (-1,))
    raise TargetError(f"is a {type(module).__name__}, which cannot run live.", module=name, remedy=REMEDY)


def _below(term: Turned, before: Sequence[Term | Turned]) -> list[Term | Turned]:
    """Those before a term that its rows depend on, through each other too."""
    bands, found = [term.band], []
    for other in reversed(before):
        if any(_meet(other.band, band) for band in bands):
            bands.append(other.band)
            found.append(other)
    return found[::-1]


def _meet(one: Band | None, other: Band | None) -> bool:
    return one is None or other is None or (one.start < other.end and other.start < one.end)


def _cannot(piece: Piece, name: str) -> TargetError:
    what = f"gets a {piece.adapter.ALGEBRA} update, which cannot run live."
    return TargetError(what, module=name, remedy=REMEDY)


def _moved(piece: Piece, device: torch.device) -> Any:
    """The piece with its tensors on the device."""
    return Piece.unpacked(piece.packed(), lambda tensor: tensor.to(device))


def _runs(band: Band | None, parts: Sequence[Part]) -> list[tuple[Band | None, list[Part]]]:
    """What one product can hold: all that is of low rank, anything else alone."""
    low = [part for part in parts if part.low_rank]
    return [(band, there) for there in (low, *([part] for part in parts if not part.low_rank)) if there]


def _joined(products: Sequence[Product]) -> Product:
    if len(products) == 1:
        return products[0]
    ups = [product.up for product in products if product.up is not None]
    return Product(torch.cat([product.down for product in products]), torch.cat(ups, dim=1))
