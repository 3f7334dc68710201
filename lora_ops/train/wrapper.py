"""The additive wrapper: y = f(x) + ΔW(x) around modules of a model that is already loaded; no weight of it is touched.

An adapter trains as what it is, the value that is read, landed and written, with parameters for its tensors. All of the
model's linear maps run frozen while the wrapper is in, so that nothing of the base is kept for the backward pass; what
else of the model was made in inference mode (norms, tables) is put aside for copies that autograd takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..adapters import Adapter, Additive, DoRA, LowRank, Transform
from ..adapters.base import Product
from ..errors import AdapterError, TargetError
from ..live.modules import CONVOLUTION, Kind, Link, kind_of
from .frozen import Cast, Forward, WeightOf, frozen, is_map, stored_weight
from .places import Place
from .randomness import generator

A = TypeVar("A", bound=Adapter)


class Draw(NamedTuple):
    """What dropout depends on: the same draw gives the same masks, also where a block is computed again."""

    seed: int
    step: int
    batch: int


class Wrapper:
    """The maps of a model while adapters train on it.

    modules are all of the model's, by their names in its state dict. taken_off are the adapters whose change is taken
    off again, so that one which begins at something begins at nothing. In and out by install and remove, which leaves
    the model as it was.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        adapters: Mapping[Place, Adapter],
        *,
        taken_off: Mapping[Place, Adapter] | None = None,
        dropout: float = 0.0,
        weight_of: WeightOf = stored_weight,
    ) -> None:
        self.draw: Draw | None = None  # None: nothing is dropped
        self.active = True
        self.dropout = dropout
        there: dict[str, list[Trained]] = {}
        for place, adapter in adapters.items():
            each = Trained(place, adapter, (taken_off or {}).get(place))
            there.setdefault(place.target.key, []).append(each)
        self.trained = tuple(each for found in there.values() for each in found)
        self._modules = tuple(modules.values())
        self._hooks = [
            Hook(self, module, name, there.pop(f"{name}.weight", ()), weight_of)
            for name, module in modules.items()
            if is_map(module)
        ]
        for key in there:
            raise TargetError("is of no linear map or convolution, and cannot be trained.", module=key)
        self._aside: list[tuple[dict[str, Any], str, Any]] = []

    def make_casts(self, dtype: torch.dtype, stays: Callable[[nn.Module], bool] = lambda _: True) -> None:
        """From here on to drop_casts, maps use copies of their weights as they are now where autocast asks for this
        type of them. stays tells of modules whose weight stays the same from call to call."""
        for hook in self._hooks:
            hook.cast = Cast.of(hook.module, dtype, hook.weight_of) if stays(hook.module) else None

    def drop_casts(self) -> None:
        for hook in self._hooks:
            hook.cast = None

    @property
    def casts(self) -> int:
        """Bytes of the copies that there are."""
        return sum(hook.cast.weight.nbytes for hook in self._hooks if hook.cast is not None)

    def parameters(self) -> dict[str, nn.Parameter]:
        """What trains: module.factor -> parameter."""
        return {f"{each.place.module}.{name}": p for each in self.trained for name, p in each.parameters.items()}

    def now(self) -> dict[str, Adapter]:
        """What has been trained until now, by module, in tensors of its own on the CPU."""
        return {each.place.module: each.now() for each in self.trained}

    def install(self) -> None:
        """Raises TargetError, with nothing left behind, where another's hook runs inside: its gradient is not known."""
        try:
            for hook in self._hooks:
                hook.install()
            for module in self._modules:
                # A map keeps no weight, and what is looked up in a table is a tensor of its own.
                copied = not (is_map(module) or isinstance(module, nn.Embedding))
                self._put_aside(module._parameters, copied)
                self._put_aside(module._buffers, copied)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        for hook in reversed(self._hooks):
            hook.remove()
        for owner, name, original in reversed(self._aside):
            owner[name] = original
        self._aside.clear()

    def _put_aside(self, owner: dict[str, Any], copied: bool) -> None:
        """What autograd does not take, and what asks for gradients of its own, as older hosts leave weights."""
        for name, tensor in owner.items():
            if tensor is None or not (tensor.requires_grad or (tensor.is_inference() and copied)):
                continue
            self._aside.append((owner, name, tensor))
            with torch.inference_mode(False):
                held = tensor.detach().clone() if tensor.is_inference() and copied else tensor.detach()
                owner[name] = nn.Parameter(held, requires_grad=False) if isinstance(tensor, nn.Parameter) else held

    @contextmanager
    def base_only(self) -> Iterator[None]:
        """The base model's own output."""
        self.active = False
        try:
            yield
        finally:
            self.active = True


