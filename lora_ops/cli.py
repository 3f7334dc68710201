"""The command line: the pack's operations on files."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from . import checkpoints, samples
from .checkpoints import opened
from .errors import FileError, LoraOpsError, StackError, TargetError, shown
from .families import FAMILIES, Family, Shapes, recognise
from .files import Header, Progress, read_header, read_tensors, sha256, tensor_hash, write
from .landing import Landing, guess, land, merged, require_coverage
from .layouts import LAYOUTS
from .layouts import write as write_lora
from .lora import Lora, TargetMap, read_lora
from .receipt import Receipt, by_weight, receipt
from .recipe import Ingredient, Recipe
from .report import report
from .select import decimal, parse_selectors
from .stack import PARTS, Entry, finite
from .survival import Survival
from .words import trigger_words

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TOLERANCE = 1e-6  # of the demo's merge against float64, relative to the weight: float32 carries 6e-8


def leave_threads() -> None:
    """Half of torch's threads compute in a process of our own: reading, writing and checking go on at the same time."""
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 done, 1 refused (the reason is on standard error), 130 interrupted."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except LoraOpsError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("cancelled: nothing was changed", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lora_ops", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="what a LoRA file is: family, dialect, modules, ranks, trigger words")
    info.add_argument("file", help="a LoRA file, or a folder that PEFT saved")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(command=_info)

    check = commands.add_parser("check", help="whether a LoRA file fits a checkpoint; exit status 1 if it does not")
    check.add_argument("file")
    check.add_argument("--model", required=True, metavar="CHECKPOINT", help="a checkpoint: a file or folder")
    check.add_argument("--min-coverage", type=float, default=0.9, help="share of modules that must land (0.9)")
    check.add_argument("--json", action="store_true", help="print JSON")
    check.set_defaults(command=_check)

    convert = commands.add_parser("convert", help="write a LoRA as another program reads it, with the same effect")
    convert.add_argument("file", help="a LoRA file, or the folder of one that PEFT saved")
    convert.add_argument("-o", "--out", required=True, help="the new file; for peft the new folder")
    convert.add_argument("--layout", required=True, choices=[layout.name for layout in LAYOUTS])
    names = [family.name for family in FAMILIES]
    made_for = convert.add_mutually_exclusive_group()
    made_for.add_argument(
        "--family", choices=names, metavar="NAME", help=f"{', '.join(names)} (guessed by its modules)"
    )
    made_for.add_argument("--model", metavar="CHECKPOINT", help="the model it is for, where that has other shapes")
    convert.add_argument("--dtype", choices=DTYPES, help="round the factors to this (each keeps its own)")
    convert.add_argument("--overwrite", action="store_true", help="replace what is there")
    convert.set_defaults(command=_convert)

    merge = commands.add_parser("merge", help="write a checkpoint with LoRAs in it, of any size in little memory")
    merge.add_argument("base", metavar="BASE", help="a checkpoint: a file, or a folder of shards or of diffusers")
    merge.add_argument(
        "loras",
        nargs="+",
        metavar="LORA[:STRENGTH[/CLIP][:BLOCKS]]",
        help="a LoRA, its strength (1), one for the text encoders, selectors: ink.safetensors:0.8/0.4:role:mlp=0",
    )
    _add_out(merge)
    merge.add_argument("--min-coverage", type=float, default=0.9, help="share of modules that must land (0.9)")
    merge.add_argument(
        "--dtype",
        default="keep",
        choices=["keep", *checkpoints.DTYPES],
        help="round all weights of model and text encoders to this (keep: each to its own; fp8: matrices alone)",
    )
    merge.add_argument("--single-file", action="store_true", help="write shards as one file")
    merge.set_defaults(command=_merge)

    unmerge = commands.add_parser("unmerge", help="take LoRAs off a merged checkpoint again, by the recipe in it")
    unmerge.add_argument("merged", metavar="MERGED", help="a checkpoint that `merge` wrote")
    unmerge.add_argument("loras", nargs="*", metavar="LORA", help="names in its recipe, or their files (all)")
    _add_out(unmerge)
    unmerge.add_argument("--base", help="the checkpoint before, to measure how far from it rounding leaves the result")
    unmerge.add_argument("--loras", dest="folder", type=Path, metavar="FOLDER", help="where the LoRA files lie")
    unmerge.set_defaults(command=_unmerge)

    demo = commands.add_parser("demo", help="the main job on small random files: read, stack, land, apply, verify")
    demo.add_argument("--out", type=Path, default=Path("out"), help="folder for files and receipt (out)")
    demo.set_defaults(command=_demo)
    return parser


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--out", required=True, help="the new file, or folder where a folder is merged into")
    parser.add_argument("--device", default="cpu", help="where to compute: cpu, cuda")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _info(options: argparse.Namespace) -> int:
    lora = read_lora(options.file)
    told = report(lora, trigger_words(lora.metadata, lora.name))
    file, tensors = sha256(lora.name), tensor_hash(lora.name)  # of the file itself where a PEFT folder was named
    text = f"{told.text}\nSHA-256 of the file {file}\nSHA-256 of its tensors {tensors}"
    print(_json({**told.data, "file_sha256": file, "sha256": tensors}) if options.json else text)
    return 0


