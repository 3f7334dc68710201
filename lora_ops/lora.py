"""Lora, what a file said; Target and TargetMap, the places of a model it can land on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .adapters import Adapter, build
from .errors import AdapterError, FileError, ShapeError, shown
from .files import LORA_HEADER, TensorFile, read, read_header

# How writers spell a factor after the module's name. Longest first, so that no suffix hides a longer one.
SPELLINGS: tuple[tuple[str, str], ...] = tuple(
    sorted(
        {
            # LoRA: kohya and LyCORIS; PEFT and diffusers; diffusers' own scripts; attention processors
            # (the module ends in to_q, its factor in to_q_lora); transformers; Mochi
            ".lora_up.weight": "up",
            ".lora_down.weight": "down",
            ".lora_B.weight": "up",
            ".lora_A.weight": "down",
            ".lora_B.default.weight": "up",
            ".lora_A.default.weight": "down",
            ".lora.up.weight": "up",
            ".lora.down.weight": "down",
            "_lora.up.weight": "up",
            "_lora.down.weight": "down",
            ".lora_linear_layer.up.weight": "up",
            ".lora_linear_layer.down.weight": "down",
            ".lora_B": "up",
            ".lora_A": "down",
            ".alpha": "alpha",
            # Parts that change what a LoRA means; an adapter that has one is never applied without it.
            ".lora_mid.weight": "mid",
            ".lora_B.bias": "bias",
            ".dora_scale": "magnitude",
            ".lora_magnitude_vector": "magnitude",
            ".lora_magnitude_vector.weight": "magnitude",
            ".magnitude": "magnitude",
            ".reshape_weight": "reshape_weight",
            # Other algebras
            **{f".hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
            **{f".lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t1", "t2")},
            **{f".{name}.weight": f"glora_{name}" for name in ("a1", "a2", "b1", "b2", "bm")},
            ".oft_blocks": "oft_blocks",
            ".oft_diag": "oft_diag",
            ".oft_R.weight": "oft_R",
            ".rescale": "rescale",
            ".on_input": "ia3_on_input",
            ".diff": "diff",
            ".diff_b": "diff_bias",
            ".w_norm": "norm",
            ".b_norm": "norm_bias",
            ".set_weight": "set_weight",
        }.items(),
        key=lambda spelling: -len(spelling[0]),
    )
)


class Refusal(NamedTuple):
    """A module (or a key that names none) that does not land, and why."""

    module: str
    reason: str


@dataclass(frozen=True, eq=False)
class Lora:
    """What a file said: module name -> Adapter, its metadata, and what could not be read.

    declared are the modules whose alpha stands in the metadata, not in a tensor.
    """

    name: str
    modules: Mapping[str, Adapter]
    metadata: Mapping[str, str] = field(default_factory=dict)
    leftover: tuple[Refusal, ...] = ()
    declared: frozenset[str] = frozenset()

    def alpha_source(self, module: str) -> str:
        """Where a module's scale comes from, for people."""
        alpha = self.modules[module].alpha
        if alpha is None:
            return "none, scale 1"
        source = "metadata" if module in self.declared else "tensor"
        return source if alpha else f"{source}, 0 read as the rank"


@dataclass(frozen=True)
class Band:
    """Rows of a fused weight: start and length along its first axis."""

    start: int
    length: int


@dataclass(frozen=True)
class Target:
    """A place in a model: a weight, perhaps a band of its rows, perhaps with halves swapped.

    key is the weight's name in its part's state dict; shape is the whole weight's.
    """

    part: str  # "model" or "clip"
    key: str
    shape: tuple[int, ...]
    band: Band | None = None
    swap: bool = False

    @property
    def rows(self) -> Band:
        return self.band or Band(0, self.shape[0])

    @property
    def delta_shape(self) -> tuple[int, ...]:
        return (self.rows.length, *self.shape[1:])


class Named(NamedTuple):
    """What a name means in one model, and which dialect spells it so."""

    target: Target
    dialect: str


