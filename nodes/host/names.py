"""LoRA files by name: the host's list, names and contents from other machines, and what tells a changed file."""

from __future__ import annotations

import asyncio
import difflib
import math
import os
import time
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import folder_paths

from ...lora_ops.errors import FileError, LoraOpsError, shown
from ...lora_ops.files import identity
from ...lora_ops.lora import configurations
from ...lora_ops.words import sidecars
from . import caches

FOLDER = "loras"
EXTENSION = ".safetensors"
SEARCH_SECONDS = 5.0  # of reading for a content under another name, and the file at hand to its end
CANDIDATES = 5  # names listed in an error


@dataclass(frozen=True)
class Found:
    """The file that a name means: the host's own name for it and its full path.

    asked is the name that was asked for, where the two differ by more than slashes and extension, else "".
    """

    name: str
    path: str
    asked: str = ""


class Base(NamedTuple):
    """A model's file: the kind of models folder that lists it, and its full path."""

    kind: str
    path: str


def listed() -> list[str]:
    """The names of all LoRA files, as the host lists them."""
    return folder_paths.get_filename_list(FOLDER)


def portable(name: str) -> str:
    """A name of the host's list as every system understands it."""
    return name.replace("\\", "/")


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def _folded(name: str) -> str:
    """Without case, and with accents as one character: macOS writes them as two."""
    return unicodedata.normalize("NFC", name.casefold())


# How a name may mean a file, the best first; each with and without the extension, which tags leave out.
WAYS = (str, _folded, _base, lambda name: _folded(_base(name)))


def find(name: str, sha256: str = "") -> Found:
    """The LoRA that a name from here or from another machine means.

    In order: the name itself, either system's slashes; without case; the only file of that name in any folder; without
    case. Where that is none or several, the file whose tensors have this SHA-256. Raises FileError, with the
    `candidates`, if none or several remain.
    """
    names = {portable(entry): entry for entry in listed()}
    wanted = portable(name).strip("/")
    spelled = (wanted, wanted + EXTENSION)
    meant = _meant(spelled, names)
    remark = ""
    if len(meant) != 1 and sha256:
        near = difflib.get_close_matches(_base(wanted), names, n=len(names) or 1, cutoff=0)
        try:
            meant = _holding(sha256, {entry: names[entry] for entry in (*meant, *near)}) or meant
            remark = " No file there has the tensors of the row."
        except TimeoutError:
            remark = f" The search for its tensors stopped after {SEARCH_SECONDS:g} s; run again to go on."
    if len(meant) != 1:
        raise _unclear(name, meant, difflib.get_close_matches(wanted, names, n=3, cutoff=0.5), remark)
    path = folder_paths.get_full_path(FOLDER, names[meant[0]])
    if path is None:
        raise FileError("is listed in models/loras but cannot be opened (a broken link?).", file=name)
    return Found(names[meant[0]], path, "" if meant[0] in spelled else name)


async def checked(question: Callable[[], object]) -> bool | str:
    """What a node's validate_inputs says: True, or what a question raises. It is asked in a thread: a search by content
    takes seconds, in which the server has others to answer."""

    def answer() -> bool | str:
        try:
            question()
        except LoraOpsError as error:
            return str(error)
        return True

    return await asyncio.to_thread(answer)


def _meant(spelled: Sequence[str], names: Iterable[str]) -> list[str]:
    """Those that a name means, spelled with and without extension, in the first way in which it means any."""
    tries = ([entry for entry in names if way(entry) == way(each)] for way in WAYS for each in spelled)
    return next(filter(None, tries), [])


BASES = ("checkpoints", "diffusion_models")


def bases() -> list[str]:
    """The files of whole models, as the host lists them, each behind its folder of models."""
    listed = ((kind, name) for kind in BASES for name in folder_paths.get_filename_list(kind))
    return [f"{kind}/{portable(name)}" for kind, name in listed if name.endswith(EXTENSION)]


def base(name: str) -> Base:
    """The file that such a name means, as find does, by its name alone. Raises FileError if none or several."""
    wanted = portable(name).strip("/")
    meant = _meant((wanted, wanted + EXTENSION), bases())
    if len(meant) != 1:
        raise _unclear(name, meant, difflib.get_close_matches(wanted, bases(), n=3, cutoff=0.5), "", "the models")
    kind, _, inside = meant[0].partition("/")
    path = folder_paths.get_full_path(kind, inside)
    if path is None:
        raise FileError(f"is listed in models/{kind} but cannot be opened (a broken link?).", file=name)
    return Base(kind, path)


def _holding(sha256: str, names: Mapping[str, str]) -> list[str]:
    """The first of these files that has these tensors: of those whose hash is known, then of those whose header states
    it, then of those that can be hashed in time. Copies of a LoRA are the same LoRA.

    Raises TimeoutError after SEARCH_SECONDS; what was read until then is remembered.
    """
    paths = {name: path for name, entry in names.items() if (path := folder_paths.get_full_path(FOLDER, entry))}
    deadline = math.inf
    for hash_of in (caches.known_hash, caches.stated_hash, caches.tensor_hash):
        for name, path in paths.items():
            with suppress(FileError):  # a file that is no LoRA has not these tensors
                if hash_of(path) == sha256 and caches.tensor_hash(path) == sha256:
                    return [name]
            if time.monotonic() > deadline:
                raise TimeoutError
        deadline = min(deadline, time.monotonic() + SEARCH_SECONDS)
    return []


def _unclear(
    name: str, meant: Sequence[str], near: Sequence[str], remark: str, where: str = "models/loras"
) -> FileError:
    candidates = sorted(meant) or near
    told = [shown(each) for each in candidates[:CANDIDATES]]
    if meant:
        what, remedy = f"means {len(meant)} files of {where}.", f"Write one of: {', '.join(told)}."
    else:
        what = f"is not in {where}."
        remedy = f"Did you mean {' or '.join(told)}?" if near else "Put it there and refresh the node definitions."
    return FileError(what + remark, file=name, remedy=remedy, candidates=list(candidates))


def fingerprint(names: Iterable[tuple[str, str]]) -> str:
    """A text that changes whenever one of these files (name, SHA-256 of its tensors or "") or what lies beside it for
    its scale or trigger words does; a missing file has one too."""
    return "; ".join(_told(lambda file=file: find(*file).path) for file in names)


def fingerprint_of_all() -> str:
    """The same for every LoRA there is: for names that come over a wire, which the host shows to no node before it
    runs."""
    paths = (folder_paths.get_full_path(FOLDER, name) for name in listed())
    return "; ".join(_told(lambda path=path: path) for path in paths if path is not None)


def _told(path: Callable[[], str]) -> str:
    try:
        return state(path())
    except FileError as error:
        return str(error)


def state(path: str) -> str:
    """A text that changes whenever this file, its adapter_config.json or one of its sidecars does. Raises FileError if
    there is no such file."""
    beside = (*configurations(path), *filter(os.path.exists, sidecars(path)))
    return " ".join(str(identity(each)) for each in (path, *beside))