def _check(options: argparse.Namespace) -> int:
    landing, told = _landed([_entry(options.file)], opened(options.model).targets)
    print(_json(told.data) if options.json else told.text)
    require_coverage(landing, options.min_coverage)
    return 0


def _convert(options: argparse.Namespace) -> int:
    lora = read_lora(options.file)
    (layout,) = (layout for layout in LAYOUTS if layout.name == options.layout)
    shapes = _shapes(read_header(options.model)) if options.model else None
    family = recognise(shapes) if shapes else _family(options.family, lora)
    dtype = DTYPES[options.dtype] if options.dtype else None
    laid = write_lora(options.out, lora, layout, family, shapes=shapes, dtype=dtype, overwrite=options.overwrite)
    alphas = sorted({alpha for module in laid.modules if (alpha := module.factors.alpha) is not None})
    print(
        f"wrote {options.out}\n{len(lora.modules)} modules as {len(laid.modules)} in the layout {layout.name}, "
        f"for {family.title}\nalpha {', '.join(f'{alpha:g}' for alpha in alphas) or 'none'} in {layout.alpha_in}"
    )
    if not layout.alpha and any(module.factors.alpha != module.factors.rank for module in laid.modules):
        print(f"a program that does not read {layout.alpha_in} (ComfyUI's own loader) takes every scale as 1")
    if laid.folded:
        print(
            f"{len(laid.folded)} modules join parts of different scales, rounded to float32 ({shown(laid.folded[0])})"
        )
    return 0


def _family(name: str | None, lora: Lora) -> Family:
    """The family of this name, else the one that the LoRA looks made for."""
    likely = None if name else guess(lora)
    name = likely.family if likely else name
    for family in FAMILIES:
        if family.name == name:
            return family
    raise TargetError("looks made for no family this version knows.", file=lora.name, remedy="Name it with --family.")


def _merge(options: argparse.Namespace) -> int:
    base = opened(options.base)
    landing, told = _landed(map(parse_lora, options.loras), base.targets)
    require_coverage(landing, options.min_coverage)
    start = time.perf_counter()
    survival = checkpoints.merge(
        base,
        landing,
        options.out,
        dtype=checkpoints.DTYPES.get(options.dtype),
        device=_device(options.device),
        single=options.single_file,
        overwrite=options.overwrite,
        progress=_progress(),
    )
    seconds = time.perf_counter() - start
    _tell_written(options, _with_survival(landing, told, survival), seconds, skipped=base.skipped)
    return 0


