"""How the host stores a weight: its floats, and back by its own rules for rounding and scales."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import comfy.float
import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import get_key_weight
from torch import Tensor

from ...lora_ops.errors import AdapterError, TargetError
from ...lora_ops.landing import Piece, add_, of_rows
from ...lora_ops.lora import Band
from ...lora_ops.survival import Survival, measured, predicted

PLAIN = (torch.nn.Parameter, torch.Tensor)
LAYERS = 4  # that stand for all in a prediction
SAMPLE = 256  # rows that stand for all of a weight in fp16 or bf16: its loss is small and even
WINDOWS, ROWS = 64, 8  # of a layer, evenly over its rows


class Stored(NamedTuple):
    """A changed weight as the host stores it, and how much of the change that holds; None in float32, which holds
    all."""

    weight: Tensor
    survival: Survival | None


def put(total: Tensor, pieces: Iterable[tuple[Any, ...]], strength: float = 1.0) -> None:
    """Put packed pieces on a weight in place. On a weight in half precision factors come in float32: a rounded
    magnitude would be a systematic error."""
    wide = torch.float32 if total.dtype.itemsize < 4 else None

    def move(tensor: Tensor) -> Tensor:
        dtype = wide or tensor.dtype
        if tensor.device == total.device and tensor.dtype == dtype:
            return tensor
        return comfy.model_management.cast_to_device(tensor, total.device, dtype)

    add_(total, [Piece.unpacked(each, move) for each in pieces], strength)


def stored(model: Any, key: str, weight: Tensor, pieces: Sequence[Piece], device: torch.device) -> Stored:
    """A weight of a model with pieces, computed on a device in float32, rounded once to how it is stored.

    Raises TargetError for a weight that the host has no rule to store.
    """
    if not weight.is_floating_point() or (type(weight) not in PLAIN and get_key_weight(model, key)[1] is None):
        kind = type(weight).__name__ if type(weight) not in PLAIN else str(weight.dtype).removeprefix("torch.")
        what = f"is stored as {kind}, which nothing can be merged into."
        raise TargetError(what, module=key, remedy="Use mode live, or a model in bf16.")
    wide = weight.dtype if weight.dtype.itemsize > 4 else torch.float32
    wanted = floats(model, key, weight, device, wide)
    every = max(1, len(weight) // SAMPLE) if type(weight) in PLAIN and weight.dtype.itemsize == 2 else 1
    base = wanted[::every].clone()
    put(wanted, [each.packed() for each in pieces])
    found = rounded(model, key, wanted.clone() if type(weight) not in PLAIN else wanted, weight.dtype)
    if type(weight) in PLAIN and weight.dtype.itemsize >= 4:
        return Stored(found, None)
    there = floats(model, key, found if every == 1 else found[::every], device, wide)
    survival = measured(base, wanted[::every], there)
    return Stored(found, Survival(*(each * len(weight) / len(base) for each in survival)))


def floats(model: Any, key: str, weight: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The values of a weight of a model, in memory of their own."""
    cast = comfy.model_management.cast_to_device(weight, device, dtype, copy=True)
    convert = get_key_weight(model, key)[2]
    return cast if convert is None else convert(cast, inplace=True)


def rounded(model: Any, key: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values as the host stores that weight of a model: by its module's own rule, which may write to them, else rounded
    to a dtype."""
    set_func, seed = get_key_weight(model, key)[1], comfy.utils.string_to_seed(key)
    if set_func is not None:
        return set_func(values, inplace_update=False, seed=seed, return_weight=True)
    return comfy.float.stochastic_rounding(values, dtype, seed=seed)


def foreseen(model: Any, pieces: Mapping[str, Sequence[Piece]], coarse: Sequence[str]) -> Mapping[str, Survival]:
    """The survival to expect of some of these weights, which are stored coarsely: a sample of layers, and of their
    rows where they are plain float8. Where a layout has scales, its layers are stored as a trial."""
    found: dict[str, Survival] = {}
    for key in _evenly(sorted(coarse), LAYERS):
        weight = comfy.utils.get_attr(model, key)
        if type(weight) in PLAIN and weight.is_floating_point():
            found[key] = _of_rows(weight, pieces[key])
        elif get_key_weight(model, key)[1] is not None:
            survival = stored(model, key, weight, pieces[key], weight.device).survival
            assert survival is not None
            found[key] = survival
    return found


def _evenly(keys: Sequence[str], count: int) -> Iterator[str]:
    step = max(1, -(-len(keys) // count))
    yield from keys[step // 2 :: step]


def _of_rows(weight: Tensor, pieces: Sequence[Piece]) -> Survival:
    found = Survival()
    starts = torch.linspace(0, max(0, len(weight) - ROWS), WINDOWS).long().tolist()
    for start in sorted(set(starts)):
        window = Band(start, min(ROWS, len(weight) - start))
        try:
            cut = of_rows(pieces, start, window.length)
        except AdapterError:  # a whole weight at once, or not at all
            window, cut = Band(0, len(weight)), pieces
        base = weight.detach().narrow(0, window.start, window.length).float()
        wanted = base.clone()
        put(wanted, [each.packed() for each in cut])
        found = found.and_of(predicted(base, wanted, weight.dtype))
        if window.length == len(weight):
            break
    return found
