"""Lora, what a file said; Target and TargetMap, the places of a model it can land on."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .adapters import Adapter, LowRank, build
from .alpha import ADAPTER_CONFIG, Declarations, Declared
from .errors import AdapterError, FileError, ShapeError, shown
from .files import LORA_HEADER, TensorFile, read, read_header, read_text

# How writers spell a factor after the module's name; "bias." before one tells that it is of the module's bias. Longest
# first, so that no suffix hides a longer one.
SPELLINGS: tuple[tuple[str, str], ...] = tuple(
    sorted(
        {
            # LoRA: kohya and LyCORIS; PEFT and diffusers; diffusers' own scripts; attention processors
            # (the module ends in to_q, its factor in to_q_lora); transformers; Mochi; x-flux
            ".lora_up.weight": "up",
            ".lora_down.weight": "down",
            ".lora_B.weight": "up",
            ".lora_A.weight": "down",
            ".lora.up.weight": "up",
            ".lora.down.weight": "down",
            "_lora.up.weight": "up",
            "_lora.down.weight": "down",
            ".lora_linear_layer.up.weight": "up",
            ".lora_linear_layer.down.weight": "down",
            ".lora_B": "up",
            ".lora_A": "down",
            ".up.weight": "up",
            ".down.weight": "down",
            ".alpha": "alpha",
            ".lora_alpha": "alpha",
            # Parts that change what a LoRA means; an adapter that has one is never applied without it.
            ".lora_mid.weight": "mid",
            ".dora_scale": "dora_scale",
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
            ".oft_R.scaled_oft": "oft_scaled",
            ".rescale": "rescale",
            ".on_input": "ia3_on_input",
            ".ia3_l": "ia3_l",
            # Differences: trainers of whole weights, LyCORIS's norms, and the bias that PEFT gives to a LoRA
            ".diff": "diff",
            ".diff_b": "bias.diff",
            ".w_norm": "diff",
            ".b_norm": "bias.diff",
            ".lora_B.bias": "bias.diff",
            ".set_weight": "set_weight",
            ".scale": "set_weight",  # Black Forest Labs' control LoRAs bring their own norms
        }.items(),
        key=lambda spelling: -len(spelling[0]),
    )
)

BIAS = ".bias"  # after a module's name: the update of its bias, a module of its own

# Factors whose first dimension is what alpha is divided by.
_OF_RANK = ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")

# PEFT's adapters have names ("default"), which its files should not have, and some do.
_ADAPTER_NAME = re.compile(r"(\.lora_(?:A|B|magnitude_vector))\.[^.]+((?:\.weight|\.bias)?)$")

# Keys that are no factor of a LoRA on a weight, and what they are.
_STRANGERS: tuple[tuple[re.Pattern[str], str], ...] = (
    (
        re.compile(r"bundle_emb\."),
        "a text embedding bundled with the LoRA: save it as a file of its own in the embeddings folder "
        "and name it in the prompt (embedding:name)",
    ),
    (
        re.compile(r".*\.(?:cond_)?[qkvo]_loras\."),
        "a LoRA for the tokens of a reference picture alone (Stand-In, EasyControl): it needs nodes of its own",
    ),
)
# The names of the tensors in textual inversions: A1111, SDXL and SD3, diffusers
_EMBEDDING = re.compile(r"emb_params|string_to_param\..*|clip_[lg]|t5xxl|text_encoders_\d|<.*>")
# Factors that make no adapter alone, and that weights of checkpoints are called like, too.
_AMBIGUOUS = ("alpha", "magnitude", "set_weight")
CONFIG_LIMIT = 1 << 20  # bytes of an adapter_config.json
_PEFT_FILE = "adapter_model.safetensors"


class Refusal(NamedTuple):
    """A module (or a key that names none) that does not land, why, and what to do about it."""

    module: str
    reason: str
    remedy: str = "Get another version of the file."


@dataclass(frozen=True, eq=False)
class Lora:
    """What a file said: module name -> Adapter, its metadata, and what could not be read.

    declared are the modules whose alpha stands in no tensor: module -> where it stands.
    """

    name: str
    modules: Mapping[str, Adapter]
    metadata: Mapping[str, str] = field(default_factory=dict)
    leftover: tuple[Refusal, ...] = ()
    declared: Mapping[str, str] = field(default_factory=dict)

    def alpha_source(self, module: str) -> str:
        """Where a module's scale comes from, for people."""
        alpha = self.modules[module].alpha
        if alpha is None:
            return "none, scale 1"
        source = self.declared.get(module, "tensor")
        return source if alpha else f"{source}, 0 read as the rank"


