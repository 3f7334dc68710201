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
        rows: list[int] = []
        for name, there in pieces.items():
            hook = Hook(modules[name], name, by_band(there), self._gains_of(len(scales)))
            self._hooks.append(hook)
            scales += [scale for scale, _ in hook.ranks]
            rows += [row for _, row in hook.ranks]
        self._scales, self._rows = torch.tensor(scales, dtype=torch.float64), torch.tensor(rows)
        self._strengths = torch.zeros(max(rows) + 1, dtype=torch.float64)

    def set_strengths(self, strengths: Sequence[float]) -> None:
        """The strength of each row of the stack, from the next call on."""
        wanted = torch.tensor(strengths, dtype=torch.float64)
        if not torch.equal(wanted, self._strengths):
            self._strengths = wanted
            for gains in self._gains.values():
                gains.copy_(self._values())

    def install(self) -> None:
        for hook in self._hooks:
            hook.install()

    def remove(self) -> bool:
        """Take all hooks out; False while another's hook stands on one of them (call again when it is gone)."""
        return all([hook.remove() for hook in self._hooks])

    def _values(self) -> Tensor:
        return self._scales * self._strengths[self._rows]

    def _gains_of(self, start: int) -> Callable[[Tensor], Tensor]:
        def gains(x: Tensor) -> Tensor:
            """The gains from a hook's first rank on, where and as x is: a view that changes in place."""
            place = x.device, x.dtype
            if place not in self._gains:
                with torch.inference_mode(False):  # else they could not be changed outside of it
                    self._gains[place] = self._values().to(*place)
            return self._gains[place][start:]

        return gains


@dataclass(eq=False)
class _Term:
    """All updates of one band of a module as one pair of factors."""

    band: Band | None
    up: Tensor  # (out, rank)
    down: Tensor  # (rank, in, kernel…)
    gains: Tensor  # (rank,)


class Hook:
    """One module's forward with its update added."""

    def __init__(
        self,
        module: nn.Module,
        name: str,
        bands: Sequence[tuple[Band | None, Sequence[Piece]]],
        gains: Callable[[Tensor], Tensor],
    ) -> None:
        self._module = module
        self._kernel = _kernel(module, name)
        self._pairs = [(band, [_factors(piece, name) for piece in there]) for band, there in bands]
        self.ranks = [  # (scale, row of the stack) of every rank
            (piece.adapter.scale, piece.row) for _, there in bands for piece in there for _ in range(piece.adapter.rank)
        ]
        self._gains = gains
        self._terms: list[_Term] = []
        self._below: Callable[..., Tensor] | None = None

    def install(self) -> None:
        if self._below is None:
            self._below = self._module.forward
            self._module.forward = self.forward

    def remove(self) -> bool:
        """Undo install; False, with nothing done, while another's hook stands on this one."""
        if self._below is None:
            return True
        outermost = getattr(self._module.__dict__.get("forward"), "__self__", None)
        if outermost is not self and self._stands_below():
            return False
        if outermost is self:
            if getattr(self._below, "__func__", None) is type(self._module).forward:
                del self._module.forward  # the class's own again
            else:
                self._module.forward = self._below
        self._below = None
        return True

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        assert self._below is not None
        y = self._below(x, *args, **kwargs)
        if not self._terms or self._terms[0].gains.dtype != x.dtype or self._terms[0].gains.device != x.device:
            self._terms = self._prepared(x)
        if y.requires_grad:
            y = y.clone()
        for term in self._terms:
            self._add(x, y, term)
        return y

    def _stands_below(self) -> bool:
        """Whether the hook that replaced this one calls it: then taking it away would leave a hole."""
        other = getattr(self._module.__dict__.get("forward"), "__self__", None)
        return any(getattr(value, "__self__", None) is self for value in vars(other).values()) if other else False

    def _prepared(self, x: Tensor) -> list[_Term]:
        """The factors where x is, in its dtype, those of a band as one pair."""
        gains, terms = self._gains(x), []
        for band, pairs in self._pairs:
            up = torch.cat([up.to(x) for up, _ in pairs], dim=1)
            down = torch.cat([down.to(x) for _, down in pairs])
            if self._kernel:
                down = down.reshape(down.shape[0], -1, *self._kernel)
            terms.append(_Term(band, up, down, gains[: len(down)]))
            gains = gains[len(down) :]
        return terms

    def _add(self, x: Tensor, y: Tensor, term: _Term) -> None:
        axis = 1 if self._kernel else -1
        rows = y if term.band is None else y.narrow(axis, term.band.start, term.band.length)
        if self._kernel:
            ones = [1] * len(self._kernel)
            hidden = self._module._conv_forward(x, term.down, None)  # pyright: ignore  with its stride and padding
            hidden = hidden * term.gains.reshape(-1, *ones)
            rows += CONVOLUTION[len(ones)](hidden, term.up.reshape(*term.up.shape, *ones))
            return
        hidden = functional.linear(x, term.down) * term.gains
        if rows.is_contiguous():
            rows.view(-1, rows.shape[-1]).addmm_(hidden.view(-1, hidden.shape[-1]), term.up.T)
        else:
            rows += functional.linear(hidden, term.up)


def _kernel(module: nn.Module, name: str) -> tuple[int, ...]:
    """The module's kernel, () for a linear one. Raises TargetError for what live mode cannot add to."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        if module.groups != 1:
            raise TargetError(
                "is a grouped convolution, to which nothing can be added live.", module=name, remedy=REMEDY
            )
        return tuple(module.kernel_size)
    if isinstance(module, nn.Linear) or hasattr(module, "in_features"):  # the host's quantised Linear is no nn.Linear
        return ()
    raise TargetError(f"is a {type(module).__name__}, which cannot run live.", module=name, remedy=REMEDY)


def _factors(piece: Piece, name: str) -> tuple[Tensor, Tensor]:
    adapter = piece.adapter
    if not isinstance(adapter, LowRank):
        raise TargetError(f"gets a {adapter.ALGEBRA} update, which cannot run live.", module=name, remedy=REMEDY)
    return adapter.up.flatten(1), adapter.down.flatten(1)
