"""The host's kinds of files: what MODEL, CLIP and VAE are called in them, when they are saved and when they are loaded.

The names are the host's own: its rules run on placeholders (see renaming).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import comfy.diffusers_convert
import comfy.model_base
import comfy.model_detection
import comfy.model_sampling
import comfy.sd1_clip
import comfy.utils
import torch
from comfy import supported_models as models
from torch import Tensor

from ...lora_ops.checkpoints import STEM, component
from ...lora_ops.errors import FileError, TargetError
from ...lora_ops.families import recognise
from ...lora_ops.files import Header, read_header
from . import ledger
from .baking import Weight, weights
from .patching import shapes
from .renaming import Placeholder, Rule

State = dict[str, Any]
FOLDERS = {  # layout -> its models folder
    "full checkpoint": "checkpoints",
    "diffusion model": "diffusion_models",
    "CLIP": "text_encoders",
    "VAE": "vae",
    "sharded diffusers folder": "diffusers",
}
# A CLIP or VAE does not say which checkpoint it was in: one kind for each of the host's rules.
CLIPS = (models.SD15, models.SD20, models.SDXL, models.SDXLRefiner, models.Stable_Cascade_C, models.SD3)
VAES = (models.SD15, models.Flux, models.StableAudio)


@dataclass(frozen=True, eq=False)
class Part:
    """A MODEL, CLIP or VAE to be written, in one dtype or (None) each tensor in that of the file it came from."""

    name: str  # model, clip or vae
    thing: Any
    dtype: torch.dtype | None = None

    @property
    def patcher(self) -> Any:
        return self.thing if self.name == "model" else self.thing.patcher

    @property
    def prefix(self) -> str:
        return "diffusion_model." if self.name == "model" else ""

    @cached_property
    def weights(self) -> Mapping[str, Weight]:
        """By the name in the module that the host saves."""
        found = weights(self.patcher, self.prefix, dequantised=self.dtype is not None)
        return {key.removeprefix(self.prefix): weight for key, weight in found.items()}

    @cached_property
    def source(self) -> Source:
        return Source.of(self)

    def written(self, key: str) -> torch.dtype:
        """The dtype that a weight is written in; what is no float stays what it is."""
        live = self.weights[key].base.dtype
        if not live.is_floating_point:
            return live
        wanted = self.dtype or self.source.dtypes.get(key, live)
        return wanted if wanted.is_floating_point else live


@dataclass(frozen=True, eq=False)
class Source:
    """The files that a part was loaded from: the dtype of each of its weights there, and what they say of themselves.

    without is why that is not known, "" where there are such files.
    """

    dtypes: Mapping[str, torch.dtype]
    metadata: Mapping[str, str]
    without: str = ""

    @classmethod
    def of(cls, part: Part) -> Source:
        paths = _paths(part.patcher)
        if not paths:
            return cls({}, {}, "the node that made it names no file")
        try:
            headers = [read_header(path) for path in paths]
        except FileError as error:
            return cls({}, {}, str(error))
        dtypes: dict[str, torch.dtype] = {}
        for header in headers:
            dtypes |= {key: tensor.dtype for key, tensor in _most(part, placeholders(header)).items()}
        return cls(dtypes, headers[0].metadata if len(headers) == 1 else {})


def _paths(patcher: Any) -> list[str]:
    """The files from which the host loaded a patcher, or the one that was merged into it."""
    how = patcher.get_attachment(ledger.SOURCE) or getattr(patcher, "cached_patcher_init", None)
    files = how[1][0] if how and how[1] else None
    paths = [files] if isinstance(files, str) else files
    return list(paths) if isinstance(paths, list | tuple) and all(isinstance(path, str) for path in paths) else []


def placeholders(header: Header) -> dict[str, Placeholder]:
    return {name: Placeholder.of(name, entry.shape, entry.dtype) for name, entry in header.entries.items()}


def _most(part: Part, file: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """What a file is to a part: of all ways in which the host may load it, the one by which most weights fit."""

    def fitting(rule: Rule) -> Mapping[str, Tensor]:
        read = rule(dict(file))
        return {key: read[key] for key, weight in part.weights.items() if _fits(read.get(key), weight)}

    return max((fitting(rule) for rule in _ways(part)), key=len)


def _fits(tensor: Any, weight: Weight) -> bool:
    return isinstance(tensor, Tensor) and tuple(tensor.shape) == tuple(weight.base.shape)


def _ways(part: Part) -> Sequence[Rule]:
    if part.name == "model":
        return (loading_model(part.thing), _loading_diffusers(part.thing))
    if part.name == "clip":
        encoders = [loading_encoder(name) for name in encoders_of(part.thing)]
        return (*encoders, *(kind({}).process_clip_state_dict for kind in CLIPS))
    return (dict, comfy.diffusers_convert.convert_vae_state_dict, *(loading_vae(kind({})) for kind in VAES))


def loading_model(model: Any) -> Rule:
    """Names of a file -> those of the diffusion model, as the host loads it from a checkpoint or by itself."""
    return lambda file: model.model.model_config.process_unet_state_dict(_own(file))


def _own(file: State) -> State:
    prefix = comfy.model_detection.unet_prefix_from_state_dict(file)
    return {key.removeprefix(prefix): tensor for key, tensor in file.items() if key.startswith(prefix)} or file


def _loading_diffusers(model: Any) -> Rule:
    """The same for a file in diffusers' names."""

    def rule(file: State) -> State:
        config, own = model.model.model_config, _own(file)
        found = comfy.model_detection.convert_diffusers_mmdit(dict(own), "")
        if found is None:
            names = comfy.utils.unet_to_diffusers(config.unet_config) if "num_res_blocks" in config.unet_config else {}
            found = {name: own[key] for key, name in names.items() if key in own}
        return config.process_unet_state_dict(found) if found else {}

    return rule


