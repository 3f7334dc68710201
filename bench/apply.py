"""Applying LoRAs: the host's loaders, ours, and the bound that the host's own patcher sets, on one model in one run.

The bound is one in-place addmm per weight through the same ModelPatcher, its factors joined and scaled beforehand.
Times are the least of the repetitions, the contestants taking turns, each with as little memory at hand; memory is what
the process needed on top while it patched. A step's overhead is the median of its ratios to the base model's step in
the same round, in CPU seconds where there is no GPU: they depend less on what else the machine does. Models and LoRAs
are random, all attention and feed-forward matrices are changed.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch

from harness import inside
from harness.server import MOUNT

from .report import machine, write

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
TARGETS = re.compile(r"(attn\d?\.to_\w+(\.0)?|ff\.net\.\d(\.proj)?|_attn\.(qkv|proj)|_mlp\.\d|linear[12])\.weight$")
STRENGTH = 0.8


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench apply", description=__doc__)
    parser.add_argument("--comfy", type=Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--family", choices=inside.FAMILIES, default="sd15")
    parser.add_argument("--small", action="store_true", help="a model of megabytes: tries the bench, measures nothing")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--ranks", nargs="+", type=int, default=[16, 32, 128])
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--latent", type=int, default=32, help="side of the latent for the step's overhead")
    parser.add_argument(
        "--rounds", type=int, default=7, help="rounds of steps, 0 for none: half precision is slow on CPU"
    )
    parser.add_argument("--out", type=Path, default=Path("out"))
    asked = parser.parse_args()
    inside.mount(asked.comfy, cuda=torch.cuda.is_available())
    rows = list(_rows(asked))
    about = {
        **machine(asked.comfy),
        "family": asked.family + (" (small)" if asked.small else ""),
        "repeat": asked.repeat,
    }
    write(asked.out, "bench-apply", about, rows, _markdown(about, rows))


def _rows(asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for dtype in asked.dtypes:
        model = inside.model(asked.family, DTYPES[dtype], smaller=asked.small)
        for rank in asked.ranks:
            loras = [_lora(model, rank, seed) for seed in range(max(asked.counts))]
            for count in asked.counts:
                row = {"dtype": dtype, "rank": rank, "loras": count, **_measured(model, loras[:count], asked)}
                print(json.dumps(row), flush=True)
                yield row


def _lora(model: Any, rank: int, seed: int) -> dict[str, torch.Tensor]:
    """A random LoRA in kohya's dialect, ΔW about 3 % of W; alpha = rank / 2."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, torch.Tensor] = {}
    for key, weight in model.model.state_dict().items():
        if TARGETS.search(key) and weight.ndim == 2:
            name = "lora_unet_" + key.removeprefix("diffusion_model.").removesuffix(".weight").replace(".", "_")
            rows, columns = weight.shape
            up = torch.randn(rows, rank, generator=generator) * 0.06 / rank**0.5
            down = torch.randn(rank, columns, generator=generator) / columns**0.5
            found |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
            found[f"{name}.alpha"] = torch.tensor(rank / 2)
    return found


def _measured(model: Any, loras: list[dict[str, torch.Tensor]], asked: argparse.Namespace) -> dict[str, Any]:
    ours = _Ours(loras)
    makers: dict[str, Callable[[float], Any]] = {
        "host": lambda first: _host(model, loras, first),
        "ours": lambda first: ours.put(model, first, "patch"),
        "bound": lambda first: _bound(model, loras, first),
    }
    patchers, found = {}, {}
    for name, make in makers.items():
        make(STRENGTH)  # warm
        seconds, patchers[name] = _timed(lambda make=make: make(STRENGTH))
        found[f"{name}_node_s"] = seconds
    patch: dict[str, list[tuple[float, float, float]]] = {name: [] for name in patchers}
    turns = list(patchers.items())
    for number in range(asked.repeat):
        for name, patcher in turns[number % len(turns) :] + turns[: number % len(turns)]:
            patch[name].append(_patching(patcher))
    for name, times in patch.items():
        found[f"{name}_patch_s"], found[f"{name}_cpu_s"], found[f"{name}_extra_mb"] = map(min, zip(*times, strict=True))
    found |= _errors(model, patchers, loras)
    found |= _changes(makers, ours, model)
    found |= _steps(model, patchers, ours, loras, asked)
    return {key: round(value, 9 if "error" in key else 5) for key, value in found.items()}


