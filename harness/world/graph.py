"""From folders of pictures to a LoRA in the graph: the pack's nodes on a ComfyUI server of its own."""

from __future__ import annotations

import io
import json
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from PIL import Image
from torch import Tensor

from harness.server import Server
from harness.workflow import Prompt, defaults

from . import host, pictures
from .pictures import SIDE, Scene

STEPS = 8  # of a sample


class Outcome(NamedTuple):
    """What the training node told, and the pictures of some captions by each way to put the LoRA on."""

    report: Mapping[str, Any]
    drawn: Mapping[str, list[Tensor]]


def train(
    comfy: Path, learned: Sequence[Scene], others: Sequence[Scene], asked: Sequence[Scene], **settings: Any
) -> Outcome:
    """Learn from a folder of scenes, with another as regularisation if there is one; settings are Train LoRA's inputs.

    Raises ServerError or WorkflowError.
    """
    with Server(comfy, models=host.models(comfy)) as server:
        for name, scenes in {"learned": learned, "others": others}.items():
            pictures.write_folder(server.base / "input" / name, scenes)
        prompt = _training(server, "others" if others else "none", settings) | _samples(
            "trained", ["train", 1], ["clip", 0], asked
        )
        entry = server.post(prompt, timeout=3600)
        report = json.loads(entry["outputs"]["train"]["lora_ops"][0])
        (saved,) = (server.base / "models" / "loras").glob("*.safetensors")
        again = _loaders() | _loaded(server, saved.name)
        for way in ("ours", "the host's"):
            again |= _samples(way, [way, 0], [way, 1], asked)
        shown = entry["outputs"] | server.post(again)["outputs"]
        ways = {"MODEL of the node": "trained", "our loader": "ours", "the host's loader": "the host's"}
        drawn = {
            told: [_picture(server, shown[f"{way} {number}"]) for number in range(len(asked))]
            for told, way in ways.items()
        }
        return Outcome(report, drawn)


def _loaders() -> Prompt:
    return {
        "model": _node("UNETLoader", unet_name=Path(host.MODEL).name, weight_dtype="default"),
        "clip": _node("CLIPLoader", clip_name=Path(host.CLIP).name, type="stable_diffusion"),
        "vae": _node("VAELoader", vae_name=Path(host.VAE).name),
    }


def _training(server: Server, regularisation: str, settings: Mapping[str, Any]) -> Prompt:
    wires = {"clip": ["clip", 0], "vae": ["vae", 0]}
    info = server.object_info()
    data = defaults("LoraOpsDataset", info) | wires | {"folder": "learned", "regularisation": regularisation}
    data |= {"resolution": str(SIDE), "bucket_step": 32}
    training = defaults("LoraOpsTrain", info) | wires | {"model": ["model", 0], "dataset": ["data", 0], **settings}
    saved = defaults("LoraOpsSaveLora", info) | {"filename_prefix": "zorp", "destination": "models"}
    saved |= {"lora": ["train", 0], "model": ["model", 0], "clip": ["clip", 0]}
    return _loaders() | {
        "data": _node("LoraOpsDataset", **data),
        "train": _node("LoraOpsTrain", **training),
        "saved": _node("LoraOpsSaveLora", **saved),
    }


def _loaded(server: Server, name: str) -> Prompt:
    wires = {"model": ["model", 0], "clip": ["clip", 0]}
    ours = defaults("LoraOpsApply", server.object_info()) | wires | {"lora": ["read", 0]}
    ours |= {"strength_model": 1.0, "strength_clip": 1.0}
    return {
        "read": _node("LoraOpsLoad", lora_name=name),
        "ours": _node("LoraOpsApply", **ours),
        "the host's": _node("LoraLoader", **wires, lora_name=name, strength_model=1.0, strength_clip=1.0),
    }


def _samples(way: str, model: list[Any], clip: list[Any], scenes: Sequence[Scene]) -> Prompt:
    found: Prompt = {"empty": _node("EmptySD3LatentImage", width=SIDE, height=SIDE, batch_size=1)}
    for number, scene in enumerate(scenes):
        text, latent, picture = (f"{way} {number} {part}" for part in ("text", "latent", "picture"))
        sampling = {"steps": STEPS, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
        sampling |= {"positive": [text, 0], "negative": [text, 0], "latent_image": ["empty", 0]}
        found |= {
            text: _node("CLIPTextEncode", text=scene.caption, clip=clip),
            latent: _node("KSampler", model=model, seed=number, **sampling),
            picture: _node("VAEDecode", samples=[latent, 0], vae=["vae", 0]),
            f"{way} {number}": _node("PreviewImage", images=[picture, 0]),
        }
    return found


def _picture(server: Server, output: Mapping[str, Any]) -> Tensor:
    (image,) = output["images"]
    png = server.get(f"/view?{urllib.parse.urlencode(image)}")
    pixels = numpy.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    return torch.from_numpy(pixels.copy()).movedim(-1, 0) / 255


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}
