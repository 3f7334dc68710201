"""Checkpoint: a model on disk, told by its headers alone: one file, shards with an index, or a folder of diffusers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

from ..dialects import published_map, target_map
from ..errors import FileError, TargetError, shown
from ..families import FAMILIES, Family, Shapes, recognise, under
from ..files import Entry, Header, read_header, read_text
from ..lora import Target, TargetMap
from . import quantised

SUFFIX, INDEX = ".safetensors", ".safetensors.index.json"
INDEX_LIMIT = 64 << 20  # bytes
# Folders of a pipeline that LoRAs change. What else is in it is copied.
_COMPONENT = re.compile(r"unet|prior|decoder|transformer|text_encoder(_\d)?|text_conditioner")
_OTHER_WEIGHTS = re.compile(r".*\.(bin|ckpt|pt|pth|msgpack|h5|onnx|gguf)")
_PIPES = ("transformer", "unet")


# (file, tensor's name) -> the part of the model it is of, and the place whose values it holds
_Places = Mapping[tuple[str, str], tuple[str, Target | None]]


class Stored(NamedTuple):
    """A tensor of a file, and the place of the model whose values it holds; part is "" for what no LoRA changes."""

    name: str
    entry: Entry
    part: str
    target: Target | None


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model on disk.

    files holds the files of weights that LoRAs may change, by their name in the folder; a single file is alone in it.
    copied are the other files of the folder; skipped the same weights in formats that are not written here.
    """

    path: Path
    folder: bool
    files: Mapping[str, Header]
    stored: Mapping[str, tuple[Stored, ...]]
    targets: TargetMap
    copied: Mapping[str, Path]
    skipped: tuple[str, ...] = ()

    @property
    def metadata(self) -> Mapping[str, str]:
        """That of all files of weights; where they differ, the first's."""
        return {key: value for header in reversed(list(self.files.values())) for key, value in header.metadata.items()}

    def beside(self, file: str) -> Mapping[str, Header]:
        """Where the tensors are that belong together with those of a file: those of all shards of its folder."""
        shards = [header for name, header in self.files.items() if _folder(name) == _folder(file)]
        return {name: header for header in shards for name in header.entries}


def opened(path: str | Path) -> Checkpoint:
    """The checkpoint at a path: a file, a folder, or the index of a folder. No tensor is read.

    Raises FileError for what is no checkpoint or not whole, TargetError for a model that no family knows and for one
    whose weights are packed.
    """
    path = Path(path)
    if path.name.endswith(INDEX):
        path = path.parent
    if not path.is_dir():
        return _checkpoint(path, {path.name: read_header(path)}, {}, ())
    there = {name.as_posix(): path / name for name in sorted(_inside(path))}
    if not any(name.endswith(SUFFIX) for name in there):
        raise FileError("holds no .safetensors file.", file=path, remedy="Name a checkpoint file or its folder.")
    if any(name.startswith("transformer_2/") for name in there):
        what = "holds two models for one picture (transformer and transformer_2), for which there are different LoRAs."
        raise FileError(what, file=path, remedy="Merge into the folder of each.")
    changed = {
        name for name in there if "model_index.json" not in there or _COMPONENT.fullmatch(name.rpartition("/")[0])
    }
    weights = {name: read_header(there[name]) for name in there if name in changed and name.endswith(SUFFIX)}
    for name in there:
        if name.endswith(INDEX) and name in changed:
            _require_whole(there[name], _folder(name), weights)
    skipped = tuple(name for name in there if name in changed and _OTHER_WEIGHTS.fullmatch(name))
    copied = {name: file for name, file in there.items() if name not in weights and name not in skipped}
    return _checkpoint(path, weights, copied, skipped)


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _inside(folder: Path) -> Iterator[Path]:
    for file in folder.rglob("*"):
        name = file.relative_to(folder)
        if file.is_file() and not any(part.startswith(".") for part in name.parts):
            yield name


def _require_whole(index: Path, folder: str, weights: Mapping[str, Header]) -> None:
    """Raises FileError unless the shards that an index names are there, with the tensors that it names."""

    def refuse(what: str) -> NoReturn:
        raise FileError(what, file=index, remedy="Get the missing files from where the model came from.")

    try:
        shards = json.loads(read_text(index, INDEX_LIMIT))["weight_map"]
        pairs = [(str(name), f"{folder}/{file}" if folder else str(file)) for name, file in shards.items()]
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        refuse("is no index of shards.")
    for name, file in pairs:
        if file not in weights:
            refuse(f"names the file '{shown(file)}', which is not there.")
        if name not in weights[file].entries:
            refuse(f"names the tensor '{shown(name)}' in '{shown(file)}', which does not hold it.")


