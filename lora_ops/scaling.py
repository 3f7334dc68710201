"""Scaling: a strength and selectors multiplied into a LoRA's tensors, for whatever applies it later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import algebra
from .adapters import Adapter
from .dialects import published_map
from .errors import AdapterError, LoraOpsError, StackError, TargetError, shown
from .files import TensorFile
from .landing import guess, meant
from .lora import Lora, Target, TargetMap, from_file, split
from .select import Choice, Selector, choose, family_of
from .stack import PARTS


class Scaled(NamedTuple):
    """A LoRA's tensors, scaled, and how many modules each selector touched."""

    file: TensorFile
    chosen: tuple[int, ...]


def scaled(file: TensorFile, strength: float, selectors: Sequence[Selector], model: TargetMap | None) -> Scaled:
    """Every update multiplied with the strength and its selectors' factors; alpha stays as it is.

    Selectors need places: the model's, and its family's in the parts that are not connected; without a model those of
    the published model that the file is for.

    Raises StackError where neither is known. Where any factor is not 1, also TargetError for modules that have no place
    and AdapterError for one that cannot be scaled: nothing keeps its old strength quietly.
    """
    if strength == 1 and not selectors:
        return Scaled(file, ())
    lora = from_file(file)
    places, choice = _chosen(lora, selectors, model) if selectors else ({}, Choice({}, 0))
    if strength == 1 and choice.neutral:
        return Scaled(file, choice.counts(places.values()))
    if lora.leftover:
        module, reason, _ = lora.leftover[0]
        what = f"{reason}: it cannot be scaled, one of {len(lora.leftover)} that cannot."
        raise AdapterError(what, file=file.source, module=module, remedy="Set strengths where the LoRA is applied.")
    lost = [module for module in lora.modules if selectors and module not in places]
    if lost:
        what = f"{len(lost)} of {len(lora.modules)} modules are in no block of this model (first: {shown(lost[0])})."
        raise TargetError(what, file=lora.name, remedy="Connect the MODEL that the LoRA is for.")
    changed: dict[tuple[str, str], Tensor] = {}
    for module, adapter in lora.modules.items():
        try:
            factors = torch.full((1,), strength, dtype=torch.float64)
            if module in places:
                factors = factors * _factors(adapter, places[module], choice)
            if (factors != 1).any():
                changed |= {(module, name): tensor for name, tensor in adapter.scaled(factors).items()}
        except LoraOpsError as error:
            error.file, error.module = file.source, module
            raise
    tensors = {key: changed.get(split(key), tensor) for key, tensor in file.tensors.items()}
    return Scaled(TensorFile(file.source, tensors, file.metadata), choice.counts(places.values()))


def _chosen(lora: Lora, selectors: Sequence[Selector], model: TargetMap | None) -> tuple[Mapping[str, Target], Choice]:
    """Where each module belongs, and what the selectors choose there."""
    model = model or guess(lora)
    if model is None:
        what = "is for no model that this version knows, so no blocks can be chosen."
        raise StackError(what, file=lora.name, remedy="Connect the MODEL that it is for.")
    published = published_map(family_of(model))
    places: dict[str, Target] = {}
    for module, adapter in lora.modules.items():
        for targets, parts in ((model, model.parts), (published, {*PARTS} - model.parts)):
            named = meant(module, adapter, targets)
            if named and named.target.part in parts:
                places.setdefault(module, named.target)
    return places, choose(selectors, model)


def _factors(adapter: Adapter, target: Target, choice: Choice) -> Tensor:
    """A factor for each row of the update, or one for all."""
    first, *others = choice.of(target)
    if not others:
        return torch.tensor([first.factor], dtype=torch.float64)
    adapter.require_fit(target.delta_shape)
    rows = torch.cat([torch.full((band.length,), factor, dtype=torch.float64) for band, factor, _ in (first, *others)])
    return algebra.swap_halves(rows) if target.swap else rows
