"""What every adapter can do, whatever its algebra."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from .. import algebra
from ..errors import AdapterError, ShapeError


class Adapter(ABC):
    """The change one LoRA makes to one weight: named factors and what becomes of the weight.

    Adapters are values: none of their tensors is ever written to. What becomes of a weight that others have changed is
    the law of the two kinds below: an Additive adds the same to any weight, a Transform looks at the weight in hand.
    """

    ALGEBRA: ClassVar[str]  # its name in receipts
    REQUIRED: ClassVar[frozenset[str]]  # factors without which there is no adapter
    OPTIONAL: ClassVar[frozenset[str]]

    alpha: float | None  # as stored; None where the file says nothing

    @property
    @abstractmethod
    def rank(self) -> int:
        """What alpha is divided by: the inner dimension of the factors, the trainers' `dim`."""

    @property
    def with_bias(self) -> bool:
        """Whether it is of the bias beside the weight, too, where there is one."""
        return False

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied with before the user's strength: alpha / rank.

        1 where a file names no alpha, as in diffusers and ComfyUI; an alpha of 0 means "alpha = rank" to the trainers
        that write it (kohya, LyCORIS).
        """
        return 1.0 if not self.alpha else self.alpha / self.rank

    @classmethod
    def build(cls, factors: Mapping[str, Tensor]) -> Adapter:
        """From factors by name. Raises ShapeError or AdapterError if they do not fit each other."""
        raise AdapterError(f"is {cls.ALGEBRA}, which no factors make alone")

    def factors(self, shape: tuple[int, ...]) -> Mapping[str, Tensor]:
        """What build makes it of, as trainers write it for a weight (or band) of this shape; alpha only where that is
        no scale. Raises AdapterError where there is no such thing."""
        raise AdapterError(f"is {self.ALGEBRA}, which no file can say as it is here")

    @abstractmethod
    def require_fit(self, shape: tuple[int, ...]) -> None:
        """Raises ShapeError unless the adapter fits a weight (or band) of this shape; multiplies nothing."""

    @abstractmethod
    def add_(self, rows: Tensor, strength: float) -> None:
        """Change a weight (or band) in place: not at all at strength 0, wholly at 1, else on the line through both."""

    @classmethod
    def add_all_(cls, rows: Tensor, terms: Sequence[tuple[Self, float]]) -> None:
        """add_ for each of the terms (adapter, strength), all of this algebra, in order."""
        for adapter, strength in terms:
            adapter.add_(rows, strength)

    @abstractmethod
    def packed(self) -> tuple[Any, ...]:
        """The adapter as tensors, numbers and classes, in tuples: what movers of tensors can walk."""

    @classmethod
    def unpacked(cls, packed: tuple[Any, ...]) -> Self:
        """The inverse of packed."""
        return cls(*packed)

    @abstractmethod
    def energy(self) -> float | None:
        """‖ΔW‖² at strength 1 (Frobenius); None where only the weight could tell."""

    @property
    @abstractmethod
    def idle(self) -> bool:
        """True where nothing changes: an untrained module, or the zero tail of an interrupted download."""

    @property
    @abstractmethod
    def swapped(self) -> Self:
        """The adapter for a weight whose two halves of rows are exchanged; the same object every time.

        Raises AdapterError where the factors do not split by rows.
        """

    def narrowed(self, start: int, length: int) -> Self:
        """The adapter that does to these rows what this one does to them; the same object every time.

        Raises AdapterError where the factors do not split by rows.
        """
        raise AdapterError(f"is {self.ALGEBRA}, which cannot be cut", remedy="Select whole weights.")

    def scaled(self, rows: Tensor) -> Mapping[str, Tensor]:
        """The factors, by name, that make row r of the delta rows[r] (float64; one number: every row) times as large.

        In their own dtype where that is exact, else rounded once to float32. Raises AdapterError where there are none.
        """
        raise AdapterError(
            f"is {self.ALGEBRA}, which cannot be scaled",
            remedy="Set strength and blocks where it is applied: in LoRA Stack or Apply LoRA.",
        )


class Additive(Adapter):
    """An adapter that adds the same ΔW to any weight: the order of such does not matter."""

    @abstractmethod
    def delta(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """ΔW at strength 1 for a weight (or band) of this shape, computed in dtype."""

    def add_(self, rows: Tensor, strength: float) -> None:
        rows += strength * self.delta(tuple(rows.shape), rows.dtype)

    def product(self) -> Product | None:
        """ΔW / scale in factors that an input can go through one by one; None where only the whole ΔW serves."""
        return None


class Transform(Adapter):
    """An adapter whose change depends on the weight in hand, with all that came before it in the stack."""

    @abstractmethod
    def changed(self, weight: Tensor) -> Tensor:
        """What a weight (or band) becomes at strength 1: a tensor of its own, computed in the weight's dtype."""

    def add_(self, rows: Tensor, strength: float) -> None:
        """W + strength · (W' - W), in float32 at least: norms and inverses need it."""
        weight = rows.to(torch.promote_types(rows.dtype, torch.float32))
        rows.copy_(torch.lerp(weight, self.changed(weight), strength))

    def energy(self) -> None:
        return None

    def turn(self, shape: tuple[int, ...]) -> Turn | None:
        """How it runs beside a weight of this shape (the number of rows may be -1); None where it cannot."""
        return None