@dataclass(frozen=True)
class Band:
    """Rows of a fused weight: start and length along its first axis."""

    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class Target:
    """A place in a model: a weight or bias, perhaps a band of its rows, perhaps with halves swapped.

    key is the weight's name in its part's state dict; shape is the whole weight's. names are what selectors may call
    it (native, diffusers', its key), role is what it does; they do not tell places apart.
    """

    part: str  # "model" or "clip"
    key: str
    shape: tuple[int, ...]
    band: Band | None = None
    swap: bool = False
    names: tuple[str, ...] = field(default=(), compare=False)
    role: str = field(default="", compare=False)

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
    """Every module name a file may use -> Target, for one model; and all its targets."""

    family: str
    names: Mapping[str, Named]  # those that mean one place
    meanings: Callable[[str], tuple[Named, ...]]  # what a name could mean, also where that is several places
    targets: tuple[Target, ...]

    @cached_property
    def parts(self) -> frozenset[str]:
        """ "model", "clip": of which the model in hand has weights."""
        return frozenset(target.part for target in self.targets)


def read_lora(path: str) -> Lora:
    """The LoRA in a file or PEFT folder; what is not understood is in `leftover`. Raises FileError like read_file."""
    return from_file(read_file(path))


def read_file(path: str) -> TensorFile:
    """The tensors of a LoRA file, or of the folder that PEFT saves one in.

    PEFT's adapter_config.json is read where it belongs to the tensors: in a folder that was named itself, and beside a
    file of the name that PEFT gives (adapter_model.safetensors). Beside other files it says nothing about them. Its
    text is then in the metadata, under its name.

    Raises FileError (see files.read), also for a file of which less than a tenth of the tensors look like factors of a
    LoRA: a checkpoint, perhaps with a stray key, is refused by its header, before gigabytes of it are read.
    """
    folder = os.path.isdir(path)
    file = os.path.join(path, _PEFT_FILE) if folder else path
    names = read_header(file, LORA_HEADER).entries
    factors = sum(bool(factor) and factor not in _AMBIGUOUS for _, factor in map(split, names))
    if not factors or factors * 10 < len(names):
        raise _no_lora(file, list(names), factors)
    tensors = read(file)
    for config in [os.path.join(path, ADAPTER_CONFIG)] if folder else configurations(path):
        return replace(tensors, metadata={**tensors.metadata, ADAPTER_CONFIG: _adapter_config(config)})
    return tensors


def configurations(path: str) -> list[str]:
    """The adapter_config.json that belongs to a file, none or one: see read_file."""
    folder, name = os.path.split(path)
    config = os.path.join(folder, ADAPTER_CONFIG)
    return [config] if name == _PEFT_FILE and os.path.exists(config) else []


def _no_lora(file: str, names: list[str], factors: int) -> FileError:
    first = f" (first tensor: {shown(names[0])})" if names else ""
    remedy = "Choose a LoRA file; a checkpoint belongs in a checkpoint loader."
    if names and all(map(_EMBEDDING.fullmatch, names)):
        remedy = "It is a text embedding: it belongs in the embeddings folder, and in the prompt as embedding:name."
    what = f"holds no LoRA: {factors or 'none'} of its {len(names)} tensors could be factors of one{first}."
    return FileError(what, file=file, remedy=remedy)


def _adapter_config(path: str) -> str:
    """The text of an adapter_config.json. Raises FileError if it is none."""
    text = read_text(path, CONFIG_LIMIT)
    try:
        fault = "" if isinstance(json.loads(text), dict) else "holds no JSON object"
    except (ValueError, RecursionError):
        fault = "is no valid JSON"
    if fault:
        raise FileError(f"{fault}.", file=path, remedy="Get it again from where the LoRA came from.")
    return text