@dataclass(frozen=True)
class TargetMap:
    """Every module name a file may use -> Target, for one model."""

    family: str
    names: Mapping[str, Named]

    @property
    def parts(self) -> frozenset[str]:
        return frozenset(named.target.part for named in self.names.values())


def read_lora(path: str) -> Lora:
    """The LoRA in a file; what cannot be understood is in `leftover`. Raises FileError like read_file."""
    return from_file(read_file(path))


def read_file(path: str) -> TensorFile:
    """The tensors of a LoRA file.

    Raises FileError (see files.read), also for a file in which nothing looks like a LoRA: a checkpoint is refused by
    its header, before gigabytes of it are read.
    """
    names = read_header(path, LORA_HEADER).entries
    if not any(factor for _, factor in map(split, names)):
        first = f" (first tensor: {shown(next(iter(names)))})" if names else ""
        raise FileError(
            f"holds no LoRA: none of its {len(names)} tensors is a factor of one{first}.",
            file=path,
            remedy="Choose a LoRA file; a checkpoint belongs in a checkpoint loader.",
        )
    return read(path)


def from_file(file: TensorFile) -> Lora:
    """The LoRA that tensors make, wherever they came from: a file, another node, a trainer."""
    spelled: dict[str, dict[str, tuple[str, Tensor]]] = {}
    leftover: list[Refusal] = []
    twice: dict[str, str] = {}
    for key, tensor in file.tensors.items():
        module, factor = split(key)
        if not factor:
            leftover.append(Refusal(key, "no known factor name"))
        elif factor in spelled.setdefault(module, {}):
            twice[module] = f"has two tensors for {factor}: {spelled[module][factor][0]} and {key}"
        else:
            spelled[module][factor] = key, tensor
    modules: dict[str, Adapter] = {}
    declared: set[str] = set()
    config = _config(file.metadata)
    for module, factors in spelled.items():
        tensors = {factor: tensor for factor, (_, tensor) in factors.items()}
        try:
            if module in twice:
                raise AdapterError(twice[module])
            if "alpha" not in tensors and "down" in tensors and tensors["down"].ndim:
                alpha = _declared_alpha(config, module, rank=tensors["down"].shape[0])
                if alpha is not None:
                    tensors["alpha"] = torch.tensor(alpha, dtype=torch.float64)
                    declared.add(module)
            modules[module] = build(tensors)
        except (AdapterError, ShapeError) as error:
            leftover.append(Refusal(module, error.what))
    return Lora(file.source, modules, file.metadata, tuple(leftover), frozenset(declared))


def _config(metadata: Mapping[str, str]) -> Mapping[str, object]:
    """diffusers' `lora_adapter_metadata`: PEFT's configuration, its keys behind the component's prefix ("unet.r")."""
    try:
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _declared_alpha(config: Mapping[str, object], module: str, rank: int) -> float | None:
    """The alpha that the configuration means for a module, so that alpha / rank is its scale; None if it names none.

    A pattern matches the end of a module's name, as PEFT's get_pattern_key has it. Rank-stabilised LoRA divides by
    √rank: the same as an alpha √rank times as large.

    Raises AdapterError for a configuration that is no number, or one that changes more than the scale.
    """
    component, _, name = module.partition(".")
    alpha = config.get(f"{component}.lora_alpha")
    patterns = config.get(f"{component}.alpha_pattern")
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        if name == pattern or name.endswith(f".{pattern}"):
            alpha = value
    if alpha is None:
        return None
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise AdapterError(f"has the alpha {shown(alpha)} in its metadata, which is no number")
    if config.get(f"{component}.use_dora"):
        raise AdapterError("is DoRA by its metadata, without its magnitude")
    return alpha * math.sqrt(rank) if config.get(f"{component}.use_rslora") else float(alpha)


def split(key: str) -> tuple[str, str]:
    """A key's module and factor; the factor is "" where no spelling fits."""
    for suffix, factor in SPELLINGS:
        if key.endswith(suffix) and len(key) > len(suffix):
            return key[: -len(suffix)], factor
    return key, ""
