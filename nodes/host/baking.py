"""Baking: each weight of a MODEL, CLIP or VAE with all that is on it, as the host puts it there when it loads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import comfy.float
import comfy.lora
import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import get_key_weight
from comfy.quant_ops import QuantizedTensor
from torch import Tensor

from ...lora_ops.errors import ShapeError, TargetError
from . import live, storing
from .inspecting import others
from .patching import LandedPatch
from .tree import Base

HOSTS = ("manual_cast_dtype (dtype)",)  # by which the host itself sets the dtype that a CLIP computes in
CHUNK = 64 << 20  # bytes of an unchanged weight that are cast at a time


@dataclass(frozen=True, eq=False)
class Weight:
    """A tensor of a model without its patches, and the patches on it."""

    key: str
    base: Tensor
    patches: tuple[Any, ...]
    device: torch.device  # where the host computes it
    loaded: Tensor | None = None  # the host's own with the same patches, where the model is loaded with them

    @property
    def before(self) -> int:
        """Bytes of another weight that are gone through to make this one."""
        return 0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(comfy.lora.calculate_shape(self.patches, self.base, self.key))

    def chunks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The weight as it is written, in blocks of its rows on the CPU."""
        if self.patches or self.base.ndim == 0:
            yield self.rounded(dtype)
        else:
            rows = max(1, CHUNK // max(1, self.base[:1].numel() * 4))
            for block in self.base.split(rows):
                yield _held(block, block.to("cpu", dtype), self.key)

    def rounded(self, dtype: torch.dtype) -> Tensor:
        """The weight with its patches, computed as the host does and rounded once, on the CPU."""
        if not self.patches:
            return _held(self.base, self.base.to("cpu", dtype), self.key)
        computing = comfy.model_management.lora_compute_dtype(self.device)
        weight = comfy.model_management.cast_to_device(self.base, self.device, computing, copy=True)
        weight = comfy.lora.calculate_weight(self.patches, weight, self.key)
        if dtype == self.base.dtype:
            seed = comfy.utils.string_to_seed(self.key)
            rounded = comfy.float.stochastic_rounding(weight, dtype, seed=seed)  # of fp8 only
        else:
            rounded = weight.to(dtype)
        return _held(weight, rounded.to("cpu"), self.key)


@dataclass(frozen=True, eq=False)
class Quantised(Weight):
    """A weight that the host stores quantised, in several tensors; it is written as floats."""

    model: Any = field(kw_only=True)
    # What was made of it with its patches: single numbers, which a file holds long before the weight; and, shared by
    # all weights of the model, the last one whole.
    numbers: dict[str, Tensor] = field(default_factory=dict)
    last: dict[str, Tensor] = field(default_factory=dict)

    def chunks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        yield self.rounded(dtype)

    def rounded(self, dtype: torch.dtype) -> Tensor:
        values = self.floats()
        return _held(values, values.to("cpu", dtype), self.key)

    def floats(self) -> Tensor:
        computing = comfy.model_management.lora_compute_dtype(self.device) if self.patches else torch.float32
        values = storing.floats(self.model, self.key, self.base, self.device, computing)
        return comfy.lora.calculate_weight(self.patches, values, self.key) if self.patches else values

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Those that it is stored in, without the patches."""
        return _tensors(self.base, self.key)

    def requantised(self, name: str) -> Tensor | None:
        """One of the same with the patches, by the host's own rule for its scales."""
        known = {**self.numbers, **self.last}
        if name not in known:
            known = _tensors(storing.rounded(self.model, self.key, self.floats(), self.base.dtype), self.key)
            self.last.clear()
            self.last.update(known)
            self.numbers.update({each: tensor for each, tensor in known.items() if tensor.numel() == 1})
        return known.get(name)


@dataclass(frozen=True, eq=False)
class Stored(Weight):
    """One of the tensors that a quantised weight is stored in."""

    whole: Quantised = field(kw_only=True)

    @property
    def before(self) -> int:
        found = self.whole.tensors.values() if self.patches and self.base.numel() == 1 else ()
        return sum(tensor.nbytes for tensor in found)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    def chunks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        yield self.rounded(dtype)

    def rounded(self, dtype: torch.dtype) -> Tensor:
        """Raises TargetError where the host's rule makes another kind of scale than the weight has."""
        found = self.whole.requantised(self.key) if self.patches else self.base
        if found is None or found.numel() != self.base.numel() or not found.dtype == self.base.dtype == dtype:
            kind = "nothing" if found is None else f"{tuple(found.shape)} of {found.dtype}"
            what = f"would be stored as {kind}: not as its file has it."
            raise TargetError(what, module=self.key, remedy="Choose dtype_model bf16.")
        return found.to("cpu").reshape(self.shape)


def _tensors(weight: Any, key: str) -> dict[str, Tensor]:
    """The tensors of a quantised weight, as the host's loader takes them: exponents alone as bytes."""
    bare = torch.float8_e8m0fnu
    return {
        name: tensor.detach().view(torch.uint8) if tensor.dtype == bare else tensor.detach()
        for name, tensor in weight.state_dict(key).items()
    }


def _held(wide: Tensor, rounded: Tensor, key: str) -> Tensor:
    """Raises ShapeError where a finite number has become none."""
    if rounded.dtype != wide.dtype and rounded.is_floating_point():
        lost = ~rounded.float().isfinite() & wide.to("cpu").float().isfinite()
        if lost.any():
            raise ShapeError(f"is too large for {rounded.dtype}.", module=key, remedy="Choose a wider dtype.")
    return rounded


def weights(patcher: Any, prefix: str = "", *, dequantised: bool = False) -> dict[str, Weight]:
    """The tensors below a prefix, each with all patches that are on it; those that run live come after the others.

    A quantised weight is as many tensors as it is stored in, or (dequantised) one of floats.
    Raises TargetError for what has no one value to write.
    """
    patches = {key: tuple(there) for key, there in patcher.patches.items()}
    same = patcher.model.current_weight_patches_uuid == patcher.patches_uuid
    sampled = patcher.backup.keys() - patcher.hook_backup.keys() if same else frozenset()
    if attached := live.bakeable(patcher):
        for key, pieces in attached.pieces.items():
            patch = LandedPatch.of(pieces, attached.rows)
            patches[key] = (*patches.get(key, ()), (1.0, patch, 1.0, None, None))
        sampled -= attached.pieces.keys()
    base, quantised, last = Base.of(patcher), dict[str, Quantised](), dict[str, Tensor]()

    def unpatched(key: str, tensor: Tensor) -> Tensor:
        held = base.held(key)
        return (tensor if held is None else held).detach()

    for name, module in patcher.model.named_modules():
        key, weight = f"{name}.weight", getattr(module, "weight", None)
        if isinstance(weight, QuantizedTensor) and key.startswith(prefix):
            there = patches.get(key, ())
            unchanged = unpatched(key, cast(Tensor, weight))
            quantised[key] = Quantised(key, unchanged, there, patcher.load_device, model=patcher.model, last=last)
    found: dict[str, Weight] = {}
    for key, tensor in patcher.model_state_dict(prefix or None).items():
        there = () if key in quantised else patches.get(key, ())
        if there:
            tensor = get_key_weight(patcher.model, key)[0]
            _require_rule(type(tensor) in storing.PLAIN, key, tensor)
        loaded = tensor.detach() if key in sampled else None
        found[key] = Weight(key, unpatched(key, tensor), there, patcher.load_device, loaded)
    for key, weight in quantised.items():
        _require_rule(not weight.patches or get_key_weight(patcher.model, key)[1] is not None, key, weight.base)
        if dequantised:
            found = _with_floats(found, weight)
        else:
            found |= {
                name: Stored(name, tensor, weight.patches, weight.device, whole=weight)
                for name, tensor in weight.tensors.items()
            }
    return found


def _require_rule(known: bool, key: str, weight: Tensor) -> None:
    if not known:
        what = f"is stored as {type(weight).__name__} and has patches on it, which this version cannot write."
        remedy = "Load the model in another weight_dtype, or use a base that is not quantised."
        raise TargetError(what, module=key, remedy=remedy)


def _with_floats(found: Mapping[str, Weight], weight: Quantised) -> dict[str, Weight]:
    """Without what says how a weight is quantised, and with the weight in its place."""
    module = weight.key.removesuffix("weight")
    if f"{module}pre_quant_scale" in found:
        what = "has a scale for its inputs, which the host reads for quantised weights only."
        raise TargetError(what, module=weight.key, remedy="Choose dtype keep.")
    gone = {*weight.tensors, f"{module}comfy_quant", f"{module}input_scale"}
    return {**{key: each for key, each in found.items() if key not in gone}, weight.key: weight}


def unbaked(patcher: Any) -> list[str]:
    """What other nodes put on a MODEL or CLIP that is in no weight, so that no file can hold it: for people."""
    found = {kind: [name for name in names if name not in HOSTS] for kind, names in others(patcher).items()}
    return [f"{kind}: {', '.join(names)}" for kind, names in found.items() if names and kind != "attachments"]
