"""Shelf: results of long work on disk, by a key of all that they depend on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import torch
from torch import Tensor

from ...lora_ops.errors import FileError
from ...lora_ops.files import read, write
from . import caches

LIMIT = 32 << 30  # bytes; what was not used for longest goes first
THREADS = 4
CHUNK = 64 << 20  # bytes


class Shelf:
    """A folder of safetensors files. fault says why nothing is kept any more, once it cannot be written."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.fault = folder, ""

    def get(self, key: str) -> Mapping[str, Tensor] | None:
        """What is kept under a key; None for nothing, and for a file that is damaged: it is made again."""
        try:
            found = read(self._path(key)).tensors
        except FileError:
            return None
        with suppress(OSError):
            os.utime(self._path(key))
        return found

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        if self.fault:
            return
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, tensors, overwrite=True)
        except FileError as error:
            self.fault = error.what
        except OSError as error:
            self.fault = f"cannot be written: {error.strerror}."

    def trim(self) -> None:
        """Remove what was not used for longest, until the rest is within LIMIT."""
        files = [(file, state) for file in self.folder.glob("*/*.safetensors") if (state := _state(file))]
        total = sum(state.st_size for _, state in files)
        for file, state in sorted(files, key=lambda each: each[1].st_mtime_ns):
            if total <= LIMIT:
                return
            with suppress(OSError):
                file.unlink()
                total -= state.st_size

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def shelf() -> Shelf:
    """The one of this host: in its user folder, where updates of the pack do not reach."""
    return Shelf(Path(folder_paths.get_user_directory()) / "lora_ops" / "cache")


def _state(file: Path) -> os.stat_result | None:
    with suppress(OSError):
        return file.stat()
    return None


class Unknown(Exception):
    """A value whose content cannot be told."""


def key(*values: Any) -> str:
    """The SHA-256 of nested values: numbers, texts, tensors, lists and dicts. Raises Unknown for anything else."""
    found = hashlib.sha256()
    _add(found, values)
    return found.hexdigest()


def _add(found: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        found.update(f"tensor {value.dtype} {tuple(value.shape)} ".encode())
        found.update(_hash(value))
    elif isinstance(value, list | tuple):
        found.update(f"list {len(value)} ".encode())
        for each in value:
            _add(found, each)
    elif isinstance(value, dict):
        found.update(f"dict {len(value)} ".encode())
        for name in sorted(value, key=str):
            _add(found, (name, value[name]))
    elif value is None or isinstance(value, bool | int | float | str | torch.dtype):
        found.update(f"{type(value).__name__} {value!r} ".encode())
    else:
        raise Unknown(type(value).__name__)


def weights_key(patcher: Any) -> str:
    """The SHA-256 of a model's weights as its file had them, every byte, computed once for each model in memory, and of
    how it computes.

    Raises Unknown for one that something is patched on: its results are kept nowhere.
    """
    changed = ("patches", "injections", "hook_patches", "weight_wrapper_patches", "forced_hooks")
    if any(getattr(patcher, name, None) for name in changed):
        raise Unknown("a patched model")
    if patcher.model not in caches.weights:
        caches.weights[patcher.model] = _weights_key(patcher)
    return key(caches.weights[patcher.model], patcher.object_patches)


def _weights_key(patcher: Any) -> str:
    """Another clone's LoRA may be in the weights right now; then the host has kept what was there before."""
    state = {name: value for name, value in patcher.model.state_dict().items() if isinstance(value, Tensor)}
    state |= {name: kept.weight for name, kept in patcher.backup.items() if name in state}
    found = hashlib.sha256()
    with ThreadPoolExecutor(THREADS) as threads:
        names = sorted(state)
        for name, each in zip(names, threads.map(lambda name: _hash(state[name]), names), strict=True):
            comfy.model_management.throw_exception_if_processing_interrupted()
            found.update(f"{name} {state[name].dtype} {tuple(state[name].shape)} ".encode() + each)
    return found.hexdigest()


def _hash(tensor: Tensor) -> bytes:
    """The SHA-256 of a tensor's bytes; of its values, where the host has them quantised."""
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        tensor = tensor.dequantize()
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    found = hashlib.sha256()
    for chunk in flat.split(CHUNK):
        found.update(chunk.numpy())
    return found.digest()


TREE = "tree"  # the tensor that holds what is no tensor


def packed(value: Any) -> dict[str, Tensor]:
    """Nested lists, dicts, numbers, texts and tensors as tensors. Raises Unknown for anything else."""
    tensors: dict[str, Tensor] = {}

    def told(value: Any) -> Any:
        if isinstance(value, Tensor):
            name = str(len(tensors))
            tensors[name] = value.detach().cpu().contiguous()
            return {"tensor": name}
        if isinstance(value, dict) and all(isinstance(name, str) for name in value):
            return {"dict": {name: told(each) for name, each in value.items()}}
        if isinstance(value, list | tuple):
            return {type(value).__name__: [told(each) for each in value]}
        if value is None or isinstance(value, bool | int | float | str):
            return {"value": value}
        raise Unknown(type(value).__name__)

    text = json.dumps(told(value)).encode("utf-8")
    return {**tensors, TREE: torch.frombuffer(bytearray(text), dtype=torch.uint8)}


def unpacked(tensors: Mapping[str, Tensor]) -> Any:
    """What packed was given."""

    def meant(told: Mapping[str, Any]) -> Any:
        ((kind, value),) = told.items()
        if kind == "tensor":
            return tensors[value]
        if kind == "dict":
            return {name: meant(each) for name, each in value.items()}
        if kind in ("list", "tuple"):
            each = [meant(item) for item in value]
            return each if kind == "list" else tuple(each)
        return value

    return meant(json.loads(tensors[TREE].numpy().tobytes().decode("utf-8")))