class Trained:
    """An adapter with float32 parameters for its tensors, at its place."""

    def __init__(self, place: Place, adapter: Adapter, taken_off: Adapter | None) -> None:
        self.place = place
        self.parameters: dict[str, nn.Parameter] = {}
        with torch.inference_mode(False):
            self.adapter = _mapped(adapter, self._parameter)
            self.taken_off = None if taken_off is None else _mapped(taken_off, lambda _, tensor: _own(tensor))

    def _parameter(self, name: str, tensor: Tensor) -> nn.Parameter:
        self.parameters[name] = nn.Parameter(_own(tensor))
        return self.parameters[name]

    def now(self) -> Adapter:
        now, before = (
            each and _mapped(each, lambda _, tensor: tensor.detach().cpu().clone())
            for each in (self.adapter, self.taken_off)
        )
        assert now is not None
        return now if before is None else difference(now, before)

    def factors_taken_off(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        if self.taken_off is not None:
            _mapped(self.taken_off, lambda name, tensor: found.setdefault(name, tensor))
        return found

    def to(self, device: torch.device) -> None:
        """In place, so that an optimizer keeps its parameters."""
        for parameter in self.parameters.values():
            parameter.data = parameter.data.to(device)
        if self.taken_off is not None:
            self.taken_off = _mapped(self.taken_off, lambda _, tensor: tensor.to(device))


def _own(tensor: Tensor) -> Tensor:
    """A copy in float32, laid out as a state's tensors are read in: in another order sums round otherwise."""
    return tensor.detach().float().clone(memory_format=torch.contiguous_format)


def _mapped(adapter: A, change: Callable[[str, Tensor], Tensor], prefix: str = "") -> A:
    """The adapter with each of its tensors changed; an adapter inside it, too."""
    values: dict[str, Any] = {}
    for each in fields(adapter):  # pyright: ignore[reportArgumentType]  all adapters are dataclasses
        value = getattr(adapter, each.name)
        if isinstance(value, Tensor):
            values[each.name] = change(prefix + each.name, value)
        elif isinstance(value, Adapter):
            values[each.name] = _mapped(value, change, f"{prefix}{each.name}.")
    return replace(adapter, **values)  # pyright: ignore[reportArgumentType]


def parts(one: Adapter, other: Adapter) -> tuple[LowRank, LowRank]:
    """Two whose sum is one without other, each exactly nothing where they are equal: B₀(A − A₀) + (B − B₀)A."""
    one, other = _require_pair(one, other)
    return replace(one, up=other.up, down=one.down - other.down), replace(one, up=one.up - other.up)


def difference(one: Adapter, other: Adapter) -> LowRank:
    """The LoRA that is one without other, of the rank of both: [B −B₀] · [A; A₀]."""
    one, other = _require_pair(one, other)
    alpha = one.scale * (one.rank + other.rank)
    return LowRank(torch.cat([one.up, -other.up], dim=1), torch.cat([one.down, other.down]), alpha)


def _require_pair(one: Adapter, other: Adapter) -> tuple[LowRank, LowRank]:
    if not isinstance(one, LowRank) or not isinstance(other, LowRank) or one.scale != other.scale:
        raise AdapterError(f"is {one.ALGEBRA}, which cannot take off {other.ALGEBRA}")
    if one.mid is not None or other.mid is not None or one.rank != other.rank:
        raise AdapterError("has a Tucker core or another rank than what should be taken off")
    return one, other


class Hook:
    """One linear map: it runs frozen, and what trains on its rows is added."""

    def __init__(
        self, wrapper: Wrapper, module: nn.Module, name: str, trained: Sequence[Trained], weight_of: WeightOf
    ) -> None:
        self.module = module
        self._wrapper, self._name, self.weight_of = wrapper, name, weight_of
        self._trained = sorted(trained, key=lambda each: each.place.target.rows.start)
        self._turns: list[Turn] = []
        self.cast: Cast | None = None
        if trained:
            try:
                self._kind = kind_of(module, name)
            except TargetError as error:
                what = error.what.replace("run live", "be trained")
                raise TargetError(what, module=name, remedy="Choose other places.") from error

    def install(self) -> None:
        if not any(turn.active for turn in self._turns):
            self.remove()  # what another's hook kept from going
            inside = self.module.forward
            if getattr(inside, "__func__", None) is not type(self.module).forward:
                what = "runs with another extension's change inside, whose gradient is not known."
                raise TargetError(what, module=self._name, remedy="Train on the model before that node.")
            self._turns.append(Turn(self))  # pyright: ignore[reportArgumentType]

    def remove(self) -> None:
        self._turns = [turn for turn in reversed(self._turns) if not turn.end()][::-1]

    def alone(self, forward: Forward, x: Tensor) -> Tensor:
        return frozen(self.module, forward, x, self.weight_of, self.cast)

    def ran(self, forward: Forward, x: Tensor) -> Tensor:
        """The map itself runs last, unless something looks at what it gives: where a block is computed again, that
        stops before its last map."""
        there = self._trained if self._wrapper.active else []
        first = not there or any(isinstance(each.adapter, DoRA) for each in there)
        y = self.alone(forward, x) if first else None
        updates = [self._update(each, x, y) for each in there]
        if y is None:
            y = self.alone(forward, x)
        if not there:
            return y
        if there[0].place.target.band is None:
            return y + updates[0].to(y.dtype)
        sizes: list[int] = []  # of the rows that train and of those between, in turns
        for each in there:
            rows = each.place.target.rows
            sizes += [rows.start - sum(sizes), rows.length]
        axis = self._kind.axis
        parts = list(y.split([*sizes, y.shape[axis] - sum(sizes)], axis))
        for number, update in enumerate(updates):
            parts[2 * number + 1] = parts[2 * number + 1] + update.to(y.dtype)
        return torch.cat(parts, axis)

    def _update(self, each: Trained, x: Tensor, y: Tensor | None) -> Tensor:
        """What is added to the output of its rows. y is the map's output, where it is there."""
        rows = each.place.target.rows
        y = None if y is None else y.narrow(self._kind.axis, rows.start, rows.length)
        place = _Place(self._kind, each, lambda like: self._rows(each, like), self._wrapper)
        if each.taken_off is None:
            return place.update(each.adapter, x, y)
        first, second = parts(each.adapter, each.taken_off)
        return place.update(first, x, y) + place.update(second, x, y)

    def _rows(self, each: Trained, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """The weight of an adapter's rows, and their bias."""
        weight, bias = self.weight_of(self.module, like)
        rows = each.place.target.rows
        return weight.narrow(0, rows.start, rows.length), None if bias is None else bias.narrow(
            0, rows.start, rows.length
        )


class Turn(Link):
    """One turn of a hook in its module's chain of forwards, innermost."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        if not self.active or args or kwargs:  # with more than its input it is no plain map
            return self.below(x, *args, **kwargs)
        hook: Any = self.hook
        return hook.ran(self.below, x)

    def bare(self, x: Tensor) -> Tensor:
        """For what looks at the module's own output while something trains on it: with its gradient."""
        hook: Any = self.hook
        return hook.alone(super().bare, x)


class _Place(NamedTuple):
    """What an update needs to know of where it is."""

    kind: Kind
    trained: Trained
    rows: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    wrapper: Wrapper

    def update(self, adapter: Adapter, x: Tensor, y: Tensor | None) -> Tensor:
        if isinstance(adapter, Additive):
            return self._additive(adapter, self._dropped(x))
        weight, bias = self.rows(self._magnitude(adapter) if isinstance(adapter, DoRA) else x.new_empty(0))
        if isinstance(adapter, DoRA):
            assert y is not None
            return self._dora(adapter, weight, bias, x, y)
        assert isinstance(adapter, Transform)
        weight = weight.clone() if weight.is_inference() else weight
        return self.kind.run(x, adapter.changed(weight) - weight)

    def _additive(self, adapter: Additive, x: Tensor) -> Tensor:
        product, shape = adapter.product(), self.trained.place.target.delta_shape
        if product is None:
            return self.kind.run(x, adapter.delta(shape).to(x.dtype))
        down, up, left = (None if factor is None else factor.to(x.dtype) for factor in product)
        assert down is not None
        kernel = self.kind.shape[2:]
        return _through(self.kind, x, Product(down.reshape(len(down), -1, *kernel), up, left), adapter.scale)

    def _dora(self, adapter: DoRA, weight: Tensor, bias: Tensor | None, x: Tensor, y: Tensor) -> Tensor:
        """PEFT's: the norm takes no gradient (section 4.3 of the paper), dropout is inside."""
        if adapter.of_inputs:
            raise AdapterError("is DoRA with a magnitude per input, which cannot be trained.")
        with torch.no_grad():
            total = weight.clone()
            adapter.inner.add_(total, 1.0)
            norm = torch.linalg.vector_norm(total.flatten(1), dim=1)
        ones = [1] * (y.ndim - 2 if self.kind.axis == 1 else 0)
        gain = (self._magnitude(adapter) / norm).to(y.dtype).reshape(-1, *ones)
        own = y if bias is None else y - bias.to(y.dtype).reshape(-1, *ones)
        return (gain - 1) * own + gain * self._additive(adapter.inner, self._dropped(x))

    @staticmethod
    def _magnitude(adapter: DoRA) -> Tensor:
        return adapter.magnitude

    def _dropped(self, x: Tensor) -> Tensor:
        draw, rate = self.wrapper.draw, self.wrapper.dropout
        if not rate or draw is None:
            return x
        masks = generator(draw.seed, "dropout", draw.step, draw.batch, self.trained.place.module, device=x.device)
        kept = torch.rand(x.shape, generator=masks, device=x.device) >= rate
        return x * (kept.to(x.dtype) / (1 - rate))


def _through(kind: Kind, x: Tensor, product: Product, scale: float) -> Tensor:
    """scale · left ⊗ (up · down) for an input."""
    down, up, left = product
    outer, ones = None, [1] * (x.ndim - 2 if kind.axis == 1 else 0)
    if left is not None:  # the inputs are outer ones of inner ones; what is inside sees the outer as a batch
        outer = left.shape[1]
        x = x.unflatten(kind.axis, (outer, -1))
        x = x.flatten(0, 1) if kind.axis == 1 else x
    y = kind.run(x, down)
    y = y if scale == 1 else y * scale
    if up is not None:
        y = CONVOLUTION[len(ones)](y, up.reshape(*up.shape, *ones)) if ones else functional.linear(y, up)
    if left is None:
        return y
    if kind.axis == 1:
        y = y.unflatten(0, (-1, outer))  # (batch, outer in, inner out, place…)
        return torch.einsum("oi,bi...->bo...", left, y).flatten(1, 2)
    return torch.matmul(left, y).flatten(-2)
