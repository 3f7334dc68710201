"""Lora, what a file said; Target and TargetMap, the places of a model it can land on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from .adapters import Adapter, build
from .errors import AdapterError, FileError, ShapeError, shown
from .files import LORA, TensorFile, read, read_header

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
    """What a file said: module name -> Adapter, its metadata, and what could not be read."""

    name: str
    modules: Mapping[str, Adapter]
    metadata: Mapping[str, str] = field(default_factory=dict)
    leftover: tuple[Refusal, ...] = ()


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
    names = read_header(path, LORA).entries
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
    for module, factors in spelled.items():
        try:
            if module in twice:
                raise AdapterError(twice[module])
            modules[module] = build({factor: tensor for factor, (_, tensor) in factors.items()})
        except (AdapterError, ShapeError) as error:
            leftover.append(Refusal(module, error.what))
    return Lora(file.source, modules, file.metadata, tuple(leftover))


def split(key: str) -> tuple[str, str]:
    """A key's module and factor; the factor is "" where no spelling fits."""
    for suffix, factor in SPELLINGS:
        if key.endswith(suffix) and len(key) > len(suffix):
            return key[: -len(suffix)], factor
    return key, ""
