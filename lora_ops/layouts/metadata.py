"""What a written file says about itself: the source's metadata, made true for the layout and completed.

ModelSpec 1.0.1 (https://github.com/Stability-AI/ModelSpec), the `ss_` keys of sd-scripts, diffusers'
`lora_adapter_metadata` and PEFT's adapter_config.json.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from ..alpha import ADAPTER_CONFIG
from ..errors import AdapterError
from .base import Layout, Module


class Base(NamedTuple):
    """How metadata calls a family: ModelSpec's architecture, sd-scripts' version and the module that trains it."""

    architecture: str
    version: str
    module: str = "networks.lora"


BASES: Mapping[str, Base] = {  # those that sd-scripts has words for (library/sai_model_spec.py, train_network.py)
    "sd15": Base("stable-diffusion-v1", "sd_v1"),
    "sdxl": Base("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
    "sd3": Base("stable-diffusion-3", "sd3_m", "networks.lora_sd3"),
    "flux": Base("flux-1", "flux1", "networks.lora_flux"),
}

# Never the source's: hashes of its tensors, configurations that readers apply beside `.alpha`, and what the layout and
# the family say anew, or do not say.
STALE = (
    "modelspec.hash_sha256",
    "sshs_model_hash",
    "sshs_legacy_hash",
    "lora_adapter_metadata",
    ADAPTER_CONFIG,
    "modelspec.architecture",
    "modelspec.implementation",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_module",
    "ss_base_model_version",
)


def metadata(source: Mapping[str, str], layout: Layout, family: str, modules: Sequence[Module]) -> dict[str, str]:
    kept = {key: value for key, value in source.items() if key not in STALE}
    base = BASES.get(family)
    told = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{base.architecture if base else family}/lora",
        "modelspec.implementation": layout.implementation,
    }
    if layout.name == "kohya":
        scaled = [module.factors for module in modules if module.factors.alpha is not None]
        told["ss_network_dim"] = _one(factors.rank for factors in scaled)
        told["ss_network_alpha"] = _one(factors.alpha for factors in scaled if factors.alpha is not None)
        if base:
            plain = all(module.factors.tensors.keys() == {"up", "down"} for module in modules)
            told["ss_base_model_version"] = base.version
            told["ss_network_module"] = base.module if plain else "lycoris.kohya"
    if layout.name == "diffusers":
        kept["lora_adapter_metadata"] = json.dumps(_of_networks(modules))
    return {**told, **kept}


def _one(values: Iterable[float]) -> str:
    """The value that all modules share, else sd-scripts' word for many."""
    different = set(values)
    return str(different.pop()) if len(different) == 1 else "Dynamic"


def _of_networks(modules: Sequence[Module]) -> dict[str, object]:
    """PEFT's configuration of each network, its keys behind the network's prefix."""
    prefixes = dict.fromkeys(module.prefix for module in modules)
    return {
        prefix + key: value
        for prefix in prefixes
        for key, value in configuration([module for module in modules if module.prefix == prefix]).items()
    }


def configuration(modules: Sequence[Module]) -> dict[str, object]:
    """PEFT's LoraConfig for modules of one network. Raises AdapterError where not all of them are DoRA and some are."""
    decomposed = ["magnitude" in module.factors.tensors for module in modules]
    if any(decomposed) and not all(decomposed):
        what = "is LoRA beside DoRA, and PEFT has one of them for all modules."
        module = modules[decomposed.index(False)].full_name
        raise AdapterError(what, module=module, remedy="Choose the layout kohya or comfy.")
    # PEFT matches ends of names; transformers from 5 on leaves out the model's own name in a text encoder.
    named = {module.name.removeprefix("text_model."): module.factors for module in modules}
    ranks = {name: factors.rank for name, factors in named.items()}
    alphas = {name: factors.alpha for name, factors in named.items() if factors.alpha is not None}
    return {
        "r": _usual(ranks),
        "lora_alpha": _usual(alphas),
        "rank_pattern": _pattern(ranks),
        "alpha_pattern": _pattern(alphas),
        "target_modules": sorted(named),
        **({"use_dora": True} if any(decomposed) else {}),
    }


def _usual(values: Mapping[str, float]) -> float:
    return Counter(values.values()).most_common(1)[0][0]


def _pattern(values: Mapping[str, float]) -> dict[str, float]:
    """What is not usual; where a name is the end of another one, ^ makes it mean itself alone."""
    return {_anchored(name, values): value for name, value in values.items() if value != _usual(values)}


def _anchored(name: str, names: Collection[str]) -> str:
    return f"^{name}" if any(other.endswith(f".{name}") for other in names) else name
