"""Alpha: where a file keeps it when no tensor of the module holds it.

Three places, the first that speaks of a module counts: diffusers' header JSON (`lora_adapter_metadata`), kohya's header
(`ss_network_alpha`), PEFT's `adapter_config.json`. Where none does, the scale is 1.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from .errors import AdapterError, shown

ADAPTER_CONFIG = "adapter_config.json"
_HEADER = "lora_adapter_metadata"
_PEFT_PREFIX = "base_model.model."

# What PEFT promises beyond up and down: a file without it is half of what was trained.
_PROMISES = {"use_dora": ("magnitude", "dora_scale"), "lora_bias": ("bias",)}
# Initialisations that take their start out of the base's weights: their factors are right on the changed base only.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

# A pattern that is a module's name or the end of one; `^` makes it the whole name.
_PLAIN = re.compile(r"\^?[\w.-]+")
# Patterns whose tries nobody can count: repeated groups, back references, extensions.
_UNCOUNTED = re.compile(r"\)[*+?{]|\\[1-9]|\(\?")
_REPETITION = re.compile(r"[*+?{]")
TRIES = 10_000_000  # a pattern that may need more for one name is refused


class Declared(NamedTuple):
    """The alpha that the metadata mean for a module, so that alpha / rank is its scale, and where they say it."""

    alpha: float
    source: str


class Declarations:
    """What a file's metadata say about alpha; kohya is whether the file is one of kohya's that lost its alphas."""

    def __init__(self, metadata: Mapping[str, str], *, kohya: bool) -> None:
        header = _table(metadata.get(_HEADER, "{}"))
        self._header = None if header is None else _components(header)
        self._beside = _Config(_table(metadata.get(ADAPTER_CONFIG)) or {})
        self._kohya = _pair(metadata) if kohya else None

    def of(self, module: str, rank: int | None, factors: frozenset[str]) -> Declared | None:
        """What the metadata mean for a module that has these factors and this rank (None: whole matrices of LoKr);
        None if they say nothing of it.

        Raises AdapterError for a configuration that is not this module's, or that changes more than the scale.
        """
        for config, inside in self._of(module):
            if (alpha := config.alpha(inside, rank, factors)) is not None:
                return Declared(alpha, "metadata")
        # ss_network_dim is not the rank of convolutions and resized modules: for those it says nothing.
        if self._kohya is not None and self._kohya[0] == rank:
            return Declared(self._kohya[1], "ss_network_alpha")
        alpha = self._beside.alpha(module.removeprefix(_PEFT_PREFIX), rank, factors)
        return None if alpha is None else Declared(alpha, ADAPTER_CONFIG)

    def rotation(self, module: str) -> Mapping[str, float]:
        """What PEFT's OftConfig for a module says besides its factors, by factor. Raises AdapterError like of."""
        configs = [config for config, _ in self._of(module)]
        return next(filter(None, (config.rotation() for config in (*configs, self._beside))), {})

    def _of(self, module: str) -> Iterator[tuple[_Config, str]]:
        """The header's configurations for a module, and its name there. Raises AdapterError for a damaged header."""
        if self._header is None:
            raise AdapterError(f"may have its scale in {_HEADER}, which is no JSON object")
        component, _, name = module.partition(".")
        for key, inside in ((component, name), ("", module.removeprefix(_PEFT_PREFIX))):
            if key in self._header:
                yield self._header[key], inside


