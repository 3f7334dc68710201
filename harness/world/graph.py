"""A folder of pictures to a LoRA through a ComfyUI server of its own, with the pack's nodes, on the small world."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from harness.server import Server

from . import host, pictures
from .pictures import Scene

# The training node's inputs that have no default of their own for a server: choices with what hangs on them.
CHOICES: Mapping[str, Any] = {
    "targets": "all",
    "adapter": "lora",
    "adapter.initial": "gaussian",
    "optimizer": "adamw",
    "optimizer.weight_decay": 0.01,
    "optimizer.lora_plus": 1.0,
    "schedule": "cosine",
    "schedule.warmup": 10,
    "objective": "auto",
    "loss": "mse",
    "timesteps": "auto",
    "text_encoder": "off",
    "resume": "auto",
}


class Outcome(NamedTuple):
    lora: bytes  # the file that Save LoRA wrote
    samples: list[bytes]  # PNGs
    report: dict[str, Any]


def train(comfy: Path, scenes: Sequence[Scene], name: str, asked: Mapping[str, Any]) -> Outcome:
    """asked are the training node's inputs besides the choices and wires. Raises ServerError or WorkflowError."""
    with Server(comfy, models=host.models(comfy), arguments=("--disable-metadata",)) as server:
        pictures.write_folder(server.base / "input" / name, scenes)
        entry = server.post(prompt(server, name, asked))
        saved = json.loads(entry["outputs"]["saved"]["lora_ops"][0])["path"]
        report = json.loads(entry["outputs"]["train"]["lora_ops"][0])
        return Outcome(Path(saved).read_bytes(), server.images(entry), report)


def prompt(server: Server, name: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    wires = {"clip": ["clip", 0], "vae": ["vae", 0]}
    data = _defaults(server, "LoraOpsDataset") | wires | {"folder": name, "resolution": "96", "bucket_step": 32}
    training = _defaults(server, "LoraOpsTrain") | dict(CHOICES) | wires
    training |= {"model": ["model", 0], "dataset": ["data", 0], "name": name, **asked}
    saved = {"lora": ["train", 0], "filename_prefix": f"loras/{name}", "layout": "kohya", "dtype": "keep"}
    saved |= {"trigger_words": "zorp", "destination": "output", "if_exists": "number", "model": ["model", 0]}
    return {
        "model": _node("UNETLoader", unet_name=Path(host.MODEL).name, weight_dtype="default"),
        "clip": _node("CLIPLoader", clip_name=Path(host.CLIP).name, type="stable_diffusion"),
        "vae": _node("VAELoader", vae_name=Path(host.VAE).name),
        "data": _node("LoraOpsDataset", **data),
        "train": _node("LoraOpsTrain", **training),
        "pictures": _node("SaveImage", images=["train", 3], filename_prefix="samples"),
        "saved": _node("LoraOpsSaveLora", **saved),
    }


def _defaults(server: Server, kind: str) -> dict[str, Any]:
    info = server.object_info()[kind]["input"]
    every = info["required"] | info.get("optional", {})
    return {name: spec[1]["default"] for name, spec in every.items() if len(spec) > 1 and "default" in spec[1]}


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}