def _checkpoint(
    path: Path, weights: Mapping[str, Header], copied: Mapping[str, Path], skipped: tuple[str, ...]
) -> Checkpoint:
    for header in weights.values():
        if found := quantised.packed(header):
            module, how = found
            what = f"holds weights packed as {how}, which nothing can be merged into."
            remedy = quantised.BY_COMFYUI if how == quantised.NVFP4 else quantised.REMEDY
            raise TargetError(what, file=header.path, module=module, remedy=remedy)
    pipeline = "model_index.json" in copied
    found = None if pipeline else _with_native_names(weights)
    for pipe in ("",) if pipeline else _PIPES:
        found = found or _with_diffusers_names(weights, pipe)
    if found is None:
        raise TargetError("holds no model of a family this version knows.", file=path)
    targets, places = found
    stored = {
        file: tuple(Stored(name, entry, *places[file, name]) for name, entry in header.entries.items())
        for file, header in weights.items()
    }
    return Checkpoint(path, path.is_dir(), weights, stored, targets, copied, skipped)


def _with_native_names(weights: Mapping[str, Header]) -> tuple[TargetMap, _Places] | None:
    shapes = {name: entry.shape for header in weights.values() for name, entry in header.entries.items()}
    family = recognise(shapes)
    parts = {source: component.part for component, source, _ in family.located(shapes)}
    if not parts:
        return None
    targets = target_map(family, shapes)
    whole = {target.key: Target(target.part, target.key, target.shape) for target in targets.targets}

    def part_of(name: str) -> str:
        return next((part for source, part in parts.items() if name.startswith(source)), "")

    return targets, {
        (file, name): (part_of(name), whole.get(name)) for file, header in weights.items() for name in header.entries
    }


def _with_diffusers_names(weights: Mapping[str, Header], pipe: str) -> tuple[TargetMap, _Places] | None:
    """The files of a component called so, or of a whole pipeline (""), each component in a folder of its name."""
    names = {
        (file, name): _diffusers_name(pipe or _folder(file), name)
        for file, header in weights.items()
        for name in header.entries
    }
    shapes = {named: weights[file].entries[name].shape for (file, name), named in names.items()}
    found = _of_diffusers(shapes)
    if found is None:
        return None
    targets, places = found
    return targets, {
        place: ("clip" if named.startswith("text_") else "model", places.get(named)) for place, named in names.items()
    }


def _diffusers_name(component: str, name: str) -> str:
    """What LoRA files of diffusers call the module (or its bias) of a tensor in a component's folder."""
    return f"{component}.{name.removesuffix('.weight')}"


def _of_diffusers(names: Shapes) -> tuple[TargetMap, Mapping[str, Target]] | None:
    """The model whose weights have these names in diffusers, and which of its places each name is; None if no family's.

    Diffusers' folders are called like the components in its LoRA files, so the dialect reads them, too. The model's own
    weights are put together of their bands in the order that the published model has them in.
    """
    best: tuple[int, TargetMap, Mapping[str, Target]] | None = None
    for family in FAMILIES:
        native = _native(family, names)
        # What is no layer's weight has no name in diffusers: there it cannot tell families apart.
        bare = {key: shape for key, shape in family.published().items() if not key.endswith((".weight", ".bias"))}
        if not native or not family.recognises(under({**bare, **native}, family.components[0].sources[0])):
            continue
        targets = target_map(family, native)
        places = {name: target for name, shape in names.items() if (target := _place(name, shape, targets))}
        if best is None or len(places) > best[0]:
            best = len(places), targets, places
    return best[1:] if best else None


def _native(family: Family, names: Shapes) -> Shapes:
    """The model's own weights: of those that diffusers splits, only such as are there with all their bands."""
    published = published_map(family)
    if not any(map(published.meanings, list(names)[:: len(names) // 16 or 1])):
        return {}
    found: dict[str, dict[Target, tuple[int, ...]]] = {}
    for name, shape in names.items():
        meanings = published.meanings(name)
        if len(meanings) == 1 and shape:
            target = meanings[0].target
            found.setdefault(target.key, {})[target] = shape
    return {
        key: (sum(shape[0] for shape in there.values()), *next(iter(there.values()))[1:])
        for key, there in found.items()
        if tile(there)
    }


def tile(targets: Iterable[Target]) -> bool:
    """Whether the bands of one weight are all of its rows, each once."""
    end = rows = 0
    for target in sorted(targets, key=lambda target: target.rows.start):
        if target.rows.start != end:
            return False
        end, rows = target.rows.end, target.shape[0]
    return end == rows


def _place(name: str, shape: tuple[int, ...], targets: TargetMap) -> Target | None:
    fitting = [target for target, _ in targets.meanings(name) if target.delta_shape == shape]
    return fitting[0] if len(fitting) == 1 else None