def _unmerge(options: argparse.Namespace) -> int:
    merged_one = opened(options.merged)
    base = opened(options.base) if options.base else None
    held = Recipe.of_metadata(merged_one.metadata, options.merged)
    given = [path for path in options.loras if os.path.exists(path)]
    entry_of = partial(_entry_of, given=given, folder=options.folder)
    landing, left = checkpoints.subtract(held, options.loras, entry_of, merged_one.targets, options.merged)
    start = time.perf_counter()
    checkpoints.merge(
        *(merged_one, landing, options.out),
        loras=left,
        device=_device(options.device),
        overwrite=options.overwrite,
        progress=_progress(),
    )
    seconds = time.perf_counter() - start
    told = receipt(landing, seconds)
    if base:
        found = checkpoints.distance(opened(options.out), base)
        text = (
            f"distance from {shown(options.base)}: {found.relative:.2e} of its weights, at worst {found.worst:.2e}"
            f" ({shown(found.worst_name)}); {found.different} of {found.weights} weights differ"
        )
        data: dict[str, object] = {"distance": vars(found)}
    else:
        bounds = checkpoints.bounds(merged_one, opened(options.out), landing)
        listed = ", ".join(f"{name} {share:.1e} (at least {least:.1e})" for name, (share, least) in bounds.items())
        text = f"rounding leaves each changed value within this share of the largest it ever was: {listed or 'none'}"
        data = {"bounds": {name: bound._asdict() for name, bound in bounds.items()}}
    told = replace(told, data={**told.data, **data}, text=f"{told.text}\n{text}")
    _tell_written(options, told, seconds, skipped=merged_one.skipped)
    return 0


def _with_survival(landing: Landing, told: Receipt, survival: Mapping[str, Survival]) -> Receipt:
    """The receipt of a merged file: of each weight, how much of its update is in it."""
    if not survival:
        return told
    told = receipt(landing, told.data["landing_seconds"], survival=survival, predicted=False)
    return replace(told, data={**told.data, "survival_by_weight": by_weight(survival)})


def _tell_written(options: argparse.Namespace, told: Receipt, seconds: float, skipped: Sequence[str]) -> None:
    out = Path(options.out)
    paths = [path for path in out.rglob("*") if path.is_file()] if out.is_dir() else [out]
    size = sum(path.stat().st_size for path in paths)
    if options.json:
        written = {"out": options.out, "bytes": size, "seconds": round(seconds, 3), "skipped": list(skipped)}
        print(_json({**told.data, **written}))
        return
    print(f"{told.text}\nwrote {options.out}: {size / 1e9:.3f} GB in {seconds:.1f} s, read back and compared")
    if skipped:
        print(f"left out: {len(skipped)} files of the same weights in other formats ({shown(skipped[0])})")


def parse_lora(text: str) -> Entry:
    """The stack's entry that `LORA[:STRENGTH[/CLIP][:BLOCKS]]` means. The longest beginning that is there as a file is
    the LoRA: paths may have colons, too. Raises StackError or FileError, naming what is wrong."""
    cuts = [len(text), *(place for place in range(len(text) - 1, 0, -1) if text[place] == ":")]
    cut = next((cut for cut in cuts if os.path.exists(text[:cut])), None)
    if cut is None:
        raise FileError("there is no such LoRA file.", file=text, remedy="Write LORA[:STRENGTH[/CLIP][:BLOCKS]].")
    written, _, blocks = text[cut + 1 :].partition(":")
    numbers = [finite(decimal(each), f"The strength '{shown(each)}'") for each in written.split("/")] if written else []
    if len(numbers) > 2 or (cut < len(text) and not written):
        raise StackError(f"'{shown(text)}' has no strength that can be read.", remedy="Write 0.8, or 0.8/0.4.")
    model, clip = (numbers * 2)[:2] if numbers else (1.0, 1.0)
    return replace(_entry(text[:cut]), strengths={"model": model, "clip": clip}, blocks=parse_selectors(blocks))


def _entry(path: str) -> Entry:
    """A LoRA at strength 1, under its file's name and with the hash of its tensors."""
    lora = read_lora(path)
    return Entry(replace(lora, name=Path(path).name), dict.fromkeys(PARTS, 1.0), sha256=tensor_hash(lora.name))


