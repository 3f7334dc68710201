"""Weights that a file holds in multiples of a scale, or packed: which of them are understood here.

Understood is fp8 with one float32 number for the whole weight, as the host writes it (`weight_scale`, its format in
`comfy_quant` or in the metadata) and as older files have it (`scale_weight`, with a tensor `scaled_fp8`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import AdapterError, shown
from ..files import Header, read_tensors

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
_MARKER = "scaled_fp8"  # a tensor that says that a file has scale_weight
FORMATS = "_quantization_metadata"  # in metadata, where comfy_quant is not beside the weights
_SCALES = ("weight_scale", "scale_weight")
_INPUTS = ("input_scale", "scale_input")  # of what a layer is given, not of its weight
_FORMAT = "comfy_quant"
NVFP4 = "nvfp4"
_OTHERS = ("weight_scale_2", "weight_scale_inv", "weight.absmax", "weight_s_rel", "SCB", "pre_quant_scale")
_BESIDE = (*_SCALES, *_INPUTS, _FORMAT, *_OTHERS)
# What the weights of a layer are packed as, by a tensor that only such a layer has: nothing tells their shapes.
_PACKED = {
    "weight_scale_2": NVFP4,
    "weight.absmax": "nf4 or fp4 of bitsandbytes",
    "weight_s_rel": "w4a8",
    "qweight": "int4 (GPTQ, AWQ or SVDQuant)",
}

REMEDY = "Use the checkpoint in bf16, fp16 or fp8, or mode live."
# of what ComfyUI stores itself, by its own rule for scales
BY_COMFYUI = "Load it in ComfyUI and save it with Save Checkpoint, or use the checkpoint in bf16, fp16 or fp8."

Where = Mapping[str, Header]  # a tensor -> its file, of all that belong together: a scale may be in another shard


class Scale(NamedTuple):
    """The tensor whose one number a weight is stored in multiples of, and what else speaks of that storage alone."""

    name: str
    others: tuple[str, ...]
    largest: float  # value that the host reads back: it takes all of scale_weight for e4m3


def beside(name: str) -> bool:
    """Whether a tensor is no weight but tells how one is stored."""
    return marks(name) or name.endswith(tuple(f".{each}" for each in _BESIDE))


def marks(name: str) -> bool:
    """Whether a tensor says that others have a scale_weight."""
    return name.rpartition(".")[2] == _MARKER


def scaled(name: str) -> bool:
    """Whether a tensor is the scale of a weight."""
    return name.endswith(tuple(f".{each}" for each in _SCALES))


def packed(header: Header) -> tuple[str, str] | None:
    """The first packed layer of a file and what it is packed as; None where there is none."""
    for name in header.entries:
        for suffix, what in _PACKED.items():
            if name.endswith(f".{suffix}"):
                return name.removesuffix(f".{suffix}"), what
    return None


def scale_of(where: Where, name: str) -> Scale | None:
    """The scale that a weight has, None for plain floats. Raises AdapterError for a weight that is stored otherwise."""
    entry = where[name].entries[name]
    module = name.removesuffix("weight") if name.endswith("weight") else f"{name}."
    there = [each for each in (*_SCALES, _FORMAT, *_OTHERS) if module + each in where]
    if entry.dtype in FLOATS and not there:
        return None
    scales = [each for each in there if each in _SCALES]
    if entry.dtype in FLOATS and entry.dtype.itemsize == 1 and len(scales) == 1 and not set(there) & set(_OTHERS):
        scale = where[module + scales[0]].entries[module + scales[0]]
        if scale.dtype == torch.float32 and math.prod(scale.shape) == 1:
            others = tuple(module + each for each in (_FORMAT, *_INPUTS) if module + each in where)
            known = entry.dtype if scales[0] == _SCALES[0] else torch.float8_e4m3fn
            largest = min(torch.finfo(entry.dtype).max, torch.finfo(known).max)
            return Scale(module + scales[0], others, largest)
    named = _format(where, module + _FORMAT)
    how = " with ".join([*([named] if named else []), str(entry.dtype).removeprefix("torch."), *there])
    remedy = BY_COMFYUI if named else REMEDY
    raise AdapterError(f"is stored as {how}, which nothing can be merged into.", module=name, remedy=remedy)


def number_of(where: Where, name: str) -> float:
    """What a weight's stored numbers are multiplied by; 1 for plain floats. Raises AdapterError like scale_of."""
    scale = scale_of(where, name)
    return 1.0 if scale is None else float(read(where, scale.name))


def read(where: Where, name: str) -> Tensor:
    [(_, found)] = read_tensors(where[name], [name])
    return found


def _format(where: Where, name: str) -> str:
    """What a comfy_quant says, "" for nothing."""
    try:
        return shown(json.loads(bytes(read(where, name).tolist()))["format"]) if name in where else ""
    except (ValueError, TypeError, LookupError, RecursionError):
        return ""
