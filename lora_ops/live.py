"""Live: an update added to a module's output while it runs, y = f(x) + Σ s·ΔW(x); no weight is touched.

Exact on any base, also on one whose stored weights are too coarse to hold the update. The input goes through the
factors of an update (LoRA: up(down(x))). Only where they would cost more is ΔW built, which takes the memory of its
weight, and runs as the module with ΔW for its weight: all that run here are linear in it. Strengths are read at every
call: changing one changes a short vector, no weight and no compiled graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .adapters import Additive
from .adapters.base import Product
from .errors import TargetError
from .landing import Piece, by_band
from .lora import BIAS, Band

CONVOLUTION = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}  # by dimensions of the kernel
NORMS = nn.GroupNorm | nn.LayerNorm | nn.RMSNorm
REMEDY = "Use mode patch for this LoRA."


class Live:
    """The hooks of all modules that a landing touches, and the strengths they read.

    modules and pieces go by the same names, the keys of their weights or biases. One set of hooks serves every
    strength: set_strengths, then install.
    """

    def __init__(self, modules: Mapping[str, nn.Module], pieces: Mapping[str, Sequence[Piece]]) -> None:
        self._gains: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._hooks: list[Hook] = []
        scales: list[float] = []
        entries: list[int] = []
        for name, there in pieces.items():
            hook = Hook(modules[name], name, by_band(there), self._gains_of(len(scales)))
            self._hooks.append(hook)
            scales += [scale for scale, _ in hook.scales]
            entries += [entry for _, entry in hook.scales]
        self._scales, self._entries = torch.tensor(scales, dtype=torch.float64), torch.tensor(entries)
        self._strengths = torch.zeros(max(entries) + 1, dtype=torch.float64)

    def set_strengths(self, strengths: Mapping[int, float]) -> None:
        """The strength of each entry of the stack from the next call on, 0 for those not named."""
        wanted = torch.zeros_like(self._strengths)
        for entry, strength in strengths.items():
            wanted[entry] = strength
        if not torch.equal(wanted, self._strengths):
            self._strengths = wanted
            for gains in self._gains.values():
                gains.copy_(self._values())

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


@dataclass(frozen=True, eq=False)
class Part:
    """A piece, and the factors that the input goes through; None if that is the whole ΔW."""

    piece: Piece
    product: Product | None

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
            there = Piece.unpacked(self.piece.packed(), lambda tensor: tensor.to(device)).adapter
            assert isinstance(there, Additive)
            return Product(there.delta(shape).to(dtype))
        down, up, left = (None if each is None else each.to(device, dtype) for each in self.product)
        assert down is not None
        return Product(down.reshape(len(down), -1, *shape[2:]), up, left)


class Link:
    """One turn of a hook in a module's chain of forwards. A turn that is over passes through, wherever it still is."""

    def __init__(self, hook: Hook) -> None:
        self.hook = hook
        self.below: Callable[..., Tensor] = hook.module.forward
        self.active = True
        hook.module.forward = self.forward

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        y = self.below(x, *args, **kwargs)
        return self.hook.added(x, y) if self.active else y

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
        bands: Sequence[tuple[Band | None, Sequence[Piece]]],
        gains: Callable[[torch.device, torch.dtype], Tensor],
    ) -> None:
        self.module = module
        self.terms: list[Term] = []
        self._of_bias = name.endswith(BIAS)
        self._axis, self._run, shape = _kind(module, name)
        self._shape = (-1,) if self._of_bias else shape
        self._parts = [run for band, there in bands for run in _runs(band, [self._part(each, name) for each in there])]
        self.scales = [  # (scale, entry of the stack) of every gain
            (part.scale, part.piece.entry) for _, there in self._parts for part in there for _ in range(part.gains)
        ]
        self._gains = gains
        self._links: list[Link] = []

    def _part(self, piece: Piece, name: str) -> Part:
        product = piece.adapter.product() if isinstance(piece.adapter, Additive) else None
        if not isinstance(piece.adapter, Additive) or (product is not None and len(self._shape) == 1):
            what = f"gets a {piece.adapter.ALGEBRA} update, which cannot run live."
            raise TargetError(what, module=name, remedy=REMEDY)
        return Part(piece, product)

    def install(self) -> None:
        if not any(link.active for link in self._links):
            self._links.append(Link(self))
        weight = self.module.weight
        if not self.terms and isinstance(weight, Tensor) and weight.is_floating_point() and weight.dtype.itemsize > 1:
            self._prepare(weight.device, weight.dtype)  # before a compiler sees the hook: it would compile it again

    def remove(self) -> None:
        self._links = [link for link in reversed(self._links) if not link.end()][::-1]

    def added(self, x: Tensor, y: Tensor) -> Tensor:
        """y with the update for x, added in place unless y's gradient is wanted."""
        if not self.terms or self.terms[0].gains.dtype != x.dtype or self.terms[0].gains.device != x.device:
            self._prepare(x.device, x.dtype)
        if y.requires_grad:
            y = y.clone()
        for term in self.terms:
            self._add(x, y, term)
        return y

    def _prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """The factors where the module's input is, in its dtype, those of low rank joined to one pair."""
        with torch.inference_mode(False):  # else neither gradients nor later strengths could pass
            gains, terms = self._gains(device, dtype), []
            for band, there in self._parts:
                count = sum(part.gains for part in there)
                terms.append(
                    Term(band, _joined([part.on(device, dtype, self._shape) for part in there]), gains[:count])
                )
                gains = gains[count:]
        self.terms = terms

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


def _runs(band: Band | None, parts: Sequence[Part]) -> list[tuple[Band | None, list[Part]]]:
    """What one product can hold: all that is of low rank, anything else alone."""
    low = [part for part in parts if part.low_rank]
    return [(band, there) for there in (low, *([part] for part in parts if not part.low_rank)) if there]


def _joined(products: Sequence[Product]) -> Product:
    if len(products) == 1:
        return products[0]
    ups = [product.up for product in products if product.up is not None]
    return Product(torch.cat([product.down for product in products]), torch.cat(ups, dim=1))
