"""What `python run.py train RECIPE` does: a run of Train LoRA without a page, on the user's own ComfyUI and its models.

A recipe is what the node keeps with a run: recipe.json in its folder, and the same in the metadata of the LoRA.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import torch

from harness import comfy
from harness.comfy import PACK
from harness.server import Server, ServerError, WorkflowError
from lora_ops.errors import FileError, LoraOpsError
from lora_ops.files import read_header

KEY = "lora_ops.training"  # of a LoRA's metadata
VERSION = 1


class Recipe(NamedTuple):
    """An API prompt, and which of its nodes trains."""

    prompt: dict[str, Any]
    node: str

    @property
    def inputs(self) -> dict[str, Any]:
        return self.prompt[self.node]["inputs"]


def main(arguments: Sequence[str]) -> int:
    """Train; returns the exit status. Ctrl+C stops the run, which keeps what it has learned."""
    parser = argparse.ArgumentParser(prog="python run.py train", description=main.__doc__)
    parser.add_argument("recipe", type=Path, help="recipe.json of a run, or a LoRA that Train LoRA has made")
    parser.add_argument("changes", nargs="*", metavar="INPUT=VALUE", help="other values, as in steps=3000 name=mine")
    parser.add_argument("--comfy", type=Path, required=True, help=argparse.SUPPRESS)
    asked, more = parser.parse_known_args(arguments)  # more are ComfyUI's own options
    try:
        recipe = changed(read(asked.recipe), asked.changes)
        return _run(asked.comfy, recipe, tuple(more))
    except (LoraOpsError, ServerError, WorkflowError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def read(path: Path) -> Recipe:
    """The recipe that a file is or holds. Raises FileError."""
    remedy = "Give the recipe.json of a run's folder, or a LoRA that Train LoRA has made."
    try:
        if path.suffix == ".safetensors":
            told = json.loads(read_header(path).metadata.get(KEY, "null"))
        else:
            told = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"cannot be read: {error.strerror}.", file=path, remedy=remedy) from error
    except ValueError as error:
        raise FileError(f"is no JSON: {error}.", file=path, remedy=remedy) from error
    if not isinstance(told, dict) or not isinstance(told.get("prompt"), dict) or told.get("node") not in told["prompt"]:
        raise FileError("holds no recipe.", file=path, remedy=remedy)
    if told.get("version") != VERSION:
        raise FileError(f"is a recipe of version {told.get('version')}; this one reads {VERSION}.", file=path)
    return Recipe(told["prompt"], told["node"])


def changed(recipe: Recipe, changes: Sequence[str]) -> Recipe:
    """The recipe with INPUT=VALUE in its training node. Raises LoraOpsError for an input that it does not have."""
    values: dict[str, Any] = {}
    for change in changes:
        name, _, text = change.partition("=")
        known = sorted(name for name, value in recipe.inputs.items() if not isinstance(value, list))
        if name not in known:
            raise LoraOpsError(
                f"Train LoRA has no input '{name}' in this recipe.", remedy=f"It has {', '.join(known)}."
            )
        values[name] = _like(recipe.inputs[name], name, text)
    node = {**recipe.prompt[recipe.node], "inputs": recipe.inputs | values}
    return recipe._replace(prompt=recipe.prompt | {recipe.node: node})


def _like(value: Any, name: str, text: str) -> Any:
    """A text as a value of the same type as another."""
    if isinstance(value, str):
        return text
    found: Any = None
    with suppress(ValueError):
        found = json.loads(text)
    if type(found) is type(value):
        return found
    if isinstance(value, float) and type(found) is int:
        return float(found)
    remedy = f"Give it a value of type {type(value).__name__}, like {json.dumps(value)}."
    raise LoraOpsError(f"{name} cannot be '{text}'.", remedy=remedy)


def _run(host: Path, recipe: Recipe, arguments: tuple[str, ...]) -> int:
    print(f"ComfyUI {comfy.version(host)} in {host}", flush=True)
    installed = PACK.parent == host / "custom_nodes"
    with Server(
        host, own=True, cuda=torch.accelerator.is_available(), pack=None if installed else PACK, arguments=arguments
    ) as server:
        name = server.queue(recipe.prompt)
        try:
            entry = server.finished(name, inf)
        except KeyboardInterrupt:
            print("\nStopping: what was learned so far is kept.", flush=True)
            server.request("/interrupt", {})
            entry = server.finished(name, inf)
        print(_text(entry["outputs"].get(recipe.node, {})))
    return 0


def _text(output: Mapping[str, Any]) -> str:
    return "\n".join(output.get("text", ()))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
