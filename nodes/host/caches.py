"""The caches: parsed LoRA files, so that a changed strength reads no file again; live hooks, so that it makes none."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

from ...lora_ops.files import Identity, TensorFile, identity
from ...lora_ops.live import Live
from ...lora_ops.lora import Lora, from_file, read_file
from .names import path_of, resolve

BUDGET = 2 << 30  # bytes of tensors kept; the least recently used go first


@dataclass(frozen=True, eq=False)
class Loaded:
    """A LoRA file in memory: its name in the host's list, its tensors and what they mean."""

    name: str
    file: TensorFile
    lora: Lora


_files: OrderedDict[tuple[str, Identity], Loaded] = OrderedDict()


def load(name: str) -> Loaded:
    """The LoRA of this name, read only if the file on disk is not the one already in memory."""
    name, path = resolve(name), path_of(name)
    found = _files.pop((name, identity(path)), None)
    if found is None:
        file = replace(read_file(path), source=name)
        found = Loaded(name, file, from_file(file))
    _files[name, found.file.identity] = found
    while len(_files) > 1 and sum(map(_size, _files.values())) > BUDGET:
        _files.popitem(last=False)
    return found


@dataclass(eq=False)
class Hooks:
    """The live hooks of one model: those made last, of what, and those that are in its modules now."""

    made: Live | None = None
    made_of: list[object] = field(default_factory=list)
    installed: Live | None = None


_hooks: WeakKeyDictionary[Any, Hooks] = WeakKeyDictionary()


def hooks_of(model: Any) -> Hooks:
    """The hooks of a model's modules, which all clones of its patcher share."""
    return _hooks.setdefault(model, Hooks())


def _size(loaded: Loaded) -> int:
    return sum(tensor.nbytes for tensor in loaded.file.tensors.values())
