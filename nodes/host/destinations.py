"""Where a node writes: the output folder or one of the models folders, under a name that never leaves it."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folder_paths

from ...lora_ops.errors import FileError, shown

WHERE = ("output", "models")
IF_EXISTS = ("number", "refuse")
_FIELDS = {
    "year": "tm_year",
    "month": "tm_mon",
    "day": "tm_mday",
    "hour": "tm_hour",
    "minute": "tm_min",
    "second": "tm_sec",
}
_LETTERS = {"M": "month", "d": "day", "h": "hour", "m": "minute", "s": "second"}  # of the front end's %date:yyyy-MM-dd%


@dataclass(frozen=True)
class Destination:
    """A folder that exists, and the name of what goes there; kind is the models folder's ("": the output folder)."""

    folder: Path
    name: str
    kind: str = ""

    def path(self, ending: str) -> Path:
        return self.folder / f"{self.name}{ending}"

    def numbered(self, ending: str, number: int) -> Path:
        """As core's nodes number: ink_00001_.safetensors; of one encoder: ink_clip_l_00001_.safetensors."""
        stem, dot, suffix = ending.rpartition(".")
        return self.path(f"{stem}_{number:05}_{dot}{suffix}")

    def refresh(self) -> None:
        """The host's lists know a new file by the time of its folder, which may be as coarse as a second."""
        folder_paths.filename_list_cache.pop(self.kind, None)


def destination(where: str, kind: str, prefix: str, prompt: Mapping[str, Any] | None) -> Destination:
    """The place that a filename_prefix means: its last part is the name, what is before it are folders, made here.

    kind is the models folder that "models" stands for. Raises FileError for a name that leads out of the folder.
    """
    told = expanded(prefix, prompt or {}, time.localtime()).replace("\\", "/")
    root = Path(_models(kind) if where == "models" else folder_paths.get_output_directory())
    parts = told.split("/")
    refused = told.startswith("/") or ":" in told or "\0" in told or any(part in ("", ".", "..") for part in parts)
    if refused or not root.joinpath(*parts).resolve().is_relative_to(root.resolve()):
        raise FileError(
            "is no name inside the folder it is to be saved in.",
            file=told,
            remedy="Write a name such as merged or styles/merged, without .. and without a drive.",
        )
    folder = root.joinpath(*parts[:-1])
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot be made: {error.strerror}.", file=folder, remedy="Choose another folder.") from error
    return Destination(folder, parts[-1], kind if where == "models" else "")


def _models(kind: str) -> str:
    """The folder called like the kind where there is one: the first of diffusion_models is models/unet."""
    folders = folder_paths.get_folder_paths(kind)
    return next((folder for folder in folders if os.path.basename(folder) == kind), folders[0])


def expanded(prefix: str, prompt: Mapping[str, Any], now: time.struct_time) -> str:
    """A filename_prefix with the tokens of core's save nodes: %year% … %second%, %date:yyyy-MM-dd% and %Node.input%.

    The front end fills the last two in for core's own nodes only. Raises FileError for one that means nothing.
    """

    def value(match: re.Match[str]) -> str:
        token = match[1]
        if token in _FIELDS:
            return f"{getattr(now, _FIELDS[token]):02}"
        if token == "date" or token.startswith("date:"):
            return _date(token.partition(":")[2] or "yyyyMMddhhmmss", now)
        return _input(token, prompt, prefix)

    return re.sub(r"%([^%\s][^%]*)%", value, prefix)


def _date(pattern: str, now: time.struct_time) -> str:
    """A letter twice is the number with two digits; of the year, as many digits as letters."""

    def value(match: re.Match[str]) -> str:
        if match[0][0] == "y":
            return str(now.tm_year)[-len(match[0]) :]
        number = getattr(now, _FIELDS[_LETTERS[match[0][0]]])
        return f"{number:0{len(match[0])}}"

    return re.sub("y{1,4}|M{1,2}|d{1,2}|h{1,2}|m{1,2}|s{1,2}", value, pattern)


def _input(token: str, prompt: Mapping[str, Any], prefix: str) -> str:
    """The value of a node's input, the node told by its type or its title."""
    title, _, name = token.rpartition(".")
    nodes = [
        node
        for way in (lambda node: node.get("class_type"), lambda node: node.get("_meta", {}).get("title"))
        for node in prompt.values()
        if way(node) == title
    ]
    values = [node["inputs"][name] for node in nodes if name in node.get("inputs", {})]
    if not values or isinstance(values[0], list):
        raise FileError(
            f"%{shown(token)}% is no date and no value of a node's input.",
            file=prefix,
            remedy="Write %date:yyyy-MM-dd%, or %Node title.input% of an input that is set on its node.",
        )
    return re.sub(r'[/?<>\\:*|"\x00-\x1f\x7f]', "_", str(values[0]))