@dataclass(frozen=True, eq=False)
class Turn:
    """A Transform that runs beside its weight: it turns what goes into W + inside, or what comes out of it.

    difference(v, *matrices) is v turned, less v itself, channels last. Its matrices, in float32, are constants;
    of_weight makes a last one from the rows in hand. beside is added after it, at the same strength.
    """

    of_inputs: bool
    difference: Callable[..., Tensor]
    matrices: tuple[Tensor, ...] = ()
    of_weight: Callable[[Tensor], Tensor] | None = None
    inside: Additive | None = None
    beside: Additive | None = None


def times(channels: Tensor, factors: Tensor) -> Tensor:
    """The difference of a Turn that gives each channel a factor of its own: factors less 1."""
    return channels * factors


Term = tuple[Adapter, float]  # an adapter and its strength


class Product(NamedTuple):
    """left ⊗ (up · down): down first, then up if there is one, then left if there is one."""

    down: Tensor  # (rank, in·kernel…)
    up: Tensor | None = None  # (out, rank)
    left: Tensor | None = None  # (outer out, outer in)


def named(adapter: Adapter, *names: str) -> Mapping[str, Tensor]:
    """Those fields of an adapter that are there."""
    return {name: tensor for name in names if (tensor := getattr(adapter, name)) is not None}


def require_matrices(factors: Mapping[str, Tensor]) -> None:
    """Raises AdapterError or ShapeError unless every factor but alpha is of a float type, and a matrix at least."""
    require_floats(factors)
    for name, factor in factors.items():
        if name != "alpha" and (factor.ndim < 2 or 0 in factor.shape):
            raise ShapeError(f"{name} has the shape {tuple(factor.shape)}, which is no matrix")


def require_shape(found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raises ShapeError unless an update of a shape fits a weight, however either keeps a kernel of ones."""
    weight = (*expected[:1], expected[1] if len(expected) > 1 else 1, *algebra.kernel(expected[2:]))
    update = (*found[:2], *algebra.kernel(found[2:]))
    if update != weight:
        raise ShapeError(f"makes an update of {found}, the weight has {expected}", found=found, expected=expected)


def require_floats(factors: Mapping[str, Tensor]) -> None:
    """Raises AdapterError for a factor, other than alpha, that is of no float type."""
    for name, factor in factors.items():
        if name != "alpha" and not factor.is_floating_point():
            raise AdapterError(f"{name} is {factor.dtype}, not a float type", remedy="Convert the file.")


def alpha_of(factors: Mapping[str, Tensor]) -> float | None:
    """The alpha among factors, None if there is none. Raises ShapeError if it is no single number."""
    tensor = factors.get("alpha")
    if tensor is None:
        return None
    if tensor.numel() != 1 or tensor.is_complex():
        raise ShapeError(f"alpha has the shape {tuple(tensor.shape)}, it should be one number")
    return float(tensor)
