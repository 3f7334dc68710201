"""Folders of pictures by name: below the host's input folder, or below a folder that its settings call datasets."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from pathlib import Path

import folder_paths

from ...lora_ops.errors import FileError, shown
from ...lora_ops.train.folder import MASKS, PICTURES, REPEATED, fingerprint

NONE = "none"
KIND = "datasets"  # of models folders; extra_model_paths.yaml may add some
DEPTH = 4  # of folders in folders that are listed
LISTED = 8  # names in an error


def listed() -> list[str]:
    """The names of all folders with pictures in them, or in folders like 10_name; none first."""
    found = dict.fromkeys(name for root in _roots() for name in _below(root))
    return [NONE, *found]


def find(name: str) -> Path:
    """The folder that a name means, or a full path to one below a folder of the host's.

    A link in the input folder may lead elsewhere; a name may not: workflows come from strangers. Raises FileError.
    """
    portable = name.strip().replace("\\", "/")
    for root in _roots():
        path = Path(os.path.normpath(root / portable))
        if path != root and path.is_relative_to(root) and path.is_dir():
            return path
    if os.path.isabs(portable) or ".." in portable.split("/"):
        what = "is not below a folder of ComfyUI's for pictures."
        remedy = f"Move or link it into {_roots()[0]}, or call its parent folder '{KIND}' in extra_model_paths.yaml."
        raise FileError(what, file=name, remedy=remedy)
    names = listed()[1:]
    near = difflib.get_close_matches(portable, names, 3, 0.5) or names[:LISTED]
    remedy = f"There are: {', '.join(map(shown, near))}." if near else f"Put pictures into a folder in {_roots()[0]}."
    raise FileError("no such folder of pictures.", file=name or NONE, remedy=remedy)


def state(*names: str | None) -> str:
    """What changes when a file in one of these folders does. None, the name not known yet: of any folder."""
    known = {each for name in names for each in (listed()[1:] if name is None else [name])}
    found = []
    for name in sorted(known - {NONE}):
        try:
            found.append((name, fingerprint(find(name))))
        except FileError as error:
            found.append((name, str(error)))
    return repr(found)


def _roots() -> list[Path]:
    named = folder_paths.folder_names_and_paths.get(KIND, ([], set()))[0]
    every = [folder_paths.get_input_directory(), *named, folder_paths.get_output_directory()]
    return [Path(os.path.abspath(root)) for root in every]


def _below(root: Path) -> Iterator[str]:
    for here, folders, files in os.walk(root, followlinks=True):
        name = Path(here).relative_to(root)
        folders[:] = sorted(each for each in folders if not each.startswith(".") and each.lower() != MASKS)
        if len(name.parts) >= DEPTH:
            folders.clear()
        repeated = any(REPEATED.fullmatch(each) for each in folders)
        if name.parts and (repeated or any(os.path.splitext(file)[1].lower() in PICTURES for file in files)):
            yield name.as_posix()
