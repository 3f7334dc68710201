"""Offload: blocks whose weights are in main memory, each brought to the device while the one before it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from .blocks import blocks, replaced

# Begins to copy tensors to the device; what it gives waits for the copies.
Bring = Callable[[Sequence[Tensor]], Callable[[], Sequence[Tensor]]]


class Offload:
    """At most two blocks have their weights on the device: the one that runs, and the one after it, which in the
    backward pass is the one before it. away says of a tensor that it has to be brought.

    Blocks need not run in this order: what is not there when it is needed is waited for.
    """

    def __init__(self, model: nn.Module, bring: Bring, away: Callable[[Tensor], bool]) -> None:
        self.blocks = blocks(model)
        self._bring, self._away = bring, away
        self._numbers = {module: number for number, block in enumerate(self.blocks) for module in block.modules()}
        self._there: dict[int, _Visit] = {}
        self._now: int | None = None  # None: nothing is brought
        self.most = 0  # bytes of two blocks beside each other

    def start(self) -> None:
        """From here on blocks are brought; the first one is."""
        sizes = [sum(tensor.nbytes for _, _, tensor in self._apart(block)) for block in self.blocks]
        self.most = max((sum(sizes[number : number + 2]) for number in range(len(sizes))), default=0)
        if self.blocks:
            self._go(0, 1)

    def stop(self) -> None:
        """The model is as it was."""
        self._keep(())
        self._now = None

    def need(self, module: nn.Module) -> None:
        """The weights of its block are on the device from here on, and the next block's are on their way."""
        number = self._numbers.get(module)
        if number is not None and self._now is not None and number != self._now:
            self._go(number, 1 if number > self._now else -1)

    def _go(self, number: int, direction: int) -> None:
        if not 0 <= number + direction < len(self.blocks):  # at either end it goes back
            direction = -direction
        wanted = [each for each in (number, number + direction) if 0 <= each < len(self.blocks)]
        self._now = number
        self._keep(wanted)
        for each in wanted:
            if each not in self._there:
                self._there[each] = _Visit(list(self._apart(self.blocks[each])), self._bring)
        self._there[number].arrive()

    def _keep(self, wanted: Sequence[int]) -> None:
        for number in self._there.keys() - set(wanted):
            self._there.pop(number).end()

    def _apart(self, block: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
        for module in block.modules():
            for owner in (module._parameters, module._buffers):
                for name, tensor in owner.items():
                    if tensor is not None and self._away(tensor):
                        yield owner, name, tensor


class _Visit:
    """A block's weights on the device."""

    def __init__(self, apart: Sequence[tuple[dict[str, Any], str, Tensor]], bring: Bring) -> None:
        self._apart, self._arrived = apart, False
        self._copies = bring([tensor.detach() for _, _, tensor in apart]) if apart else tuple

    def arrive(self) -> None:
        if self._arrived:
            return
        for (owner, name, original), copy in zip(self._apart, self._copies(), strict=True):
            owner[name] = nn.Parameter(copy, requires_grad=False) if isinstance(original, nn.Parameter) else copy
        self._arrived = True

    def end(self) -> None:
        for owner, name, original in self._apart if self._arrived else ():
            owner[name] = original


def offloaded(offload: Offload) -> AbstractContextManager[None]:
    """While inside, each block asks for its weights before it runs, also where it is computed again."""

    def after(block: nn.Module) -> Callable[..., Any]:
        forward = block.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            offload.need(block)
            return forward(*args, **kwargs)

        return run

    return replaced(offload.blocks, after)