class _Ours:
    """Our patch and live modes, with files parsed once as the cache does it."""

    def __init__(self, loras: list[dict[str, torch.Tensor]]) -> None:
        self._landing, self._stack = _pack("lora_ops.landing"), _pack("lora_ops.stack")
        self._patching = _pack("nodes.host.patching")
        files, lora = _pack("lora_ops.files"), _pack("lora_ops.lora")
        self._loras = [lora.from_file(files.TensorFile(f"lora {n}", tensors)) for n, tensors in enumerate(loras)]

    def put(self, model: Any, first: float, mode: str) -> Any:
        strengths = [first] + [STRENGTH] * (len(self._loras) - 1)
        pairs = zip(self._loras, strengths, strict=True)
        stack = [self._stack.Entry(each, {"model": strength, "clip": 1.0}) for each, strength in pairs]
        landed = self._landing.land(stack, self._patching.targets(model, None))
        return self._patching.applied(landed, mode, model, None).model


def _host(model: Any, loras: list[dict[str, torch.Tensor]], first: float) -> Any:
    import comfy.sd

    for number, tensors in enumerate(loras):
        model, _ = comfy.sd.load_lora_for_models(model, None, dict(tensors), STRENGTH if number else first, 0)
    return model


def _bypass(model: Any, loras: list[dict[str, torch.Tensor]]) -> Any:
    import comfy.sd

    return comfy.sd.load_bypass_lora_for_models(model, None, dict(loras[0]), STRENGTH, 0)[0]