def loading_vae(config: Any) -> Rule:
    def rule(file: State) -> State:
        prefixes = {prefix: "" for prefix in config.vae_key_prefix}
        return config.process_vae_state_dict(comfy.utils.state_dict_prefix_replace(file, prefixes, filter_keys=True))

    return rule


def loading_encoder(name: str) -> Rule:
    """A file of one text encoder: the host hands it to that encoder's transformer."""
    return lambda file: {f"{name}.transformer.{key}": tensor for key, tensor in file.items()}


def encoders_of(clip: Any) -> list[str]:
    """The text encoders of a CLIP, each of which has a file of its own."""
    children = clip.cond_stage_model.named_children()
    return [name for name, child in children if isinstance(child, comfy.sd1_clip.SDClipModel)]


class File(NamedTuple):
    """One file to be written: the names it gives to the parts' weights, and those that the host gives to its tensors.

    A part's weight is called part/name here, in what save takes and in what each part's load makes. With a folder it is
    several files: the shards of a component of diffusers, which is called so, copies of other files, and texts.
    """

    ending: str
    parts: tuple[Part, ...]
    save: Rule
    load: Mapping[str, Rule]
    folder: str = ""
    copies: Mapping[str, Path] = MappingProxyType({})
    texts: Mapping[str, str] = MappingProxyType({})


def files_of(layout: str, parts: Mapping[str, Part]) -> list[File]:
    """The files of a layout. Raises TargetError for a part that is missing, or that no file of its own can hold."""
    needed = {"CLIP": "clip", "VAE": "vae"}.get(layout, "model")
    if needed not in parts:
        raise TargetError(f"The layout '{layout}' needs a {needed.upper()}.", remedy=f"Connect a {needed.upper()}.")
    if layout == "CLIP":
        return _text_encoders(parts["clip"])
    if layout == "VAE":
        return [File("", (parts["vae"],), lambda named: _of(named, "vae"), {"vae": dict})]
    if layout == "sharded diffusers folder":
        return [_component(parts["model"])]
    model = parts["model"].thing
    config = model.model.model_config
    if layout == "diffusion model":
        (prefix,) = config.process_unet_state_dict_for_saving({"": None})

        def bare(named: State) -> State:
            saved = model.model.state_dict_for_saving(_of(named, "model"))
            return {key.removeprefix(prefix): tensor for key, tensor in saved.items()} | _flags(model)

        return [File("", (parts["model"],), bare, {"model": loading_model(model)})]

    def full(named: State) -> State:
        clip = _of(named, "clip") | parts["clip"].thing.tokenizer.state_dict() if "clip" in parts else None
        vae = _of(named, "vae") if "vae" in parts else None
        return model.model.state_dict_for_saving(_of(named, "model"), clip, vae) | _flags(model)

    loading = {
        "model": loading_model(model),
        "clip": config.process_clip_state_dict,
        "vae": loading_vae(config),
    }
    chosen = tuple(parts[name] for name in loading if name in parts)
    return [File("", chosen, full, {part.name: loading[part.name] for part in chosen})]


