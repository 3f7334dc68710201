"""Starts: the adapter that training begins with, which changes nothing yet."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Generator, Tensor

from ..adapters import Adapter, DoRA, InputOFT, LoHa, LoKr, LowRank
from ..errors import AdapterError

Start = Callable[[tuple[int, ...], int, float, Generator], Adapter]  # (shape, rank, alpha, …)


def lora(shape: tuple[int, ...], rank: int, alpha: float, generator: Generator) -> LowRank:
    """down is Gaussian, up is zero."""
    kernel = [1] * len(shape[2:])
    return LowRank(torch.zeros(shape[0], rank, *kernel), _gaussian((rank, *shape[1:]), 1 / rank, generator), alpha)


def loha(shape: tuple[int, ...], rank: int, alpha: float, generator: Generator) -> LoHa:
    """As LyCORIS starts it: one of the four is zero."""
    out, inputs = shape[0], math.prod(shape[1:])
    return LoHa(
        _gaussian((out, rank), 0.1, generator),
        _gaussian((rank, inputs), 1.0, generator),
        torch.zeros(out, rank),
        _gaussian((rank, inputs), 1.0, generator),
        alpha=alpha,
    )


def lokr(shape: tuple[int, ...], rank: int, alpha: float, generator: Generator) -> LoKr:
    """The weight cut near its square root; the second factor in two of this rank, or whole where that is less."""
    (outer, inner), (left, right) = _cut(shape[0]), _cut(shape[1])
    w1 = _gaussian((outer, left), 1 / math.sqrt(left), generator)
    if rank * (inner + right * math.prod(shape[2:])) >= inner * right * math.prod(shape[2:]):
        return LoKr(lokr_w1=w1, lokr_w2=torch.zeros(inner, right, *shape[2:]), alpha=alpha)
    return LoKr(
        lokr_w1=w1,
        lokr_w2_a=torch.zeros(inner, rank),
        lokr_w2_b=_gaussian((rank, right * math.prod(shape[2:])), 1 / rank, generator),
        alpha=alpha,
    )


def oft(shape: tuple[int, ...], rank: int, alpha: float, generator: Generator) -> InputOFT:
    """Rotations by nothing; rank is the size of a block, which must divide the inputs. It has no alpha."""
    inputs = math.prod(shape[1:])
    if rank < 2 or inputs % rank:
        what = f"has {inputs} inputs, which blocks of {rank} do not divide."
        raise AdapterError(what, remedy="Choose another rank: for OFT it is the size of a block, 2 at least.")
    return InputOFT(torch.zeros(inputs // rank, rank * (rank - 1) // 2))


STARTS: Mapping[str, Start] = {"lora": lora, "loha": loha, "lokr": lokr, "oft": oft}
ALGEBRAS: Mapping[str, type[Adapter]] = {"lora": LowRank, "dora": DoRA, "lokr": LoKr, "loha": LoHa, "oft": InputOFT}


def start(
    algebra: str, shape: tuple[int, ...], rank: int, alpha: float, generator: Generator, weight: Callable[[], Tensor]
) -> Adapter:
    """The adapter of an algebra for a weight (or band) of this shape, which DoRA takes its magnitude from."""
    if algebra != "dora":
        return STARTS[algebra](shape, rank, alpha, generator)
    magnitude = torch.linalg.vector_norm(weight().float().flatten(1), dim=1)
    return DoRA(lora(shape, rank, alpha, generator), magnitude)


def _gaussian(shape: tuple[int, ...], deviation: float, generator: Generator) -> Tensor:
    return torch.randn(shape, generator=generator) * deviation


def _cut(size: int) -> tuple[int, int]:
    """Two factors of a size, the smaller first, as near each other as can be."""
    smaller = next(n for n in range(math.isqrt(size), 0, -1) if size % n == 0)
    return smaller, size // smaller
