"""The command line: the pack's operations on files."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import samples
from .dialects import target_map
from .errors import LoraOpsError, TargetError, shown
from .families import FAMILIES, Family, Shapes, recognise
from .files import Header, read_header, read_tensors, sha256, tensor_hash, write
from .landing import Landing, guess, land, merged, require_coverage
from .layouts import LAYOUTS
from .layouts import write as write_lora
from .lora import Lora, TargetMap, read_lora
from .receipt import Receipt, receipt
from .report import report
from .stack import PARTS, Entry
from .words import trigger_words

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TOLERANCE = 1e-6  # of the demo's merge against float64, relative to the weight: float32 carries 6e-8


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 done, 1 refused (the reason is on standard error)."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except LoraOpsError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lora_ops", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="what a LoRA file is: family, dialect, modules, ranks, trigger words")
    info.add_argument("file", help="a LoRA file, or a folder that PEFT saved")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(command=_info)

    check = commands.add_parser("check", help="whether a LoRA file fits a checkpoint; exit status 1 if it does not")
    check.add_argument("file")
    check.add_argument("--model", required=True, metavar="CHECKPOINT", help="a checkpoint or diffusion model file")
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

    demo = commands.add_parser("demo", help="the main job on small random files: read, stack, land, apply, verify")
    demo.add_argument("--out", type=Path, default=Path("out"), help="folder for files and receipt (out)")
    demo.set_defaults(command=_demo)
    return parser


def _info(options: argparse.Namespace) -> int:
    lora = read_lora(options.file)
    told = report(lora, trigger_words(lora.metadata, lora.name))
    file, tensors = sha256(lora.name), tensor_hash(lora.name)  # of the file itself where a PEFT folder was named
    text = f"{told.text}\nSHA-256 of the file {file}\nSHA-256 of its tensors {tensors}"
    print(_json({**told.data, "file_sha256": file, "sha256": tensors}) if options.json else text)
    return 0


def _check(options: argparse.Namespace) -> int:
    landing, told = _landed([options.file], checkpoint_targets(read_header(options.model)))
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


def _demo(options: argparse.Namespace) -> int:
    options.out.mkdir(parents=True, exist_ok=True)
    base, result = options.out / "checkpoint.safetensors", options.out / "checkpoint-with-loras.safetensors"
    write(base, samples.small_checkpoint(), overwrite=True)
    header = read_header(base)
    loras = samples.write_samples(_shapes(header), options.out)
    landing, told = _landed(map(str, loras), checkpoint_targets(header))
    require_coverage(landing, 1.0)
    weights = dict(read_tensors(header, header.entries))
    write(result, applied(weights, landing), header.metadata, overwrite=True)
    worst = _worst_error(weights, landing)
    (options.out / "receipt.json").write_text(_json(told.data), encoding="utf-8")
    print(f"{told.text}\nworst error against float64: {worst:.1e} of the weight\nwrote {result} and receipt.json")
    return 0 if worst < TOLERANCE else 1


def checkpoint_targets(header: Header) -> TargetMap:
    """The TargetMap of a checkpoint file. Raises TargetError for a file of no known family."""
    shapes = _shapes(header)
    targets = target_map(recognise(shapes), shapes)
    if not targets.parts:
        raise TargetError("holds no model of a family this version knows.", file=header.path)
    return targets


def _shapes(header: Header) -> Shapes:
    return {key: entry.shape for key, entry in header.entries.items()}


def applied(weights: Mapping[str, Tensor], landing: Landing) -> dict[str, Tensor]:
    """A checkpoint's weights with a landing in them; weights without a piece are passed on as they are."""
    pieces = {key: there for (_, key), there in landing.pieces.items()}
    return {key: merged(weight, pieces[key]) if key in pieces else weight for key, weight in weights.items()}


def _landed(files: Iterable[str], targets: TargetMap) -> tuple[Landing, Receipt]:
    stack = [Entry(read_lora(file), dict.fromkeys(PARTS, 1.0)) for file in files]
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