def _component(model: Part) -> File:
    found = component(recognise(shapes(model.thing, None)), {key: each.shape for key, each in model.weights.items()})
    paths = [Path(path) for path in _paths(model.patcher)]
    beside = [path.with_name("config.json") for path in paths if path.name.startswith(STEM)]
    copies = {f"{found.folder}/config.json": path for path in beside[:1] if path.is_file()}
    texts = {f"{found.folder}/config.json": json.dumps(found.config, indent=2)} if found.config and not copies else {}
    rules = (lambda named: found.split(_of(named, "model"))), {"model": found.joined}
    return File("", (model,), *rules, found.folder, copies, texts)


def _text_encoders(clip: Part) -> list[File]:
    names, tokenizer = encoders_of(clip.thing), clip.thing.tokenizer.state_dict()
    others = {key for key in clip.weights if not any(key.startswith(f"{name}.") for name in names)}
    if not names or others or (tokenizer and len(names) > 1):
        raise TargetError(
            f"A {type(clip.thing.cond_stage_model).__name__} has weights that the host reads from no own file.",
            remedy="Save it within a full checkpoint.",
        )

    # What its file did not have either is the host's own memory, perhaps never written to.
    known = clip.source.dtypes
    absent = {key for key, weight in clip.weights.items() if known and key not in known and not weight.patches}

    def saving(name: str) -> Rule:
        prefix = f"{name}.transformer."
        return lambda named: (
            tokenizer
            | {
                key.removeprefix(prefix): tensor
                for key, tensor in _of(named, "clip").items()
                if key.startswith(prefix) and key not in absent
            }
        )

    endings = [f"_{name}" if len(names) > 1 else "" for name in names]
    return [
        File(ending, (clip,), saving(name), {"clip": loading_encoder(name)})
        for name, ending in zip(names, endings, strict=True)
    ]


def _of(named: State, part: str) -> State:
    prefix = f"{part}/"
    return {key.removeprefix(prefix): tensor for key, tensor in named.items() if key.startswith(prefix)}


def _flags(model: Any) -> State:
    """What tells the host's loader how the model predicts, as its own CheckpointSave writes it."""
    sampling, flags = model.get_model_object("model_sampling"), {}
    predicts_v = isinstance(sampling, comfy.model_sampling.V_PREDICTION)
    if isinstance(sampling, comfy.model_sampling.ModelSamplingContinuousEDM) and predicts_v:
        flags["edm_vpred.sigma_max"] = torch.tensor(sampling.sigma_max).float()
        flags["edm_vpred.sigma_min"] = torch.tensor(sampling.sigma_min).float()
    if model.model.model_type == comfy.model_base.ModelType.V_PREDICTION:
        flags["v_pred"] = torch.tensor([])
        if getattr(sampling, "zsnr", False):
            flags["ztsnr"] = torch.tensor([])
    return flags


def predict_key(model: Any) -> str:
    """ModelSpec's word for what a model predicts, as the host's own CheckpointSave writes it; "" for neither."""
    kinds = {comfy.model_base.ModelType.EPS: "epsilon", comfy.model_base.ModelType.V_PREDICTION: "v"}
    return kinds.get(model.model.model_type, "")