def _entry_of(ingredient: Ingredient, given: Sequence[str], folder: Path | None) -> Entry:
    """The LoRA of an ingredient as it was merged: among the files that were given, then by name, then by its hash."""
    there = sorted(folder.rglob("*.safetensors")) if folder else []
    named = [path for path in map(Path, given) if path.stem == Path(ingredient.lora).stem]
    named += [path for path in there if path.stem == Path(ingredient.lora).stem]
    others = [path for path in (*map(Path, given), *there) if path not in named]
    for path in (*named, *(others if ingredient.sha256 else ())):
        file = path / "adapter_model.safetensors" if path.is_dir() else path
        if not ingredient.sha256 or tensor_hash(file) == ingredient.sha256:
            blocks = parse_selectors(ingredient.blocks)
            strengths = {**dict.fromkeys(PARTS, 0.0), **ingredient.strengths}
            return replace(_entry(str(path)), strengths=strengths, blocks=blocks)
    found = "has other tensors than were merged" if named else "is not there"
    remedy = "Name the folder with --loras, or the file itself."
    raise FileError(f"{found}.", file=ingredient.lora, remedy=remedy, sha256=ingredient.sha256)


def _device(name: str) -> str:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise LoraOpsError(f"'{shown(name)}' is no device of this machine.", remedy="Use cpu.") from error
    return name


def _progress() -> Progress:
    """A line on standard error with bytes and seconds left: kept up to date in a terminal, else one now and then."""
    start = last = time.monotonic()
    terminal = sys.stderr.isatty()

    def told(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < (0.2 if terminal else 5) and done < total:
            return
        last = now
        left = math.ceil((now - start) * (total - done) / done)
        line = f"{done / 1e9:.2f} of {total / 1e9:.2f} GB written and read back, {left} s left"
        print(f"\r{line}\x1b[K" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)
        if terminal and done >= total:
            print(file=sys.stderr)

    return told


def _demo(options: argparse.Namespace) -> int:
    options.out.mkdir(parents=True, exist_ok=True)
    base, result = options.out / "checkpoint.safetensors", options.out / "checkpoint-with-loras.safetensors"
    write(base, samples.small_checkpoint(), overwrite=True)
    header = read_header(base)
    loras = samples.write_samples(_shapes(header), options.out)
    landing, told = _landed(map(_entry, map(str, loras)), opened(base).targets)
    require_coverage(landing, 1.0)
    weights = dict(read_tensors(header, header.entries))
    write(result, applied(weights, landing), header.metadata, overwrite=True)
    worst = _worst_error(weights, landing)
    (options.out / "receipt.json").write_text(_json(told.data), encoding="utf-8")
    print(f"{told.text}\nworst error against float64: {worst:.1e} of the weight\nwrote {result} and receipt.json")
    return 0 if worst < TOLERANCE else 1


def _shapes(header: Header) -> Shapes:
    return {key: entry.shape for key, entry in header.entries.items()}


def applied(weights: Mapping[str, Tensor], landing: Landing) -> dict[str, Tensor]:
    """A checkpoint's weights with a landing in them; weights without a piece are passed on as they are."""
    pieces = {key: there for (_, key), there in landing.pieces.items()}
    return {key: merged(weight, pieces[key]) if key in pieces else weight for key, weight in weights.items()}


def _landed(entries: Iterable[Entry], targets: TargetMap) -> tuple[Landing, Receipt]:
    stack = list(entries)
    start = time.perf_counter()
    landing = land(stack, targets)
    return landing, receipt(landing, time.perf_counter() - start)


def _worst_error(weights: Mapping[str, Tensor], landing: Landing) -> float:
    """Largest relative distance, over the changed weights, of the float32 merge from the same in float64."""
    worst = 0.0
    for (_, key), pieces in landing.pieces.items():
        exact = weights[key].double()
        for piece in pieces:
            rows = exact if piece.band is None else exact.narrow(0, piece.band.start, piece.band.length)
            piece.adapter.add_(rows, piece.strength)
        error = (merged(weights[key].float(), pieces).double() - exact).norm() / exact.norm()
        worst = max(worst, float(error))
    return worst


def _json(data: Mapping[str, object]) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False)
