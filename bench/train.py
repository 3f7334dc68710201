"""Training a LoRA: the host's Train LoRA node, a PEFT loop on diffusers' model, a loop by hand on the host's, ours.

One model's shapes with random weights, every linear map and convolution at one rank, AdamW, one picture a step. Each
contestant runs in a process of its own. A step's time is the least of the steps after the first; CPU seconds depend
less on what else the machine does. Memory is what the process needed on top of the loaded model (on a GPU: what was
allocated at most).
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from harness import inside
from harness.comfy import PACK
from harness.server import MOUNT

from .report import machine, write

CONTESTANTS = ("peft", "peft, checkpointing", "hand", "ours", "ours, checkpointing", "host")
DTYPES = {"fp32": None, "bf16": torch.bfloat16}
TEXT = 768


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench train", description=__doc__)
    parser.add_argument("--comfy", type=Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--small", action="store_true", help="a model of megabytes: tries the bench, measures nothing")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--latent", type=int, default=16, help="side of the latent")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--only", nargs=2, metavar=("CONTESTANT", "DTYPE"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.only:
        print(json.dumps(_measured(asked, *asked.only)), flush=True)
        return
    rows = []
    for dtype in asked.dtypes:
        for contestant in asked.contestants:
            command = [sys.executable, "-m", "bench.train", *sys.argv[1:], "--only", contestant, dtype]
            done = subprocess.run(command, cwd=PACK, env=os.environ, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"failed": done.returncode}
            rows.append({"dtype": dtype, "contestant": contestant, **found})
            print(json.dumps(rows[-1]), flush=True)
    about = {
        **machine(asked.comfy),
        "model": "sd15" + (" (small)" if asked.small else ""),
        "rank": asked.rank,
        "latent": asked.latent,
        "steps": asked.steps,
    }
    write(asked.out, "bench-train", about, rows, _markdown(about, rows))


def _measured(asked: argparse.Namespace, contestant: str, dtype: str) -> dict[str, Any]:
    inside.mount(asked.comfy, cuda=torch.cuda.is_available())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    who, _, checkpointing = contestant.partition(", ")
    prepare = {"peft": _peft, "hand": _hand, "ours": _ours, "host": _host}
    made = prepare[who](asked, device, DTYPES[dtype], **({"checkpointing": True} if checkpointing else {}))
    loaded = _memory(device, reset=True)
    times: list[tuple[float, float]] = []
    foreseen = made.loop(lambda: times.append((time.perf_counter(), time.process_time())))
    steps = [tuple(b - a for a, b in zip(*pair, strict=True)) for pair in itertools.pairwise(times)]
    wall, cpu = (min(column) for column in zip(*steps, strict=True))
    extra = (_memory(device) - loaded) / 2**20
    told = {"step_s": round(wall, 4), "cpu_s": round(cpu, 4), "extra_mb": round(extra), "modules": made.modules}
    return told if foreseen is None else told | {"foreseen_mb": round(foreseen / 2**20)}


def _memory(device: torch.device, *, reset: bool = False) -> int:
    """The most bytes in use since the last reset."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024


class Made(NamedTuple):
    loop: Callable[[Callable[[], None]], int | None]  # tells when a step is done; gives the bytes that were foreseen
    modules: int | None  # that train


def _latent(asked: argparse.Namespace) -> torch.Tensor:
    return torch.randn(1, 4, asked.latent, asked.latent, generator=torch.Generator().manual_seed(3))


def _text() -> torch.Tensor:
    return torch.randn(1, 77, TEXT, generator=torch.Generator().manual_seed(4))


