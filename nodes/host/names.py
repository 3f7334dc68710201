"""LoRA files by name: the host's list, names from other machines, and what tells a changed file."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import PurePosixPath

import folder_paths

from ...lora_ops.errors import FileError, LoraOpsError
from ...lora_ops.files import identity

FOLDER = "loras"
EXTENSION = ".safetensors"


def listed() -> list[str]:
    """The names of all LoRA files, as the host lists them."""
    return folder_paths.get_filename_list(FOLDER)


def resolve(name: str) -> str:
    """The host's own name for a LoRA named here or on another machine.

    In order: the name itself; with the other system's slashes; without its extension (tags); the only file of
    that name in any folder. Raises FileError where there is none, or more than one to choose from.
    """
    names = {entry.replace("\\", "/"): entry for entry in listed()}
    wanted = name.replace("\\", "/").strip("/")
    for candidate in (wanted, wanted + EXTENSION):
        if candidate in names:
            return names[candidate]
    bases = {PurePosixPath(wanted).name, PurePosixPath(wanted).name + EXTENSION}
    found = [entry for entry in names if PurePosixPath(entry).name in bases]
    if len(found) == 1:
        return names[found[0]]
    if found:
        remedy = f"Write one of: {', '.join(sorted(found)[:5])}."
        raise FileError(f"is in {len(found)} folders of models/loras.", file=name, remedy=remedy)
    near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.5)
    remedy = f"Did you mean {' or '.join(near)}?" if near else "Put it there and refresh the node definitions."
    raise FileError("is not in models/loras.", file=name, remedy=remedy)


def path_of(name: str) -> str:
    """The full path of a LoRA. Raises FileError like resolve."""
    path = folder_paths.get_full_path(FOLDER, resolve(name))
    if path is None:
        raise FileError("is listed in models/loras but cannot be opened (a broken link?).", file=name)
    return path


def fingerprint(names: list[str]) -> str:
    """A text that changes whenever one of these files does; a missing file has one too."""
    return "; ".join(_state(lambda name=name: path_of(name)) for name in names)


def fingerprint_of_all() -> str:
    """The same for every LoRA there is: for names that come over a wire, which the host shows to no node before it
    runs."""
    paths = (folder_paths.get_full_path(FOLDER, name) for name in listed())
    return "; ".join(_state(lambda path=path: path) for path in paths if path is not None)


def _state(path: Callable[[], str]) -> str:
    try:
        return str(identity(path()))
    except LoraOpsError as error:
        return str(error)
