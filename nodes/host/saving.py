"""Saving: MODEL, CLIP and VAE, each weight with all that is on it, as files that the host's own loaders read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import comfy.model_management
from comfy.cli_args import args
from torch import Tensor

from ...lora_ops.checkpoints import shards
from ...lora_ops.files import Files, Lazy, Progress, write, write_folder, write_folder_numbered, write_numbered
from ...lora_ops.layouts.metadata import BASES
from ...lora_ops.recipe import KEY as RECIPE
from ...lora_ops.recipe import Ingredient, Recipe
from . import ledger
from .baking import unbaked
from .checkpoints import File, Part, files_of, predict_key
from .destinations import Destination
from .patching import targets
from .renaming import Placeholder, Renamed, computed, renamed
from .verifying import Verified, verify

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Saved:
    """A file that was written: how many tensors in which dtypes, how far from the live weights, and what is not in
    it."""

    path: Path
    bytes: int
    tensors: int
    dtypes: Mapping[str, int]
    verified: Verified
    notes: tuple[str, ...]

    @property
    def stored(self) -> str:
        return ", ".join(f"{count} {dtype}" for dtype, count in sorted(self.dtypes.items()))

    @property
    def data(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}


def save(
    layout: str,
    parts: Mapping[str, Part],
    to: Destination,
    if_exists: str,
    graph: Mapping[str, str],
    progress: Progress,
    shard: float = 5e9,
) -> list[Saved]:
    """Write the files of a layout, each verified before it has its name; if one fails, none of them stays.

    graph is the workflow, for the metadata; shard is the size of a folder's files, in bytes. progress hears the bytes
    written, read back and compared, of all files.
    Raises what files.write and verify do.
    """
    planned = [_planned(file) for file in files_of(layout, parts)]
    total, before = sum(plan.work for plan in planned), 0
    done: list[Saved] = []
    try:
        for plan in planned:
            told = partial(_told, progress, before, total)
            done.append(plan.written(to, if_exists, graph, told, shard))
            before += plan.work
    except BaseException:
        for saved in done:
            saved.path.unlink()
        raise
    finally:
        to.refresh()
    return done


def put(
    to: Destination,
    ending: str,
    if_exists: str,
    tensors: Mapping[str, Tensor | Lazy],
    metadata: Mapping[str, str],
    progress: Progress,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Write a file (see files.write) under the next free number of a name, or under the name itself if that is free."""
    if if_exists == "number":
        return write_numbered(partial(to.numbered, ending), tensors, metadata, progress=progress, check=check)
    path = to.path(ending)
    write(path, tensors, metadata, overwrite=False, progress=progress, check=check)
    return path


def put_folder(
    to: Destination,
    if_exists: str,
    files: Files,
    texts: Mapping[str, str],
    copies: Mapping[str, Path],
    progress: Progress,
    check: Callable[[Path], None],
) -> Path:
    """The same for a folder."""
    if if_exists == "number":
        return write_folder_numbered(partial(to.numbered, ""), files, texts, copies, progress=progress, check=check)
    write_folder(to.path(""), files, texts, copies, overwrite=False, progress=progress, check=check)
    return to.path("")


def _size(path: Path) -> int:
    return sum(each.stat().st_size for each in path.rglob("*")) if path.is_dir() else path.stat().st_size


def _told(progress: Progress, before: int, total: int, done: int) -> None:
    progress(min(before + done, total), total)