def _epsilon_loop(
    asked: argparse.Namespace,
    device: torch.device,
    autocast: torch.dtype | None,
    parameters: list[nn.Parameter],
    modules: int,
    answer: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
) -> Made:
    """What diffusers' script does each step."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=device.type == "cuda")
    latent, text = _latent(asked).to(device), _text().to(device)

    def loop(done: Callable[[], None]) -> None:
        for _ in range(asked.steps + 1):
            noise, moment = torch.randn_like(latent), torch.randint(0, 1000, (1,), device=device)
            with torch.autocast(device.type, autocast or torch.bfloat16, enabled=autocast is not None):
                loss = functional.mse_loss(answer(latent + noise, moment, text).float(), noise)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            float(loss.detach())
            done()

    return Made(loop, modules)


def _peft(
    asked: argparse.Namespace, device: torch.device, autocast: torch.dtype | None, *, checkpointing: bool = False
) -> Made:
    import peft
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    small: dict[str, Any] = {"block_out_channels": (32, 64, 128, 128)} if asked.small else {}
    unet: Any = UNet2DConditionModel(cross_attention_dim=TEXT, **small).requires_grad_(False)
    unet.to(device)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    names = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    model = peft.get_peft_model(unet, peft.LoraConfig(r=asked.rank, lora_alpha=asked.rank, target_modules=names))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return _epsilon_loop(asked, device, autocast, parameters, len(names), lambda x, t, text: model(x, t, text).sample)


def _hand(asked: argparse.Namespace, device: torch.device, autocast: torch.dtype | None) -> Made:
    network = inside.model("sd15", smaller=asked.small).model.diffusion_model.to(device)
    maps: list[Any] = [module for module in network.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    parameters: list[nn.Parameter] = []
    for module in maps:
        parameters += _wrapped(module, asked.rank, device)

    def answer(x: torch.Tensor, moment: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return network(x, moment, context=text)

    return _epsilon_loop(asked, device, autocast, parameters, len(maps), answer)


def _wrapped(module: Any, rank: int, device: torch.device) -> list[nn.Parameter]:
    """The shortest LoRA there is."""
    forward, weight = module.forward, module.weight
    down = nn.Parameter(torch.randn(rank, *weight.shape[1:], device=device) / rank)
    up = nn.Parameter(torch.zeros(len(weight), rank, *(1 for _ in weight.shape[2:]), device=device))
    if len(weight.shape) > 2:
        stride, padding = module.stride, module.padding
        module.forward = lambda x: (
            forward(x) + functional.conv2d(functional.conv2d(x, down, stride=stride, padding=padding), up)
        )
    else:
        module.forward = lambda x: forward(x) + functional.linear(functional.linear(x, down), up)
    return [up, down]


def _ours(
    asked: argparse.Namespace, device: torch.device, autocast: torch.dtype | None, *, checkpointing: bool = False
) -> Made:
    import comfy.model_management

    training = _pack("nodes.host.training")
    loop_of, plan_of = _pack("lora_ops.train.loop"), _pack("lora_ops.train.plan")
    patcher = inside.model("sd15", smaller=asked.small)
    comfy.model_management.load_models_gpu([patcher])
    model = training.Model(patcher)
    everywhere = _pack("lora_ops.train.places").Aim(_pack("lora_ops.select").Pattern.parse("*"), asked.rank)
    plan = plan_of.Plan(steps=asked.steps + 1, aims=(everywhere,), autocast=autocast)
    where, timesteps = plan.places(model.targets()), _pack("lora_ops.train.timesteps").Timesteps()
    item = model.item(_latent(asked)[0], [[_text(), {}]])
    begun = model.begin(plan, where, [item], timesteps)
    wrappers = model.wrappers(begun)

    def loop(done: Callable[[], None]) -> int:
        run = loop_of.Run(plan, *wrappers)
        with model.running(wrappers, [item], checkpointing=checkpointing, autocast=autocast) as found:
            loop_of.train(run, [item], model.predict, model.sampling, timesteps, progress=lambda _: done())
            return model.foreseen(found, run).total

    return Made(loop, len(where))


def _host(asked: argparse.Namespace, device: torch.device, autocast: torch.dtype | None) -> Made:
    import comfy.utils
    from comfy_extras.nodes_train import TrainLoraNode

    def again(*_: Any, **__: Any) -> Any:
        return inside.model("sd15", smaller=asked.small)

    patcher = again()
    patcher.cached_patcher_init = (again, ())  # the node takes a second copy of the model
    values = {
        "model": patcher,
        "latents": {"samples": _latent(asked)},
        "positive": [[_text(), {}]],
        "batch_size": 1,
        "steps": asked.steps + 1,
        "grad_accumulation_steps": 1,
        "learning_rate": 1e-4,
        "rank": asked.rank,
        "optimizer": "AdamW",
        "loss_function": "MSE",
        "seed": 0,
        "training_dtype": "fp32" if autocast is None else "bf16",
        "lora_dtype": "fp32",
        "quantized_backward": False,
        "algorithm": "LoRA",
        "gradient_checkpointing": False,
        "checkpoint_depth": 1,
        "offloading": False,
        "existing_lora": "[None]",
        "bucket_mode": False,
        "bypass_mode": False,
    }

    def loop(done: Callable[[], None]) -> None:
        comfy.utils.set_progress_bar_global_hook(lambda *_, **__: done())
        TrainLoraNode.execute(**{name: [value] for name, value in values.items()})

    return Made(loop, None)


def _pack(name: str) -> Any:
    return importlib.import_module(f"{MOUNT}.{name}")


def _markdown(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    told = ", ".join(f"{key} {value}" for key, value in about.items())
    lines = [f"# Training\n\n{told}\n", "| dtype | who | step s | CPU s | extra MB | foreseen |", "|" + "---|" * 6]
    for row in rows:
        figures = (
            ["failed"]
            if "failed" in row
            else [row["step_s"], row["cpu_s"], row["extra_mb"], row.get("foreseen_mb", "")]
        )
        lines.append(f"| {row['dtype']} | {row['contestant']} | {' | '.join(map(str, figures))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