def from_file(file: TensorFile) -> Lora:
    """The LoRA that tensors make, wherever they came from: a file, another node, a trainer."""
    spelled: dict[str, dict[str, tuple[str, Tensor]]] = {}
    leftover: list[Refusal] = []
    twice: dict[str, str] = {}
    for key, tensor in file.tensors.items():
        module, factor = split(key)
        if not factor and f"{key.removesuffix('.weight')}.on_input" in file.tensors:
            module, factor = key.removesuffix(".weight"), "ia3_weight"  # elsewhere a checkpoint's own
        if not factor:
            reason = _stranger(key) or "no known factor name"
            leftover.append(Refusal(key, reason, "Leave it out: only the rest of the file is applied."))
        elif factor in spelled.setdefault(module, {}):
            twice[module] = f"has two tensors for {factor}: {spelled[module][factor][0]} and {key}"
        else:
            spelled[module][factor] = key, tensor
    modules: dict[str, Adapter] = {}
    declared: dict[str, str] = {}
    declarations = Declarations(file.metadata, kohya=_lost_its_alphas(spelled))
    biased = {module for module, factors in spelled.items() if _is_of_lora(factors)}
    for module, factors in sorted(spelled.items(), key=lambda item: item[0] in biased):  # a LoRA before its bias
        tensors = {factor: tensor for factor, (_, tensor) in factors.items()}
        try:
            if module in twice:
                raise AdapterError(twice[module])
            if "oft_R" in tensors:
                tensors |= {name: torch.tensor(value) for name, value in declarations.rotation(module).items()}
            if module in biased:
                tensors["scale"] = _scale_of_lora(modules.get(module.removesuffix(BIAS)))
            elif alpha := _declared(declarations, module, tensors, f"{module}{BIAS}" in biased):
                tensors["alpha"] = torch.tensor(alpha.alpha, dtype=torch.float64)
                declared[module] = alpha.source
            modules[module] = build(tensors)
            if modules[module].with_bias:
                modules.setdefault(module + BIAS, modules[module])
        except (AdapterError, ShapeError) as error:
            leftover.append(Refusal(module, *filter(None, (error.what, error.remedy))))
    return Lora(file.source, modules, file.metadata, tuple(leftover), declared)


def _declared(declarations: Declarations, module: str, tensors: Mapping[str, Tensor], biased: bool) -> Declared | None:
    inner = next((tensors[name] for name in _OF_RANK if name in tensors), None)
    if "alpha" in tensors or (inner is not None and not inner.ndim) or not tensors.keys() & {*_OF_RANK, "lokr_w1"}:
        return None
    rank = None if inner is None else inner.shape[0]
    return declarations.of(module, rank, frozenset([*tensors, *(["bias"] if biased else [])]))


def _is_of_lora(factors: Mapping[str, tuple[str, Tensor]]) -> bool:
    """Whether these are of the bias that PEFT gives to a LoRA, alone of all differences at the LoRA's scale."""
    return "diff" in factors and factors["diff"][0].endswith(BIAS)


def _scale_of_lora(adapter: Adapter | None) -> Tensor:
    if not isinstance(adapter, LowRank):
        raise AdapterError("is the bias of a LoRA that is not there or cannot be read")
    return torch.tensor(adapter.scale, dtype=torch.float64)


def _lost_its_alphas(spelled: Mapping[str, Mapping[str, tuple[str, Tensor]]]) -> bool:
    """Whether a file is in kohya's own spelling and has no alpha at all.

    kohya's scripts write an alpha beside every module, so only a tool after them can have dropped them all, and the
    header still tells. A file in another spelling was converted: there alpha is folded into the factors, and the
    header is a memory of what it was.
    """
    keys = [factors[name][0] for factors in spelled.values() for name in ("down", "alpha") if name in factors]
    return bool(keys) and all(key.endswith(".lora_down.weight") for key in keys)


def split(key: str) -> tuple[str, str]:
    """A key's module and factor; the factor is "" where no spelling fits. A module's bias is a module of its own."""
    if _stranger(key):
        return key, ""
    return _split(key) or _split(_ADAPTER_NAME.sub(r"\1\2", key)) or (key, "")


def _split(key: str) -> tuple[str, str] | None:
    for suffix, factor in SPELLINGS:
        if key.endswith(suffix) and len(key) > len(suffix):
            place, dot, name = factor.rpartition(".")
            return key[: -len(suffix)] + dot + place, name
    return None


def _stranger(key: str) -> str:
    return next((what for pattern, what in _STRANGERS if pattern.match(key)), "")