@dataclass(frozen=True, eq=False)
class _Plan:
    file: File
    tensors: Mapping[str, Tensor | Lazy]
    kept: Mapping[str, frozenset[str]]  # part -> its weights that are in the file

    @cached_property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def work(self) -> int:
        """Bytes that are written, read back and compared, and those that are gone through before."""
        return 3 * self.bytes + sum(each.before for each in self.tensors.values() if isinstance(each, Lazy))

    def written(
        self, to: Destination, if_exists: str, graph: Mapping[str, str], told: Callable[[int], None], shard: float
    ) -> Saved:
        metadata = described(self.file, to.name) | graph
        verified, done = Verified(), 0

        def so_far(now: int, _total: int = 0) -> None:
            nonlocal done
            done = now
            told(done)

        def check(path: Path) -> None:
            nonlocal verified
            verified = verify(path, self.file, self.kept, lambda size: so_far(done + size))

        if self.file.folder:
            files, texts = shards(self.tensors, shard)
            inside = {f"{self.file.folder}/{name}": (tensors, metadata) for name, tensors in files.items()}
            texts = {f"{self.file.folder}/{name}": text for name, text in texts.items()} | dict(self.file.texts)
            path = put_folder(to, if_exists, inside, texts, self.file.copies, so_far, check)
        else:
            path = put(to, self.file.ending + SUFFIX, if_exists, self.tensors, metadata, so_far, check)
        dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in self.tensors.values())
        return Saved(path, _size(path), len(self.tensors), dict(dtypes), verified, tuple(self.notes()))

    def notes(self) -> list[str]:
        found = []
        for part in self.file.parts:
            name, kept, source = part.name, self.kept[part.name], part.source
            if part.dtype is None and (alone := kept - source.dtypes.keys()):
                why = source.without or f"{min(alone)}, say, is not in its file"
                found.append(f"{name}: {len(alone)} tensors have the dtype that they have in memory: {why}")
            lost = [key for key, weight in part.weights.items() if weight.patches and key not in kept]
            found += [f"{name}: {key} is patched and has no place in this layout" for key in lost]
            found += [f"{name}: not in the file: {what}" for what in unbaked(part.patcher)]
        if self.file.folder and self.file.texts:
            what = "config.json is made from the weights: where the model is no published one, compare it with its own"
            found.append(f"{self.file.folder}: {what}")
        elif self.file.folder and not self.file.copies:
            found.append(f"{self.file.folder}: no config.json: take the one of the model it was made from")
        return found


def _planned(file: File) -> _Plan:
    live = {f"{part.name}/{key}": (part, key) for part in file.parts for key in part.weights}
    inputs = {
        name: Placeholder.of(name, part.weights[key].shape, part.written(key)) for name, (part, key) in live.items()
    }
    found = renamed(file.save, inputs)

    def lazy(name: str, result: Renamed) -> Tensor | Lazy:
        if not result.origins:
            return result.tensor
        weights = {
            origin: (part.weights[key], part.written(key)) for origin in result.origins for part, key in [live[origin]]
        }
        kept = not any(weight.patches for weight, _ in weights.values())
        made = partial(Lazy, result.tensor.dtype, tuple(result.tensor.shape), kept=kept)
        if result.whole:
            ((weight, dtype),) = weights.values()
            return made(partial(weight.chunks, dtype), before=weight.before)

        def chunks() -> list[Tensor]:
            values = {origin: weight.rounded(dtype) for origin, (weight, dtype) in weights.items()}
            return [computed(file.save, inputs, values)[name]]

        return made(chunks)

    origins = frozenset().union(*(result.origins for result in found.values()))
    kept = {part.name: frozenset(key for key in part.weights if f"{part.name}/{key}" in origins) for part in file.parts}
    return _Plan(file, {name: lazy(name, result) for name, result in found.items()}, kept)


GRAPH = ("prompt", "workflow")  # of another file, in what a file was made of
STALE = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash", *GRAPH)


def described(file: File, title: str) -> dict[str, str]:
    """What a file says of itself: what its source said, as far as it is still true, and what ModelSpec asks for."""
    main = file.parts[0]
    stale = {*STALE, *(() if main.dtype is None else ("_quantization_metadata",))}
    told = {key: value for key, value in main.source.metadata.items() if key not in stale}
    told |= {"format": "pt", "modelspec.sai_model_spec": "1.0.1", "modelspec.title": title}
    told["modelspec.date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    if recipe := _recipe(file, told):
        told[RECIPE] = recipe.text
    if main.name == "model":
        if base := BASES.get(targets(main.thing, None).family):
            told["modelspec.architecture"] = base.architecture
        if predicted := predict_key(main.thing):
            told["modelspec.predict_key"] = predicted
    return told


def _recipe(file: File, told: Mapping[str, str]) -> Recipe | None:
    """The LoRAs that were in the source already, then those of our nodes, each with its strengths; None without any."""
    rows: dict[str, Ingredient] = {}
    for part in file.parts:
        for each in ledger.records(part.patcher):
            before = rows[each.row].strengths if each.row in rows else {}
            rows[each.row] = Ingredient(each.name, each.sha256(), {**before, each.part: each.strength}, each.blocks)
    found = Recipe.of_metadata(told, "the source").joined(Recipe(tuple(rows.values())))
    return found if found.loras else None


def device() -> str:
    """Where the host computes, for work on files."""
    return str(comfy.model_management.get_torch_device())


def workflow(prompt: Any, extra: Mapping[str, Any] | None) -> dict[str, str]:
    """What makes the front end reopen the graph of a file that is dropped on it; nothing with --disable-metadata."""
    if args.disable_metadata:
        return {}
    told = {} if prompt is None else {"prompt": json.dumps(prompt)}
    return told | {key: json.dumps(value) for key, value in (extra or {}).items()}
