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

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..landing import Piece
from .hook import Hook
from .modules import REMEDY, Link, Weight, weight_and_bias


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


__all__ = ["REMEDY", "Link", "Live", "weight_and_bias"]