def _bound(model: Any, loras: list[dict[str, torch.Tensor]], first: float) -> Any:
    from comfy.weight_adapter.base import WeightAdapterBase

    class Bound(WeightAdapterBase):
        name = "bound"

        def __init__(self, loaded_keys: set[str], weights: tuple[torch.Tensor, torch.Tensor]) -> None:
            self.loaded_keys, self.weights = loaded_keys, weights

        def calculate_weight(self, weight: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            up, down = (factor.to(weight) for factor in self.weights)
            return weight.addmm_(up, down)

    patches = {}
    for key in model.model.state_dict():
        if f"{_name(key)}.alpha" in loras[0]:
            pairs = [(lora[f"{_name(key)}.lora_up.weight"], lora[f"{_name(key)}.lora_down.weight"]) for lora in loras]
            ups = [up * (STRENGTH if number else first) / 2 for number, (up, _) in enumerate(pairs)]
            patches[key] = Bound(set(), (torch.cat(ups, dim=1), torch.cat([down for _, down in pairs])))
    patcher = model.clone()
    patcher.add_patches(patches)
    return patcher


def _name(key: str) -> str:
    return "lora_unet_" + key.removeprefix("diffusion_model.").removesuffix(".weight").replace(".", "_")


def _patching(patcher: Any) -> tuple[float, float, float]:
    """Seconds, CPU seconds and extra megabytes of patching all weights; the model is unpatched again."""
    device = patcher.load_device
    _give_back()
    _reset_peak()
    before, cpu = _memory(), time.process_time()
    seconds, _ = _timed(lambda: patcher.patch_model(device))
    cpu, extra = time.process_time() - cpu, _peak() - before
    patcher.unpatch_model(patcher.offload_device)
    return seconds, cpu, extra


def _changes(makers: dict[str, Callable[[float], Any]], ours: _Ours, model: Any) -> dict[str, float]:
    """Seconds from a changed first strength to a model that is ready: node, unpatching and patching (or injecting)."""
    import comfy.model_management

    makers = {**makers, "live": lambda first: ours.put(model, first, "live")}
    found = {}
    for name, make in makers.items():
        patcher = make(STRENGTH)
        comfy.model_management.load_models_gpu([patcher])
        times = []
        for first in (0.5, 0.6):
            changed = make(first)
            seconds, _ = _timed(lambda changed=changed: comfy.model_management.load_models_gpu([changed]))
            times.append(seconds)
            patcher = changed
        patcher.detach()
        found[f"{name}_change_s"] = min(times)
    return found


def _steps(
    model: Any, patchers: dict[str, Any], ours: _Ours, loras: list[dict[str, torch.Tensor]], asked: argparse.Namespace
) -> dict[str, float]:
    """Seconds of one call of the model, and what live and the host's bypass (one LoRA) add to it, in percent."""
    if not asked.rounds:
        return {}
    contestants = {"base": model, "ours": patchers["ours"], "live": ours.put(model, STRENGTH, "live")}
    if len(loras) == 1:
        contestants["bypass"] = _bypass(model, loras)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(asked.rounds):
        turns = list(contestants.items())
        for name, patcher in turns[number % len(turns) :] + turns[: number % len(turns)]:
            inside.run(patcher, side=asked.latent)  # loaded and warm
            cpu = time.process_time()
            seconds, _ = _timed(lambda patcher=patcher: inside.run(patcher, side=asked.latent))
            times[name].append(seconds if torch.cuda.is_available() else time.process_time() - cpu)
    patchers["ours"].detach()
    ratios = {
        name: [mine / base for mine, base in zip(each, times["base"], strict=True)] for name, each in times.items()
    }
    overhead = {f"{name}_overhead_percent": 100 * (median(each) - 1) for name, each in ratios.items() if name != "base"}
    return {"step_s": min(times["base"]), **overhead}


def _errors(model: Any, patchers: dict[str, Any], loras: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Distance of W' from the float64 sum, relative to W, over one weight of each shape."""
    shapes: dict[tuple[int, ...], str] = {}
    for key in patchers["ours"].patches:
        shapes.setdefault(tuple(model.model.state_dict()[key].shape), key)
    found = {}
    for name in ("host", "ours"):
        wrong = whole = 0.0
        for key in shapes.values():
            exact = model.model.state_dict()[key].double()
            for lora in loras:
                up, down = lora[f"{_name(key)}.lora_up.weight"], lora[f"{_name(key)}.lora_down.weight"]
                exact = exact + STRENGTH * 0.5 * (up.double() @ down.double()).to(exact.device)
            weight = patchers[name].patch_weight_to_device(key, model.load_device, return_weight=True).double()
            wrong += float(((weight - exact) ** 2).sum())
            whole += float((exact**2).sum())
        found[f"{name}_error"] = (wrong / whole) ** 0.5
    return found


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    found = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, found


def _give_back() -> None:
    """Freed memory goes back to the system, so that each contestant begins with as little: to get it again takes as
    long as a patch."""
    gc.collect()
    if sys.platform == "linux":
        with suppress(AttributeError):  # another C library than GNU's
            ctypes.CDLL(None).malloc_trim(0)


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from here


def _memory() -> float:
    return torch.cuda.memory_allocated() / 2**20 if torch.cuda.is_available() else _status("VmRSS")


def _peak() -> float:
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else _status("VmHWM")


def _status(name: str) -> float:
    """A value of this process in megabytes; not a number where the system does not tell."""
    status = Path("/proc/self/status")
    found = re.search(rf"{name}:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) / 1024 if found else float("nan")


def _pack(name: str) -> Any:
    return importlib.import_module(f"{MOUNT}.{name}")


def _markdown(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    lines = [f"# Applying LoRAs: {about['family']}, {about['device']}", "", f"`{json.dumps(about)}`", ""]
    lines += [
        "| weights | rank | LoRAs | patch s: host | ours | bound | host / ours | ours / bound | change s: host | ours "
        "| bound | live | error: host | ours | step s | patch +% | live +% | bypass +% | extra MB: host | ours "
        "| node ms: host | ours |",
        "|" + "---|" * 22,
    ]
    for row in rows:
        cells = [
            *(row["dtype"], row["rank"], row["loras"]),
            *(f"{row[f'{name}_patch_s']:.3f}" for name in ("host", "ours", "bound")),
            f"{row['host_patch_s'] / row['ours_patch_s']:.2f}",
            f"{row['ours_patch_s'] / row['bound_patch_s']:.2f}",
            *(f"{row[f'{name}_change_s']:.4f}" for name in ("host", "ours", "bound", "live")),
            *(f"{row[f'{name}_error']:.2e}" for name in ("host", "ours")),
            f"{row['step_s']:.3f}" if "step_s" in row else "",
            *(_percent(row.get(f"{name}_overhead_percent")) for name in ("ours", "live", "bypass")),
            *(f"{row[f'{name}_extra_mb']:.0f}" for name in ("host", "ours")),
            *(f"{1000 * row[f'{name}_node_s']:.0f}" for name in ("host", "ours")),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:+.1f}"


if __name__ == "__main__":
    with torch.inference_mode():
        main()
