"""`python -m harness.world`: train the small world, sample it, or write a folder of zorps to train a LoRA on."""

from __future__ import annotations

import argparse
import importlib
import random
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from harness import comfy, inside
from harness.environment import cache
from harness.server import MOUNT

from . import host, pictures, reading


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m harness.world", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train the weights anew and keep them in the repository")
    train.add_argument(
        "what",
        choices=("autoencoder", "decoder", "model"),
        help="in this order; the last two, in any, need the first's latents",
    )
    train.add_argument("--steps", type=int, required=True)
    train.add_argument("--more", action="store_true", help="go on from the kept weights (model only)")
    sample = commands.add_parser("sample", help="draw captions and say what the pictures show")
    sample.add_argument("--caption", action="append", help="as often as you like; without one, 40 that it never saw")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--out", type=Path, default=Path("out/world.png"))
    zorps = commands.add_parser("zorps", help="20 pictures and captions of what the base never saw")
    zorps.add_argument("folder", type=Path)
    asked = parser.parse_args()

    if asked.command == "zorps":
        pictures.write_zorps(asked.folder)
        return
    path = comfy.find()
    if path is None:
        raise SystemExit("ComfyUI not found: set COMFYUI_PATH")
    step = asked.command if asked.command == "sample" else asked.what
    for file in {"sample": (host.VAE, host.MODEL), "decoder": (host.VAE,), "model": (host.VAE,)}.get(step, ()):
        if not (host.MODELS / file).exists():
            raise SystemExit(f"{host.MODELS / file} is not there: train autoencoder, decoder and model first.")
    inside.mount(path)
    if asked.command == "sample":
        _sample(path, asked.caption, asked.seed, asked.out)
    elif asked.what == "autoencoder":
        _train_autoencoder(asked.steps)
    elif asked.what == "decoder":
        _train_decoder(asked.steps)
    else:
        _train_model(path, asked.steps, asked.more)


def _sample(path: Path, captions: list[str] | None, seed: int, out: Path) -> None:
    scenes = [] if captions else random.Random(seed).sample(pictures.split()[1], 40)
    text = host.embeddings(path, captions or [scene.caption for scene in scenes])
    shown = host.sample(host.load_model(), host.load_vae(), text, seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    pictures.save(pictures.sheet(shown, 10), out)
    for number, picture in enumerate(shown):
        meant = scenes[number].caption if scenes else captions[number]
        print(f"{meant}  ->  {reading.read(picture).caption}")
    if scenes:
        print({name: f"{share:.0%}" for name, share in reading.agreement(list(shown), scenes).items()})
    print(f"wrote {out}")


def _train_autoencoder(steps: int) -> None:
    from . import training

    training.train_autoencoder(steps, partial(_keep, host.VAE, ""))


def _train_decoder(steps: int) -> None:
    from . import training

    weights, before = _kept(host.VAE)
    training.train_decoder(steps, partial(_keep, host.VAE, before), weights)


def _train_model(path: Path, steps: int, more: bool) -> None:
    from . import training

    captions = [scene.caption for scene in pictures.split()[0]]
    start, before = _kept(host.MODEL) if more else (None, "")
    text = _cached_embeddings(path, [*captions, ""])
    training.train_model(_kept(host.VAE)[0], text, steps, partial(_keep, host.MODEL, before), start)


def _cached_embeddings(path: Path, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """A minute of CLIP, once."""
    files = importlib.import_module(f"{MOUNT}.lora_ops.files")
    file = cache() / "world-embeddings.safetensors"
    wanted = "\n".join(captions)
    if not file.exists() or files.read_header(file).metadata.get("captions") != wanted:
        spoke = time.monotonic()

        def told(done: int) -> None:
            nonlocal spoke
            if time.monotonic() - spoke > 10:
                spoke = time.monotonic()
                print(f"captions: {done} of {len(captions)}", flush=True)

        with torch.autocast("cpu", torch.bfloat16):
            tokens, pooled = host.embeddings(path, captions, told)
        files.write(file, {"tokens": tokens, "pooled": pooled}, {"captions": wanted}, overwrite=True)
    found = files.read(file).tensors
    return found["tokens"], found["pooled"]


def _kept(file: str) -> tuple[Mapping[str, torch.Tensor], str]:
    """The weights, and the steps of each training that made them."""
    found = importlib.import_module(f"{MOUNT}.lora_ops.files").read(host.MODELS / file)
    return found.tensors, found.metadata["steps"] + ", "


def _keep(file: str, before: str, weights: dict[str, torch.Tensor], steps: int) -> None:
    files = importlib.import_module(f"{MOUNT}.lora_ops.files")
    target = host.MODELS / file
    target.parent.mkdir(parents=True, exist_ok=True)
    told = {
        "made_by": "harness/world/training.py",
        "seed": "0",
        "steps": f"{before}{steps}",
        "licence": "GPL-3.0-or-later",
        "pictures": "procedural (harness/world/pictures.py)",
    }
    files.write(target, weights, told, overwrite=True)
    print(f"wrote {target} ({target.stat().st_size / 1e6:.1f} MB)", flush=True)


if __name__ == "__main__":
    main()
