"""Diag-OFT and BOFT: W' = rescale · R W, where R rotates the outputs, block by block or in butterflies of blocks.

Qiu et al. 2023 (https://arxiv.org/abs/2306.07280), Liu et al. 2023 (https://arxiv.org/abs/2311.06243), as LyCORIS has
them. R is Cayley's transform of skew-symmetric blocks; `alpha` is no alpha here but the constraint on their norm, times
the number of outputs, as in kohya and LyCORIS. Strength is a straight line from W to W', so that 0 is no change, as
in kohya; LyCORIS still rescales at 0, and puts its multiplier into every stage of a butterfly. At 1 all agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from ..algebra import exact
from ..errors import AdapterError, ShapeError
from .base import Transform, Turn, alpha_of, require_floats


@dataclass(frozen=True, eq=False)
class DiagOFT(Transform):
    ALGEBRA = "Diag-OFT"
    REQUIRED = frozenset({"oft_blocks"})
    OPTIONAL = frozenset({"rescale", "alpha"})

    alpha = None

    blocks: Tensor  # (blocks, size, size); BOFT: (stages, blocks, size, size)
    constraint: float = 0.0  # as stored; 0 is none
    rescale: Tensor | None = None  # (out,)
    exchanged: bool = False  # for a weight whose two halves of rows are exchanged

    @classmethod
    def build(cls, factors: Mapping[str, Tensor]) -> DiagOFT:
        require_floats(factors)
        blocks, rescale = factors["oft_blocks"], factors.get("rescale")
        shape = tuple(blocks.shape)
        if blocks.ndim not in (3, 4) or shape[-1] != shape[-2] or 0 in shape:
            raise ShapeError(f"oft_blocks has the shape {shape}, which is no row of square blocks")
        algebra = DiagOFT if blocks.ndim == 3 else BOFT
        if algebra is BOFT and (shape[-1] % 2 or shape[1] % 2 ** (shape[0] - 1)):
            raise ShapeError(f"oft_blocks has the shape {shape}, which makes no butterfly")
        made = algebra(blocks, alpha_of(factors) or 0.0, None if rescale is None else rescale.flatten())
        if rescale is not None and rescale.numel() != made.outputs:
            raise ShapeError(f"rescale has the shape {tuple(rescale.shape)}, the blocks are for {made.outputs} outputs")
        return made

    @property
    def outputs(self) -> int:
        return self.blocks.shape[-3] * self.blocks.shape[-1]

    @property
    def rank(self) -> int:
        """The size of a block."""
        return self.blocks.shape[-1]

    def require_fit(self, shape: tuple[int, ...]) -> None:
        if shape[0] != self.outputs or len(shape) < 2:
            what = f"rotates {self.outputs} outputs, the weight has {shape}"
            raise ShapeError(what, found=(self.outputs,), expected=shape)

    def changed(self, weight: Tensor) -> Tensor:
        columns = weight.flatten(1).T
        return (columns + self._difference(columns, *self._matrices(weight.dtype))).T.reshape(weight.shape)

    def turn(self, shape: tuple[int, ...]) -> Turn:
        return Turn(False, self._difference, self._matrices(torch.float32))

    def _matrices(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Of each stage the rotations less the identity (blocks, size, size), and the rescaling less 1."""
        rotations = self._rotations(dtype)
        stages = rotations - torch.eye(self.rank, dtype=dtype, device=rotations.device)
        return (stages,) if self.rescale is None else (stages, self.rescale.to(dtype) - 1)

    def _difference(self, outputs: Tensor, stages: Tensor, *rescale: Tensor) -> Tensor:
        """What becomes of outputs (…, out), less the outputs themselves."""
        outputs = _exchanged(outputs) if self.exchanged else outputs
        change = torch.zeros_like(outputs)
        for number, stage in enumerate(stages):
            change = change + self._turned(outputs + change, stage, number)
        for more in rescale:
            change = change + more * (outputs + change)
        return _exchanged(change) if self.exchanged else change

    def _rotations(self, dtype: torch.dtype) -> Tensor:
        """R = (I + Q)(I - Q)⁻¹ of each block, by stages; Q's norm over all blocks is no larger than the constraint."""
        blocks = self.blocks.to(dtype)
        skew, eye = blocks - blocks.mT, torch.eye(self.rank, dtype=dtype, device=blocks.device)
        norm, most = torch.linalg.vector_norm(skew), self.constraint * self.outputs
        if 0 < most < norm:
            skew = skew * (most / norm)
        found = torch.linalg.solve(eye - skew, eye + skew, left=False)
        return found.reshape(-1, *found.shape[-3:])

    def _turned(self, outputs: Tensor, stage: Tensor, number: int) -> Tensor:
        """Each block of outputs times its transposed matrix: kohya and LyCORIS store it so."""
        return torch.einsum("...bj,bji->...bi", outputs.unflatten(-1, (-1, self.rank)), stage).flatten(-2)

    def factors(self, shape: tuple[int, ...]) -> Mapping[str, Tensor]:
        if self.exchanged:
            return super().factors(shape)
        ones = [1] * (len(shape) - 1)
        rescale = {} if self.rescale is None else {"rescale": self.rescale.reshape(-1, *ones)}
        return {"oft_blocks": self.blocks, "alpha": exact(self.constraint), **rescale}

    def packed(self) -> tuple[Any, ...]:
        return self.blocks, self.constraint, self.rescale, self.exchanged

    @property
    def idle(self) -> bool:
        """Symmetric blocks rotate nothing."""
        return torch.equal(self.blocks, self.blocks.mT) and (self.rescale is None or bool((self.rescale == 1).all()))

    @property
    def swapped(self) -> Self:
        return self._swapped

    @cached_property
    def _swapped(self) -> Self:
        return replace(self, exchanged=not self.exchanged)


