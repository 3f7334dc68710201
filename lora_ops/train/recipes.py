"""Recipes: what a run is made with, as the host's API takes it, and what is different in another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .dataset import REFERENCES, Dataset, Picture, controls_in

VERSION = 1
# Inputs of the node that trains which change nothing of what is learned in a step; and those of the nodes before it.
HARMLESS = ("name", "steps", "vae", "sample_", "save_every", "validate_every", "resume", "dry_run")
HARMLESS_BEFORE = {"LoraOpsDataset": ("cache",)}
ADDED = {"preservation": '"off"'}  # inputs that older recipes do not have, and what these were made with


def recipe(prompt: Mapping[str, Any], node: str, dataset: Dataset) -> dict[str, Any]:
    """prompt is the node that trains and all that it needs."""
    return {"version": VERSION, "node": node, "prompt": prompt, "pictures": _hash(dataset)}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The inputs by which one recipe would learn otherwise, and "pictures" for other ones. What nodes are called in a
    workflow makes no difference."""
    one, other = _inputs(before), _inputs(now)
    names = {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}
    found = sorted(name for name in names if not name.startswith(HARMLESS))
    return found + (["pictures"] if before.get("pictures") != now.get("pictures") else [])


def _inputs(recipe: Mapping[str, Any]) -> dict[str, str]:
    prompt, known = recipe["prompt"], dict[str, str]()

    def meaning(value: Any) -> str:
        if not (isinstance(value, list) and len(value) == 2 and value[0] in prompt):
            return json.dumps(value, sort_keys=True)
        name, output = value
        if name not in known:
            known[name] = ""  # of a circle, which no host runs
            kind, inputs = prompt[name]["class_type"], prompt[name]["inputs"]
            harmless = HARMLESS_BEFORE.get(kind, ())
            told = {each: meaning(there) for each, there in inputs.items() if each not in harmless}
            text = json.dumps([kind, told], sort_keys=True)
            known[name] = hashlib.sha256(text.encode()).hexdigest()
        return f"{known[name]}/{output}"

    return ADDED | {name: meaning(value) for name, value in prompt[recipe["node"]]["inputs"].items()}


def _hash(dataset: Dataset) -> str:
    found = hashlib.sha256(repr((dataset.dropout, len(dataset.pictures))).encode())
    for picture in (*dataset.pictures, *dataset.held_out):
        found.update(repr((picture.captions, picture.repeats, picture.weight)).encode())
        for tensor in (*picture.latents, *picture.masks, *_controls(picture)):
            found.update(repr((tensor.shape, tensor.dtype)).encode())
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _controls(picture: Picture) -> Iterator[Tensor]:
    yield from chain(*picture.controls)
    for condition in picture.conditions:
        for of, found in controls_in(condition).items():
            yield from found if of == REFERENCES else [found]
