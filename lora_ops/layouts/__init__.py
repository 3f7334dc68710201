"""Layouts: a LoRA written as the file that another program reads, its update unchanged to the bit.

To add a layout: add a line to `LAYOUTS` below. Its names are those of the dialect that is called like it; what it says
besides its tensors belongs in `metadata.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor

from ..algebra import exact
from ..alpha import ADAPTER_CONFIG
from ..errors import AdapterError, LoraOpsError
from ..families import Family, Shapes
from ..files import write as write_file
from ..files import write_folder, write_folder_numbered
from ..files import write_numbered as write_file_numbered
from ..lora import BIAS, Lora
from .base import Layout, Module
from .metadata import configuration
from .metadata import metadata as completed
from .modules import modules

_COMFYUI = "https://github.com/comfyanonymous/ComfyUI"

LAYOUTS: tuple[Layout, ...] = (
    Layout("kohya", ".lora_up.weight", ".lora_down.weight", ".alpha", _COMFYUI),
    # With these suffixes diffusers' converters know the names, too (FLUX: loaders/lora_conversion_utils.py).
    Layout("comfy", ".lora_up.weight", ".lora_down.weight", ".alpha", _COMFYUI),
    # diffusers refuses a file that has alpha tensors beside its configuration.
    Layout("diffusers", ".lora_B.weight", ".lora_A.weight", "", "diffusers"),
    Layout("peft", ".lora_B.weight", ".lora_A.weight", "", "diffusers", folder=True),
    # Parts of what is fused in the model's own names, of any algebra: diffusers' modules as LyCORIS calls them
    # (LycorisNetwork.LORA_PREFIX), and SimpleTuner, which trains with it.
    Layout(
        name="lycoris",
        up=".lora_up.weight",
        down=".lora_down.weight",
        alpha=".alpha",
        implementation="https://github.com/KohakuBlueleaf/LyCORIS",
        alpha_needed=True,
    ),
)


@dataclass(frozen=True, eq=False)
class Laid:
    """What a layout puts into its files; config is PEFT's adapter_config.json, None where there is none."""

    modules: tuple[Module, ...]
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    config: Mapping[str, object] | None

    @property
    def folded(self) -> tuple[str, ...]:
        """Modules made of parts of different scales: they alone are rounded, to float32."""
        return tuple(module.full_name for module in self.modules if module.factors.folded)

    @property
    def folder(self) -> tuple[Mapping[str, tuple[Mapping[str, Tensor], Mapping[str, str]]], Mapping[str, str]]:
        """PEFT's files: tensors with metadata, and texts."""
        weights = {"adapter_model.safetensors": (self.tensors, self.metadata)}
        return weights, {ADAPTER_CONFIG: json.dumps(self.config, indent=2)}


def write(
    path: str | os.PathLike[str],
    lora: Lora,
    layout: Layout,
    family: Family,
    *,
    shapes: Shapes | None = None,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Laid:
    """Write a LoRA as a file or, for PEFT, a folder: whole or not at all. Returns what it wrote.

    shapes are the model's in hand (None: the published one's). metadata is put over the source's. dtype rounds the
    factors; None keeps each one's own. Raises FileError like files.write, and before it what laid_out raises.
    """
    laid = laid_out(lora, layout, family, shapes=shapes, metadata=_dated(path, lora, metadata), dtype=dtype)
    if laid.config is None:
        write_file(path, laid.tensors, laid.metadata, overwrite=overwrite)
    else:
        write_folder(path, *laid.folder, overwrite=overwrite)
    return laid


def write_numbered(
    path_of: Callable[[int], Path],
    lora: Lora,
    layout: Layout,
    family: Family,
    *,
    shapes: Shapes | None = None,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Path, Laid]:
    """The same under the first name that is free (see files.write_numbered), which is returned too."""
    laid = laid_out(lora, layout, family, shapes=shapes, metadata=_dated(path_of(1), lora, metadata), dtype=dtype)
    if laid.config is None:
        return write_file_numbered(path_of, laid.tensors, laid.metadata), laid
    return write_folder_numbered(path_of, *laid.folder), laid


def _dated(path: str | os.PathLike[str], lora: Lora, metadata: Mapping[str, str] | None) -> dict[str, str]:
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    made = {"modelspec.title": Path(path).stem, "modelspec.date": now}
    return {**made, **lora.metadata, **(metadata or {})}


def laid_out(
    lora: Lora,
    layout: Layout,
    family: Family,
    *,
    shapes: Shapes | None = None,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> Laid:
    """A LoRA as a layout has it; metadata stands for the source's.

    What is read back has the same scale to the bit: an alpha is a float32 where one says it, else a float64 (ComfyUI,
    diffusers and A1111 take it as it is, sd-scripts rounds it).

    Raises TargetError or AdapterError, naming file and module, if anything of the LoRA would be left out or overflow.
    """
    try:
        written = tuple(_rounded(module, dtype) for module in modules(lora, layout, family, shapes or None))
    except LoraOpsError as error:
        error.file = lora.name
        raise
    tensors = {key: tensor for module in written for key, tensor in _tensors(module, layout)}
    told = completed(lora.metadata if metadata is None else metadata, layout, family.name, written)
    config = {"peft_type": "LORA", "bias": "none", **configuration(written)} if layout.folder else None
    return Laid(written, tensors, told, config)


def _rounded(module: Module, dtype: torch.dtype | None) -> Module:
    found: dict[str, Tensor] = {}
    for name, tensor in module.factors.tensors.items():
        rounds = name != "alpha" and tensor.is_floating_point()
        found[name] = (tensor.to(dtype or tensor.dtype) if rounds else tensor).contiguous()
        if not all(extreme.isfinite() for extreme in found[name].float().aminmax()):
            what = f"is too large for {found[name].dtype}."
            raise AdapterError(what, module=module.full_name, remedy="Choose a wider dtype.")
    return module._replace(factors=module.factors._replace(tensors=found))


def _tensors(module: Module, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    name = module.full_name.removesuffix(BIAS)
    for factor, tensor in module.factors.tensors.items():
        yield name + (".diff_b" if name != module.full_name else layout.words[factor]), tensor
    if layout.alpha and module.factors.alpha is not None:
        yield name + layout.alpha, exact(module.factors.alpha)


__all__ = ["LAYOUTS", "Laid", "Layout", "laid_out", "write", "write_numbered"]