class BOFT(DiagOFT):
    ALGEBRA = "BOFT"

    def _turned(self, outputs: Tensor, stage: Tensor, number: int) -> Tensor:
        """In stage i a block takes outputs that lie 2^i · half a block apart, and its matrix is not transposed."""
        apart = 2**number * self.rank // 2
        order = torch.arange(outputs.shape[-1], device=outputs.device).reshape(-1, 2, apart).mT.flatten()
        mixed = super()._turned(outputs[..., order], stage.mT, number)
        return torch.empty_like(outputs).index_copy(-1, order, mixed)


@dataclass(frozen=True, eq=False)
class InputOFT(Transform):
    """PEFT's and OneTrainer's OFT: W' = W Rᵀ, where R rotates the inputs (a convolution's with their kernels).

    With terms R is the Neumann series of Cayley's transform that both run by default; without, (I - Q)(I + Q)⁻¹, which
    PEFT has where its configuration says so.
    """

    ALGEBRA = "OFT"
    REQUIRED = frozenset({"oft_R"})
    OPTIONAL = frozenset({"oft_scaled", "oft_terms", "oft_eps"})

    alpha = None

    vectors: Tensor  # (blocks, size · (size - 1) / 2): what is above the diagonals; one block may serve all inputs
    scaled_by: float = 1.0  # OneTrainer's scaled OFT divides by 2 √(size - 1)
    terms: int = 5  # 0: none
    eps: float = 0.0  # PEFT's constrained OFT: the largest norm of all blocks; 0 is none

    @classmethod
    def build(cls, factors: Mapping[str, Tensor]) -> Self:
        vectors = factors["oft_R"]
        require_floats({"oft_R": vectors})
        if vectors.ndim != 2 or 0 in vectors.shape:
            raise ShapeError(f"oft_R has the shape {tuple(vectors.shape)}, which is no list of blocks")
        made = cls(vectors, terms=int(factors.get("oft_terms", 5)), eps=float(factors.get("oft_eps", 0.0)))
        if made.rank * (made.rank - 1) // 2 != vectors.shape[1]:
            raise ShapeError(f"oft_R has the shape {tuple(vectors.shape)}, which is of no size of block")
        scaled = "oft_scaled" in factors and bool(factors["oft_scaled"].all())
        return replace(made, scaled_by=0.5 / (made.rank - 1) ** 0.5) if scaled else made

    @property
    def rank(self) -> int:
        """The size of a block."""
        return round((1 + (1 + 8 * self.vectors.shape[1]) ** 0.5) / 2)

    def require_fit(self, shape: tuple[int, ...]) -> None:
        inputs, blocks = torch.Size(shape[1:]).numel() if len(shape) > 1 else 0, len(self.vectors)
        if not inputs or inputs % self.rank or blocks not in (1, inputs // self.rank):
            what = f"rotates {blocks * self.rank} inputs, the weight has {shape}"
            raise ShapeError(what, found=(blocks * self.rank,), expected=shape)

    def changed(self, weight: Tensor) -> Tensor:
        inputs = weight.reshape(len(weight), -1, self.rank)
        rotations = self._rotations(weight.dtype).expand(inputs.shape[1], -1, -1)
        return torch.einsum("okc,kbc->okb", inputs, rotations).reshape(weight.shape)

    def turn(self, shape: tuple[int, ...]) -> Turn | None:
        """None for a kernel: there it rotates what no channels hold."""
        if torch.Size(shape[2:]).numel() != 1:
            return None
        rotations = self._rotations(torch.float32)
        return Turn(True, self._difference, (rotations - torch.eye(self.rank, device=rotations.device),))

    def _difference(self, inputs: Tensor, blocks: Tensor) -> Tensor:
        split = inputs.unflatten(-1, (-1, self.rank))
        return torch.einsum("...kb,kbc->...kc", split, blocks.expand(split.shape[-2], -1, -1)).flatten(-2)

    def _rotations(self, dtype: torch.dtype) -> Tensor:
        size, vectors = self.rank, self.vectors.to(dtype) * self.scaled_by
        upper = torch.zeros(len(vectors), size, size, dtype=dtype, device=vectors.device)
        rows, columns = torch.triu_indices(size, size, 1, device=vectors.device)
        upper[:, rows, columns] = vectors
        skew, eye = upper - upper.mT, torch.eye(size, dtype=dtype, device=vectors.device)
        if self.eps:
            norms = torch.linalg.vector_norm(skew, dim=(1, 2), keepdim=True)
            most = self.eps / len(skew) ** 0.5
            skew = torch.where(norms > most, skew * (most / norms), skew)
        if self.terms:
            return _neumann(skew, eye, self.terms)
        return torch.linalg.solve(eye + skew, eye - skew, left=False)

    def factors(self, shape: tuple[int, ...]) -> Mapping[str, Tensor]:
        if self.terms != 5 or self.eps:
            raise AdapterError("is OFT with terms or a constraint that only PEFT's configuration says")
        scaled = {} if self.scaled_by == 1 else {"oft_scaled": torch.tensor(True)}
        return {"oft_R": self.vectors, **scaled}

    def packed(self) -> tuple[Any, ...]:
        return self.vectors, self.scaled_by, self.terms, self.eps

    @property
    def idle(self) -> bool:
        return not self.vectors.any()

    @property
    def swapped(self) -> Self:
        return self

    def narrowed(self, start: int, length: int) -> Self:
        return self


def _exchanged(outputs: Tensor) -> Tensor:
    return torch.cat(outputs.chunk(2, -1)[::-1], -1)


def _neumann(skew: Tensor, eye: Tensor, terms: int) -> Tensor:
    """I + 2Q + 2Q² + … + Qⁿ with so many terms, the last one counted once; where three are asked for, PEFT has four."""
    total, power, last = eye.expand_as(skew), eye, 3 if terms == 3 else terms - 1
    for exponent in range(1, last + 1):
        power = power @ skew
        total = total + (1 if exponent == last > 1 else 2) * power
    return total
