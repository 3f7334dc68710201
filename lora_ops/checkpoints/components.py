"""Component: a denoiser as diffusers keeps it: under its names, in a folder of shards."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..algebra import swap_halves
from ..errors import TargetError
from ..families import Family, Shapes
from ..files import Lazy
from ..lora import Target
from .configurations import Config, config_of
from .disk import INDEX, SUFFIX, tile

T = TypeVar("T", Tensor, Lazy, Tensor | Lazy)
STEM = "diffusion_pytorch_model"


class Component(NamedTuple):
    """What diffusers' pipelines call a denoiser's folder, and of which rows of the model's own weights each of its
    tensors is made."""

    folder: str
    places: Mapping[str, Target]
    config: Config | None  # what its config.json says; None where shapes do not tell

    def split(self, native: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by the model's own names -> by diffusers'."""

        def cut(tensor: Tensor, place: Target) -> Tensor:
            if place.swap:
                return swap_halves(tensor)
            return tensor if place.band is None else tensor.narrow(0, place.rows.start, place.rows.length)

        return {name: cut(native[place.key], place) for name, place in self.places.items()}

    def joined(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The way back, for the weights that are there whole."""
        found = {}
        ordered = sorted(self.places, key=lambda name: (self.places[name].key, self.places[name].rows.start))
        for key, group in groupby(ordered, key=lambda name: self.places[name].key):
            names = list(group)
            if tensors.keys() >= set(names):
                one = tensors[names[0]]
                whole = one if len(names) == 1 else torch.cat([tensors[name] for name in names])
                found[key] = swap_halves(whole) if self.places[names[0]].swap else whole
        return found


def component(family: Family, shapes: Shapes) -> Component:
    """The component of a model of a family (its own names without prefix -> shapes).

    Raises TargetError for a weight whose name in diffusers the family does not know, and for a model that is two
    components there.
    """
    remedy = "Choose the layout 'diffusion model'."
    network, *others = (component for component in family.components if component.part == "model")
    if others:
        raise TargetError(f"{family.title} is two models in two folders of diffusers.", remedy=remedy)
    found: dict[str, Target] = {}
    by_key: dict[str, list[Target]] = {key: [] for key in shapes}
    for place in network.places(shapes):
        for ending in ("weight", "bias") if place.diffusers else ():
            key = re.sub("weight$", ending, place.key)
            if key in shapes and not _whole(by_key[key]):  # what has two sets of names is written in the first
                target = Target("model", key, shapes[key], place.band, place.swap)
                found[f"{place.diffusers}.{ending}"] = target
                by_key[key].append(target)
    for key, shape in shapes.items():
        if name := network.parameter(key):
            found[name] = Target("model", key, shape)
            by_key[key].append(found[name])
    for key, targets in by_key.items():
        if not _whole(targets):
            what = f"has no one name in diffusers that is known for {family.title}."
            raise TargetError(what, module=key, remedy=remedy)
    config = config_of(family, {name: target.delta_shape for name, target in found.items()})
    return Component(network.prefixes["diffusers"][0].rstrip("."), found, config)


def _whole(targets: Sequence[Target]) -> bool:
    return bool(targets) and tile(targets)


def shards(tensors: Mapping[str, T], limit: float) -> tuple[dict[str, dict[str, T]], dict[str, str]]:
    """Tensors as the files that diffusers would write, each of at most so many bytes if it holds several; and the index
    of the files, by its name, if there are several."""
    groups: list[dict[str, T]] = []
    size = 0
    for name, tensor in tensors.items():
        if not groups or size + tensor.nbytes > limit:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += tensor.nbytes
    if len(groups) == 1:
        return {STEM + SUFFIX: groups[0]}, {}
    files = {f"{STEM}-{number:05}-of-{len(groups):05}{SUFFIX}": group for number, group in enumerate(groups, 1)}
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {name: file for file, group in files.items() for name in group},
    }
    return files, {STEM + INDEX: json.dumps(index, indent=2)}
