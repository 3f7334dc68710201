"""Live: an update added to a module's output while it runs, y = f(x) + Σ s·up(down(x)); no weight is touched.

Exact on any base, also on one whose stored weights are too coarse to hold the update. Strengths are read at every
call: changing one changes a short vector, no weight and no compiled graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from .adapters import LowRank
from .errors import TargetError
from .landing import Piece, by_band
from .lora import Band

CONVOLUTION = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}  # by dimensions of the kernel
REMEDY = "Use mode patch for this LoRA."


class Live:
    """The hooks of all modules that a landing touches, and the strengths they read.

    modules and pieces go by the same names. One set of hooks serves every strength: set_strengths, then install.
    """

    def __init__(self, modules: Mapping[str, nn.Module], pieces: Mapping[str, Sequence[Piece]]) -> None:
        self._gains: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._hooks: list[Hook] = []
        scales: list[float] = []
        entries: list[int] = []
        for name, there in pieces.items():
            hook = Hook(modules[name], name, by_band(there), self._gains_of(len(scales)))
            self._hooks.append(hook)
            scales += [scale for scale, _ in hook.ranks]
            entries += [entry for _, entry in hook.ranks]
        self._scales, self._entries = torch.tensor(scales, dtype=torch.float64), torch.tensor(entries)
        self._strengths = torch.zeros(max(entries) + 1, dtype=torch.float64)

    def set_strengths(self, strengths: Sequence[float]) -> None:
        """The strength of each entry of the stack, from the next call on."""
        wanted = torch.tensor(strengths, dtype=torch.float64)
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
        for hook in self._hooks:
            hook.remove()

    def forget(self) -> None:
        """Free what the hooks keep on the device; they make it again when they are called."""
        self._gains.clear()
        for hook in self._hooks:
            hook.terms = []

    def _values(self) -> Tensor:
        return self._scales * self._strengths[self._entries]

    def _gains_of(self, start: int) -> Callable[[Tensor], Tensor]:
        def gains(x: Tensor) -> Tensor:
            """The gains from a hook's first rank on, where and as x is: a view that changes in place."""
            place = x.device, x.dtype
            if place not in self._gains:
                self._gains[place] = self._values().to(*place)
            return self._gains[place][start:]

        return gains


@dataclass(eq=False)
class Term:
    """All updates of one band of a module as one pair of factors."""

    band: Band | None
    up: Tensor  # (out, rank)
    down: Tensor  # (rank, in, kernel…)
    gains: Tensor  # (rank,)


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
        gains: Callable[[Tensor], Tensor],
    ) -> None:
        self.module = module
        self.ranks = [  # (scale, entry of the stack) of every rank
            (piece.adapter.scale, piece.entry)
            for _, there in bands
            for piece in there
            for _ in range(piece.adapter.rank)
        ]
        self.terms: list[Term] = []
        self._kernel = _kernel(module, name)
        self._pairs = [(band, [_factors(piece, name) for piece in there]) for band, there in bands]
        self._gains = gains
        self._links: list[Link] = []

    def install(self) -> None:
        if not any(link.active for link in self._links):
            self._links.append(Link(self))

    def remove(self) -> None:
        self._links = [link for link in reversed(self._links) if not link.end()][::-1]

    def added(self, x: Tensor, y: Tensor) -> Tensor:
        """y with the update for x, added in place unless y's gradient is wanted."""
        if not self.terms or self.terms[0].gains.dtype != x.dtype or self.terms[0].gains.device != x.device:
            with torch.inference_mode(False):  # else neither gradients nor later strengths could pass
                self.terms = self._prepared(x)
        if y.requires_grad:
            y = y.clone()
        for term in self.terms:
            self._add(x, y, term)
        return y

    def _prepared(self, x: Tensor) -> list[Term]:
        """The factors where x is, in its dtype, those of a band as one pair."""
        gains, terms = self._gains(x), []
        for band, pairs in self._pairs:
            up = torch.cat([up.to(x.device, x.dtype) for up, _ in pairs], dim=1)
            down = torch.cat([down.to(x.device, x.dtype) for _, down in pairs])
            if self._kernel:
                down = down.reshape(down.shape[0], -1, *self._kernel)
            terms.append(Term(band, up, down, gains[: len(down)]))
            gains = gains[len(down) :]
        return terms

    def _add(self, x: Tensor, y: Tensor, term: Term) -> None:
        axis = 1 if self._kernel else -1
        out = y if term.band is None else y.narrow(axis, term.band.start, term.band.length)
        if self._kernel:
            ones = [1] * len(self._kernel)
            hidden = self.module._conv_forward(x, term.down, None)  # pyright: ignore  with its stride and padding
            hidden = hidden * term.gains.reshape(-1, *ones)
            out += CONVOLUTION[len(ones)](hidden, term.up.reshape(*term.up.shape, *ones))
            return
        hidden = functional.linear(x, term.down) * term.gains
        if out.is_contiguous() and not y.requires_grad:
            out.view(-1, out.shape[-1]).addmm_(hidden.reshape(-1, hidden.shape[-1]), term.up.T)
        else:
            out += functional.linear(hidden, term.up)


def _kernel(module: nn.Module, name: str) -> tuple[int, ...]:
    """The module's kernel, () for a linear one. Raises TargetError for what live mode cannot add to."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        if module.groups != 1:
            raise TargetError("is a grouped convolution, which cannot run live.", module=name, remedy=REMEDY)
        return tuple(module.kernel_size)
    if isinstance(module, nn.Linear) or hasattr(module, "in_features"):  # the host's quantised Linear is no nn.Linear
        return ()
    raise TargetError(f"is a {type(module).__name__}, which cannot run live.", module=name, remedy=REMEDY)


def _factors(piece: Piece, name: str) -> tuple[Tensor, Tensor]:
    adapter = piece.adapter
    if not isinstance(adapter, LowRank):
        raise TargetError(f"gets a {adapter.ALGEBRA} update, which cannot run live.", module=name, remedy=REMEDY)
    return adapter.up.flatten(1), adapter.down.flatten(1)
