"""Merging a LoRA into a checkpoint file: `python -m lora_ops merge` beside cp + fsync + one read of the same file on
the same disk, and beside the host's own loading, patching and CheckpointSave.

The base is in the page cache for all; what was written is read from the disk. Contestants take turns; times are
medians. Memory is the anonymous memory (RssAnon) of the process above what its imports had taken, sampled.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

from harness.comfy import PACK
from lora_ops import checkpoints, samples
from lora_ops.cli import leave_threads
from lora_ops.dialects import published_map
from lora_ops.families import FAMILIES
from lora_ops.files import Lazy, read_header, write
from lora_ops.landing import land
from lora_ops.lora import read_lora
from lora_ops.stack import PARTS, Entry

RANK = 16
MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench merge", description=__doc__)
    parser.add_argument("--comfy", type=Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--child", nargs=4, metavar=("WHO", "BASE", "LORA", "OUT"), help=argparse.SUPPRESS)
    parser.add_argument("--families", nargs="+", choices=["sd15", "sdxl"], default=["sd15"], help="2.0 and 6.8 GB")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument(
        "--host", action="store_true", help="the host's CheckpointSave, too: takes three times the file"
    )
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the files, on the disk in question")
    asked = parser.parse_args()
    if asked.child:
        who, *paths = asked.child
        print(json.dumps(_measured(CHILDREN[who], asked.comfy, *map(Path, paths))))
        return
    asked.out.mkdir(parents=True, exist_ok=True)
    for family in asked.families:
        row = _row(family, asked)
        print(json.dumps(row, indent=1), flush=True)
        (asked.out / f"bench-merge-{family}.json").write_text(json.dumps(row), encoding="utf-8")


def _row(family: str, asked: argparse.Namespace) -> dict[str, Any]:
    base, lora, out = (asked.out / f"bench-{name}.safetensors" for name in (family, f"{family}-lora", "result"))
    _make(family, base, lora)
    runs: dict[str, list[dict[str, float]]] = {"cp": [], "ours": [], **({"host": []} if asked.host else {})}
    try:
        for _ in range(asked.repeat):
            for who, done in runs.items():
                _read(base)
                out.unlink(missing_ok=True)
                os.sync()
                done.append(_cp(base, out) if who == "cp" else _child(who, asked.comfy, base, lora, out))
    finally:
        for path in (base, lora, out):
            path.unlink(missing_ok=True)
    found = {
        f"{who}_{name}": round(median(run[name] for run in done), 3) for who, done in runs.items() for name in done[0]
    }
    about = {"family": family, "gb": round(_size_of[family] / 1e9, 3), "repeat": asked.repeat}
    return {**about, **found, "ours_to_cp": round(found["ours_seconds"] / found["cp_seconds"], 3)}


_size_of: dict[str, int] = {}


def _make(family: str, base: Path, lora: Path) -> None:
    """A random fp16 checkpoint of the published shapes, and a LoRA of rank 16 for all that trainers usually train."""
    (found,) = (each for each in FAMILIES if each.name == family)
    generator = torch.Generator().manual_seed(0)
    noise = (torch.randn(8 * MIB, generator=generator) * 0.02).half()

    def chunks(shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
        row = max(torch.Size(shape[1:]).numel(), 1)
        step = max(len(noise) // row, 1)
        for start in range(0, shape[0], step):
            rows = min(step, shape[0] - start)
            yield noise[: rows * row].reshape(rows, *shape[1:])

    shapes = {key: shape for key, shape in found.published().items() if shape}
    weights = {
        _in_checkpoint(family, key): Lazy(torch.float16, shape, lambda s=shape: chunks(s))
        for key, shape in shapes.items()
    }
    write(base, weights, {"format": "pt"}, overwrite=True)
    _size_of[family] = base.stat().st_size
    factors = {}
    for module, target in samples._modules("kohya", published_map(found)):
        rows, *inputs = target.delta_shape
        factors[f"{module}.lora_up.weight"] = torch.randn(
            rows, RANK, *(1 for _ in inputs[1:]), generator=generator
        ).half()
        factors[f"{module}.lora_down.weight"] = (torch.randn(RANK, *inputs, generator=generator) * 1e-3).half()
        factors[f"{module}.alpha"] = torch.tensor(float(RANK))
    write(lora, factors, overwrite=True)


def _in_checkpoint(family: str, key: str) -> str:
    first = "cond_stage_model" if family == "sd15" else "conditioner.embedders.0"
    prefixes = {"diffusion_model.": "model.diffusion_model.", "clip_l.": f"{first}."}
    prefixes["clip_g.transformer."] = "conditioner.embedders.1.model."
    prefix = next(prefix for prefix in prefixes if key.startswith(prefix))
    return prefixes[prefix] + key.removeprefix(prefix)


def _read(path: Path) -> None:
    with open(path, "rb", buffering=0) as file:
        room = bytearray(4 * MIB)
        while file.readinto(room):
            pass


def _cp(base: Path, out: Path) -> dict[str, float]:
    start = time.perf_counter()
    subprocess.run(["cp", str(base), str(out)], check=True)
    with open(out, "rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    copied = time.perf_counter() - start
    _read(out)
    return {"seconds": time.perf_counter() - start, "until_synced": copied}


def _child(who: str, comfy: Path, base: Path, lora: Path, out: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.merge", "--comfy", str(comfy), "--child", who, *map(str, (base, lora, out))]
    done = subprocess.run(command, cwd=PACK, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _measured(contestant: Callable[..., Callable[[], None]], *paths: Path) -> dict[str, float]:
    run = contestant(*paths)
    before, peak, stop = _anonymous(), 0.0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not stop.wait(0.01):
            peak = max(peak, _anonymous())

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        start, cpu = time.perf_counter(), time.process_time()
        run()
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    finally:  # or a contestant that fails would never end
        stop.set()
        sampler.join()
    return {"seconds": seconds, "cpu_seconds": cpu, "anonymous_mb": peak - before}


def _anonymous() -> float:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else float("nan")


def _ours(_: Path, base: Path, lora: Path, out: Path) -> Callable[[], None]:
    read_header(base)
    leave_threads()  # as `python -m lora_ops` does

    def run() -> None:
        opened = checkpoints.opened(base)
        landing = land([Entry(read_lora(str(lora)), dict.fromkeys(PARTS, 0.8))], opened.targets)
        checkpoints.merge(opened, landing, out)

    return run


def _host(comfy_path: Path, base: Path, lora: Path, out: Path) -> Callable[[], None]:
    """Loading, patching and saving, which is what it takes there; the VAE is left out."""
    sys.path.insert(0, str(comfy_path))
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import comfy.sd
    import comfy.utils

    def run() -> None:
        model, clip, *_ = comfy.sd.load_checkpoint_guess_config(
            str(base), output_vae=False, model_options={"dtype": torch.float16}
        )
        tensors = comfy.utils.load_torch_file(str(lora), safe_load=True)
        model, clip = comfy.sd.load_lora_for_models(model, clip, tensors, 0.8, 0.8)
        comfy.sd.save_checkpoint(str(out), model, clip)

    return run


CHILDREN = {"ours": _ours, "host": _host}

if __name__ == "__main__":
    with torch.inference_mode():
        main()