@dataclass(frozen=True)
class _Config:
    """PEFT's LoraConfig, LoHaConfig or LoKrConfig of one network, as JSON."""

    values: Mapping[str, object]

    def alpha(self, name: str, rank: int | None, factors: frozenset[str]) -> float | None:
        """Rank-stabilised LoRA divides by √rank: the same as an alpha √rank times as large."""
        stated = self.values.get("lora_alpha", self.values.get("alpha"))  # LoHa's and LoKr's is called alpha
        alpha = _number(self._alphas.of(name, stated), "alpha")
        if alpha is None:
            return None
        r = _number(self._ranks.of(name, self.values.get("r")), "rank")
        if rank is None:
            if alpha != r:
                raise AdapterError("is a LoKr of whole matrices at PEFT's scale, which no file can say")
            return None
        if r is not None and r != rank:
            raise AdapterError(f"has the rank {rank}, its metadata say {r:g}")
        for switch, spelled in _PROMISES.items():
            if self._on(switch) and factors.isdisjoint(spelled):
                raise AdapterError(f"lacks its {spelled[0]}, which its metadata promise ({switch})")
        if self._on("fan_in_fan_out"):
            raise AdapterError("is for a weight stored transposed (fan_in_fan_out), which no model here has")
        start = self.values.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
            raise AdapterError(f"was trained on a changed base (init_lora_weights '{shown(start)}')")
        return _number(alpha * math.sqrt(rank), "alpha") if self._on("use_rslora") else alpha

    def _on(self, switch: str) -> bool:
        value = self.values.get(switch)
        if not isinstance(value, bool | None):
            raise AdapterError(f"has {switch} {shown(value)} in its metadata, which is neither true nor false")
        return bool(value)

    def rotation(self) -> Mapping[str, float]:
        """Without use_cayley_neumann a configuration is older than it, and means Cayley's transform itself."""
        if "oft_block_size" not in self.values:
            return {}
        if self._on("fan_in_fan_out"):
            raise AdapterError("is for a weight stored transposed (fan_in_fan_out), which no model here has")
        terms = _number(self.values.get("num_cayley_neumann_terms", 5), "number of terms") or 0
        eps = _number(self.values.get("eps"), "eps") if self._on("coft") else None
        return {"oft_terms": terms if self._on("use_cayley_neumann") else 0, "oft_eps": eps or 0.0}

    @cached_property
    def _alphas(self) -> _Patterns:
        return _Patterns(self.values.get("alpha_pattern"))

    @cached_property
    def _ranks(self) -> _Patterns:
        return _Patterns(self.values.get("rank_pattern"))


class _Patterns:
    """PEFT's alpha_pattern or rank_pattern: regular expressions for the end of a module's name, the first that fits
    counts (peft.utils.get_pattern_key). Plain names, which may be hundreds, are looked up."""

    def __init__(self, patterns: object) -> None:
        self._values = list(patterns.items()) if isinstance(patterns, dict) else []
        self._plain: dict[str, int] = {}
        self._expressions: list[tuple[int, re.Pattern[str]]] = []
        self._refused = ""
        for number, (pattern, _) in enumerate(self._values):
            if _PLAIN.fullmatch(pattern):
                self._plain.setdefault(pattern, number)
            elif _UNCOUNTED.search(pattern):
                self._refused = pattern
            else:
                self._compile(number, pattern)

    def _compile(self, number: int, pattern: str) -> None:
        try:
            self._expressions.append((number, re.compile(rf"(.*\.)?({pattern})$")))
        except (re.error, OverflowError, RecursionError):
            self._refused = pattern

    def of(self, name: str, default: object) -> object:
        if self._refused:
            raise _not_understood(self._refused)
        found = [self._plain[end] for end in (f"^{name}", *_ends(name)) if end in self._plain]
        for number, expression in self._expressions:
            _require_few_tries(self._values[number][0], name)
            if expression.match(name):
                found.append(number)
        return self._values[min(found)][1] if found else default


def _require_few_tries(pattern: str, name: str) -> None:
    """Every repetition, the one before the pattern too, may end after any character; every group may be any of its
    alternatives, whose product is largest where all groups have as many."""
    repetitions, groups = 1 + len(_REPETITION.findall(pattern)), 1 + pattern.count("(")
    tries = repetitions * math.log(2 + len(name)) + groups * math.log(1 + pattern.count("|") / groups)
    if tries > math.log(TRIES):
        raise _not_understood(pattern)


def _not_understood(pattern: str) -> AdapterError:
    return AdapterError(f"has a pattern in its metadata that is not understood: '{shown(pattern)}'")


def _ends(name: str) -> Iterator[str]:
    """The name, and what is left of it after each dot."""
    while name:
        yield name
        name = name.partition(".")[2]


def _components(header: Mapping[str, object]) -> Mapping[str, _Config]:
    """diffusers puts the network's name before each key ("unet.r"); a model that saves its own LoRA puts none."""
    found: dict[str, dict[str, object]] = {}
    for key, value in header.items():
        component, _, name = key.rpartition(".")
        found.setdefault(component, {})[name] = value
    return {component: _Config(values) for component, values in found.items()}


def _pair(metadata: Mapping[str, str]) -> tuple[float, float] | None:
    """kohya's ss_network_dim and ss_network_alpha, where both are numbers ("Dynamic" is none)."""
    try:
        rank, alpha = float(metadata["ss_network_dim"]), float(metadata["ss_network_alpha"])
    except (KeyError, ValueError):
        return None
    return (rank, alpha) if math.isfinite(alpha) else None


def _number(value: object, name: str) -> float | None:
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise AdapterError(f"has the {name} {shown(value)} in its metadata, which is no number")
    return number


def _table(text: str | None) -> Mapping[str, object] | None:
    """A JSON object, None for what is none."""
    try:
        value = json.loads(text or "")
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
