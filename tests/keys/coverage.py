"""The README's table: how many modules of each model a file in each dialect brings home, here and in the host.

`python -m tests.keys.coverage COMFYUI_FOLDER` from the repository writes it between the README's marks. Each cell is a
LoRA of rank 1 for every linear and convolution module of the real model, on the meta device: the host's class gives
the native names, diffusers' the others. Text encoders are the published ones, which the laws hold to the host's.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from harness import configs
from lora_ops.dialects import target_map
from lora_ops.families import FAMILIES, Family
from lora_ops.families.base import Component, Shapes
from lora_ops.files import TensorFile
from lora_ops.landing import land
from lora_ops.lora import TargetMap, from_file
from lora_ops.stack import PARTS, Entry

README = Path(__file__).parents[2] / "README.md"
MARK = "<!-- coverage -->"

KOHYA = ".lora_up.weight", ".lora_down.weight"
PEFT = ".lora_B.weight", ".lora_A.weight"
LAYERS = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)

Modules = Mapping[str, tuple[int, ...]]  # name -> shape of its weight


class Row(NamedTuple):
    """A file dialect. In its names {native} and {diffusers} are a module's dotted names, those with _ the flat ones,
    {processor} is diffusers' with an attention processor; {pipe} is what diffusers' pipelines call the denoiser."""

    name: str
    factors: tuple[str, str]
    note: str = ""


DENOISER_ROWS = (
    Row("lora_unet_{native_}", KOHYA),
    Row("diffusion_model.{native}", PEFT),
    Row("{native}", PEFT),
    Row("base_model.model.{native}", PEFT),
    Row("model.diffusion_model.{native}", PEFT),
    Row("{pipe}.{diffusers}", PEFT),
    Row("{pipe}.{diffusers}", (".lora.up.weight", ".lora.down.weight"), " `.lora.up`"),
    Row("{pipe}.{processor}", ("_lora.up.weight", "_lora.down.weight")),
    Row("{diffusers}", PEFT),
    Row("diffusion_model.{diffusers}", PEFT),
    Row("base_model.model.{diffusers}", PEFT),
    Row("base_model.model.{diffusers}", (".lora_B.default.weight", ".lora_A.default.weight"), " `.default`"),
    Row("{pipe}.base_model.model.{diffusers}", PEFT),
    Row("lora_unet_{diffusers_}", KOHYA),
    Row("lora_transformer_{diffusers_}", KOHYA),
    Row("lycoris_{diffusers_}", KOHYA),
)

# {kohya}, {pipe} and {host} are what these call the encoder, {short} is its module without `text_model.`, {headless} a
# language model's without `model.`, as kohya's scripts hold it
TEXT_ROWS = (
    Row("{kohya}{headless_}", KOHYA),
    Row("{pipe}{native}", (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"), " `.lora_linear_layer`"),
    Row("{pipe}{native}", PEFT),
    Row("{pipe}{short}", PEFT),
    Row("{host}{native}", PEFT),
    Row("base_model.model.{native}", PEFT),
)


UNCOUNTED = "?"


class Count(NamedTuple):
    """Of all modules, or that nobody counted (-1)."""

    ours: int
    host: int
    total: int

    def __str__(self) -> str:
        if self.total and self.ours < 0:
            return UNCOUNTED
        ours, host = ("✓" if count == self.total else str(count) for count in (self.ours, self.host))
        return f"{ours} · {host}" if self.total else "–"


def tables(every: int = 1) -> str:
    """Both tables as Markdown, with each so many-th cell counted; the host must be importable."""
    from comfyui_version import __version__ as version

    families = [family for family in FAMILIES if family.name in configs.PUBLISHED]
    denoisers = [_denoiser(family, every, column) for column, family in enumerate(families)]
    encoders = [_encoders(family, every, column) for column, family in enumerate(families)]
    titles = [family.title for family in families]
    return "\n\n".join(
        (
            _markdown(f"denoiser, ComfyUI {version}", titles, DENOISER_ROWS, denoisers),
            _markdown("text encoders", titles, TEXT_ROWS, encoders),
        )
    )


def _denoiser(family: Family, every: int, column: int) -> list[Count]:
    import comfy.lora

    model = _host_model(family.name)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.diffusion_model.state_dict().items()}
    targets = target_map(family, {f"diffusion_model.{key}": shape for key, shape in shapes.items()})
    names = [
        *({"native": name, "shape": shape} for name, shape in _layers(model.diffusion_model)),
        *_diffusers_names(family.name),
    ]
    keys = comfy.lora.model_lora_keys_unet(model, {})
    return _counts(DENOISER_ROWS, names, targets, keys, every, column)


def _diffusers_names(family: str) -> Iterator[dict[str, Any]]:
    if family not in configs.DIFFUSERS:
        return
    cls, config = configs.DIFFUSERS[family]
    with torch.device("meta"):
        tree = getattr(importlib.import_module("diffusers"), cls)(**config)
    pipe = "unet" if "UNet" in cls else "transformer"
    for name, shape in _layers(tree):
        found = {"diffusers": name, "pipe": pipe, "shape": shape}
        attention, to, projection = name.rpartition(".to_")
        if to and pipe == "unet" and ".attn" in attention:  # transformers never had such files
            found["processor"] = f"{attention}.processor.to_{projection.removesuffix('.0')}"
        yield found


def _encoders(family: Family, every: int, column: int) -> list[Count]:
    import comfy.lora

    components = [component for component in family.components if component.part == "clip"]
    shapes = {key: shape for key, shape in family.published().items() if not key.startswith("diffusion_model.")}
    targets = target_map(family, shapes)
    names = [found for component in components for found in _encoder_names(component)]
    keys = comfy.lora.model_lora_keys_clip(_StateDict(shapes), {})
    return _counts(TEXT_ROWS, names, targets, keys, every, column)


def _encoder_names(component: Component) -> Iterator[dict[str, Any]]:
    prefixes = component.prefixes
    for key, shape in component.published().items():
        if len(shape) == 2 and not any(word in key for word in ("embed", "shared", "relative")):
            name = key.removesuffix(".weight")
            found = {
                "native": name,
                "headless": name.removeprefix("model."),
                "shape": shape,
                "host": prefixes["comfy"][0],
            }
            found |= {"kohya": prefixes["kohya"][0], "pipe": prefixes["diffusers"][0]}
            short = name.removeprefix("text_model.")
            yield found if short == name else found | {"short": short}


class _StateDict(NamedTuple):
    """As much of a model as the host asks for the names of text encoders."""

    shapes: Shapes

    def state_dict(self) -> Shapes:
        return self.shapes


def _spelled(row: Row, names: list[dict[str, Any]]) -> list[tuple[str, tuple[int, ...]]]:
    """The modules' names in this dialect, with the shapes of their weights; those it has no name for are left out."""
    found = []
    for words in names:
        flat = {
            f"{word}_": name.replace(".", "_")
            for word, name in words.items()
            if word in ("native", "headless", "diffusers")
        }
        try:
            found.append((row.name.format(**words, **flat), words["shape"]))
        except KeyError:
            continue
    return found


