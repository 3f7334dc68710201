"""The caches: parsed LoRA files, so that a changed strength reads no file again; the hashes of their tensors; what
names mean in a model; live hooks, so that a changed strength makes none; the hashes of text encoders and VAEs; runs of
training and how they went."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from ...lora_ops import files
from ...lora_ops.dialects import target_map
from ...lora_ops.families import recognise
from ...lora_ops.files import Identity, TensorFile, identity
from ...lora_ops.live import Live
from ...lora_ops.lora import Lora, TargetMap, configurations, from_file, read_file
from ...lora_ops.report import Report, report
from ...lora_ops.train import history
from ...lora_ops.words import TriggerWords, trigger_words

BUDGET = 2 << 30  # bytes of tensors kept; the least recently used go first
RUNS = 32  # of this process; older ones are read from their folders again


@dataclass(frozen=True, eq=False)
class Loaded:
    """A LoRA file in memory: its name in the host's list, where it lies, its tensors and what they mean."""

    name: str
    path: str
    file: TensorFile
    lora: Lora

    def words(self) -> TriggerWords:
        """Its trigger words, the sidecars read anew."""
        return trigger_words(self.lora.metadata, self.path)


_files: OrderedDict[tuple[str, Identity, tuple[Identity, ...]], Loaded] = OrderedDict()


def load(name: str, path: str) -> Loaded:
    """The LoRA of this name at this path, read only if the file on disk or its adapter_config.json is not the one
    already in memory."""
    beside = tuple(map(identity, configurations(path)))
    found = _files.pop((name, identity(path), beside), None)
    if found is None:
        file = replace(read_file(path), source=name)
        found = Loaded(name, path, file, from_file(file))
    _files[name, found.file.identity, beside] = found
    while len(_files) > 1 and sum(map(_size, _files.values())) > BUDGET:
        _files.popitem(last=False)
    return found


_hashes: dict[Identity, str] = {}
_stated: dict[Identity, str] = {}


def known_hash(path: str) -> str:
    """The SHA-256 of a file's tensors if it has been computed before, else ""."""
    return _hashes.get(identity(path), "")


def stated_hash(path: str) -> str:
    """What the file's header states (see files.stated_hash)."""
    seen = identity(path)
    if seen not in _stated:
        _stated[seen] = files.stated_hash(path)
    return _stated[seen]


def hash_of(file: Identity) -> str:
    """The SHA-256 of the tensors that a file had then, if it has been computed, else ""."""
    return _hashes.get(file, "")


def file_of(lora: Lora) -> Identity | None:
    """What a Lora was read from; None for one that is not of a file in memory."""
    return next((loaded.file.identity for loaded in _files.values() if loaded.lora is lora), None)


def tensor_hash(path: str) -> str:
    """The SHA-256 of a file's tensors, computed once for each content."""
    seen = identity(path)
    if seen not in _hashes:
        _hashes[seen] = files.tensor_hash(path)
    return _hashes[seen]


def differs(path: str, sha256: str) -> bool:
    """Whether a file's tensors are other than those of this hash ("": no matter which)."""
    return bool(sha256) and tensor_hash(path) != sha256


@lru_cache(maxsize=256)
def report_of(name: str, path: str, state: str) -> Report:
    """What the file of this name is, as long as it is in this state (see names.state). Its tensors are not kept."""
    lora = from_file(replace(read_file(path), source=name))
    return report(lora, trigger_words(lora.metadata, path))


weights: WeakKeyDictionary[Any, str] = WeakKeyDictionary()  # module -> the hash of its weights (shelf.weights_key)


runs: OrderedDict[str, Any] = OrderedDict()  # id -> Run, the one begun last at the end


def keep_run(run: Any) -> None:
    """Keep a run that begins, in place of the one that it goes on with."""
    runs[run.id] = run
    runs.move_to_end(run.id)
    while len(runs) > RUNS:
        runs.popitem(last=False)


@lru_cache(maxsize=1024)
def history_of(folder: Path, state: Identity) -> dict[str, Any] | None:
    """How the run of this folder went, as long as its history is in this state; None where that cannot be read."""
    try:
        return history.read(folder).told()
    except (OSError, ValueError):
        return None


@lru_cache(maxsize=8)
def target_map_of(shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> TargetMap:
    """The TargetMap of a model whose weights have these names and shapes. Raises TargetError like recognise."""
    found = dict(shapes)
    return target_map(recognise(found), found)


@dataclass(eq=False)
class Hooks:
    """The live hooks of one model: those made last, of which entries, and those that are in its modules now, with the
    place there of each entry that runs."""

    made: Live | None = None
    made_of: tuple[frozenset[object], ...] = ()
    installed: Live | None = None
    places: Mapping[int, int] = field(default_factory=dict)


_hooks: WeakKeyDictionary[Any, Hooks] = WeakKeyDictionary()


def hooks_of(model: Any) -> Hooks:
    """The hooks of a model's modules, which all clones of its patcher share."""
    return _hooks.setdefault(model, Hooks())


def _size(loaded: Loaded) -> int:
    return sum(tensor.nbytes for tensor in loaded.file.tensors.values())
