"""Baking: each weight of a MODEL, CLIP or VAE with all that is on it, as the host puts it there when it loads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import comfy.float
import comfy.lora
import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import get_key_weight
from torch import Tensor

from ...lora_ops.errors import ShapeError, TargetError
from . import live
from .inspecting import others
from .patching import LandedPatch

HOSTS = ("manual_cast_dtype (dtype)",)  # by which the host itself sets the dtype that a CLIP computes in
CHUNK = 64 << 20  # bytes of an unchanged weight that are cast at a time


@dataclass(frozen=True, eq=False)
class Weight:
    """A tensor of a model without its patches, and the patches on it."""

    key: str
    base: Tensor
    patches: tuple[Any, ...]
    device: torch.device  # where the host computes it

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


def _held(wide: Tensor, rounded: Tensor, key: str) -> Tensor:
    """Raises ShapeError where a finite number has become none."""
    if rounded.dtype != wide.dtype and rounded.is_floating_point():
        lost = ~rounded.float().isfinite() & wide.to("cpu").float().isfinite()
        if lost.any():
            raise ShapeError(f"is too large for {rounded.dtype}.", module=key, remedy="Choose a wider dtype.")
    return rounded


def weights(patcher: Any, prefix: str = "") -> dict[str, Weight]:
    """The tensors below a prefix, each with all patches that are on it; those that run live come after the others.

    Raises TargetError for what has no one value to write.
    """
    patches = {key: tuple(there) for key, there in patcher.patches.items()}
    if attached := live.bakeable(patcher):
        for key, pieces in attached.pieces.items():
            patch = LandedPatch.of(pieces, attached.rows)
            patches[key] = (*patches.get(key, ()), (1.0, patch, 1.0, None, None))
    found = {}
    for key, tensor in patcher.model_state_dict(prefix or None).items():
        there = patches.get(key, ())
        if there:
            tensor, quantised, _ = get_key_weight(patcher.model, key)
            if quantised is not None or type(tensor) not in (torch.nn.Parameter, torch.Tensor):
                raise TargetError(
                    f"is stored as {type(tensor).__name__} and has patches on it, which this version cannot write.",
                    module=key,
                    remedy="Load the model in another weight_dtype, or use a base that is not quantised.",
                )
        found[key] = Weight(key, _unpatched(patcher, key, tensor), there, patcher.load_device)
    return found


def _unpatched(patcher: Any, key: str, tensor: Tensor) -> Tensor:
    """What the host holds back for a weight that it has patched in place, else the weight."""
    if key in patcher.hook_backup:
        return patcher.hook_backup[key][0].detach()
    if key in patcher.backup:
        return patcher.backup[key].weight.detach()
    return patcher.backup_buffers.get(key, tensor).detach()


def unbaked(patcher: Any) -> list[str]:
    """What other nodes put on a MODEL or CLIP that is in no weight, so that no file can hold it: for people."""
    found = {kind: [name for name in names if name not in HOSTS] for kind, names in others(patcher).items()}
    return [f"{kind}: {', '.join(names)}" for kind, names in found.items() if names and kind != "attachments"]