def _counts(
    rows: tuple[Row, ...],
    names: list[dict[str, Any]],
    targets: TargetMap,
    keys: Mapping[str, Any],
    every: int,
    column: int,
) -> list[Count]:
    spelled = [_spelled(row, names) for row in rows]
    return [
        Count(-1, -1, len(modules)) if (number + column) % every else _count(modules, row.factors, targets, keys)
        for number, (row, modules) in enumerate(zip(rows, spelled, strict=True))
    ]


def _count(
    modules: list[tuple[str, tuple[int, ...]]], factors: tuple[str, str], targets: TargetMap, keys: Mapping[str, Any]
) -> Count:
    """How many of these modules land here, and for how many the host makes a patch. Names that two modules share (of
    two text encoders) are two files."""
    import comfy.lora
    import comfy.lora_convert

    files: list[dict[str, tuple[int, ...]]] = []
    for name, shape in modules:
        if all(name in file for file in files):
            files.append({})
        next(file for file in files if name not in file)[name] = shape
    ours = theirs = 0
    for file in files:
        tensors = {}
        for name, (rows, columns, *kernel) in file.items():
            tensors[name + factors[0]] = torch.zeros(()).expand(rows, 1, *(1 for _ in kernel))
            tensors[name + factors[1]] = torch.zeros(()).expand(1, columns, *kernel)
        landing = land([Entry(from_file(TensorFile("table", tensors)), dict.fromkeys(PARTS, 1.0))], targets)
        ours += len(landing.rows[0].landed)
        patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(tensors), keys, log_missing=False)
        loaded = {key for patch in patches.values() for key in patch.loaded_keys}
        theirs += sum(name + factors[0] in loaded for name in file)
    return Count(ours, theirs, len(modules))


def _host_model(family: str) -> Any:
    import comfy.supported_models

    cls, config = configs.PUBLISHED[family]  # under torch.device("meta") a sampler's 10,000 numbers take half a minute
    return getattr(comfy.supported_models, cls)(dict(config)).get_model({}, "", device=torch.device("meta"))


def _layers(tree: torch.nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, module in tree.named_modules():
        if isinstance(module, LAYERS):
            yield name, tuple(module.weight.shape)


def _markdown(corner: str, titles: list[str], rows: tuple[Row, ...], columns: list[list[Count]]) -> str:
    lines = [[corner, *titles], ["---"] * (len(titles) + 1)]
    totals = [sorted({count.total for count in column} - {0}) for column in columns]
    lines.append(["modules", *(", ".join(map(str, each)) or "–" for each in totals)])
    for number, row in enumerate(rows):
        name = row.name.replace("{", "<").replace("}", ">")
        lines.append([f"`{name}`{row.note}", *(str(column[number]) for column in columns)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def written() -> str:
    """The table that stands between the README's marks."""
    return README.read_text("utf-8").split(MARK)[1]


def same(counted: str, there: str) -> bool:
    """Whether two tables agree in every cell that was counted."""
    cells, others = (table.split("|") for table in (counted, there))
    return len(cells) == len(others) and all(
        cell == other or cell.strip() == UNCOUNTED for cell, other in zip(cells, others, strict=True)
    )


def main(comfy_folder: str, *check: str) -> int:
    """Write the table, or, with --check=4, tell whether the one that is there is right in each fourth cell."""
    sys.path[0] = comfy_folder
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    every = int(check[0].partition("=")[2] or 1) if check else 1
    table = f"\n{tables(every)}\n"
    if check:
        print(table)
        return int(not same(table, written()))
    before, _, after = README.read_text("utf-8").split(MARK)
    README.write_text(f"{before}{MARK}{table}{MARK}{after}", "utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
