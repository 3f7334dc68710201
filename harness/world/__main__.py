"""`python -m harness.world`: train the small world, sample it, write a folder of zorps to train a LoRA on, or measure
on it what is said of LoRAs."""

from __future__ import annotations

import argparse
import importlib
import random
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from harness import comfy, inside
from harness.comfy import PACK
from harness.environment import cache
from harness.server import MOUNT, link

from . import host, pictures, reading

STEPS = (1000, 1000, 140)  # of the trainings, one after the other; the metadata of the kept weights says what differed


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m harness.world", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train the weights anew and keep them in the repository")
    train.add_argument("--steps", type=int, nargs="+", default=STEPS, help="of each training; the next one goes on")
    train.add_argument("--more", action="store_true", help="let the first one go on, too, from the kept weights")
    train.add_argument("--out", type=Path, default=host.MODELS / host.MODEL, help="where the weights are kept")
    sample = commands.add_parser("sample", help="draw captions and say what the pictures show")
    sample.add_argument("--caption", action="append", help="as often as you like; without one, 40 that it never saw")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--out", type=Path, default=Path("out/world.png"))
    zorps = commands.add_parser("zorps", help="20 pictures and captions of what the base never saw")
    zorps.add_argument("folder", type=Path)
    models = commands.add_parser("models", help="put its models into a folder like ComfyUI's models")
    models.add_argument("folder", type=Path)
    claims = commands.add_parser("claims", help="measure what is said of LoRAs, and write the page")
    claims.add_argument("--only", nargs="+", metavar="CLAIM", help="these alone; the others stay as they are")
    claims.add_argument("--steps", type=int, default=160, help="of each training")
    claims.add_argument("--out", type=Path, default=PACK / "docs" / "small-world")
    asked = parser.parse_args()

    if asked.command == "zorps":
        pictures.write_folder(asked.folder, pictures.some_zorps()[0])
        return
    path = comfy.find()
    if path is None:
        raise SystemExit("ComfyUI not found: set COMFYUI_PATH")
    inside.mount(path)
    if asked.command == "train":
        _train(path, asked.steps, asked.more, asked.out)
    elif asked.command == "models":
        there = host.models(path)
        for file in there.rglob("*.safetensors"):
            link(file, asked.folder / file.relative_to(there))
    elif asked.command == "claims":
        _measure(path, asked.only, asked.steps, asked.out)
    else:
        _sample(path, asked.caption, asked.seed, asked.out)


def _sample(path: Path, captions: list[str] | None, seed: int, out: Path) -> None:
    scenes = [] if captions else random.Random(seed).sample(pictures.split()[1], 40)
    text = host.embeddings(host.load_clip(path), captions or [scene.caption for scene in scenes])
    shown = host.sample(host.load_model(), host.load_vae(), text, seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    pictures.save(pictures.sheet(shown, 10), out)
    for number, picture in enumerate(shown):
        meant = scenes[number].caption if scenes else captions[number]
        print(f"{meant}  ->  {reading.read(picture).caption}")
    if scenes:
        print({name: f"{share:.0%}" for name, share in reading.agreement(list(shown), scenes).items()})
    print(f"wrote {out}")


def _measure(path: Path, only: list[str] | None, steps: int, out: Path) -> None:
    from . import claims

    if unknown := set(only or ()) - set(claims.CLAIMS):
        raise SystemExit(f"{', '.join(sorted(unknown))}: no claim. There are {', '.join(claims.CLAIMS)}.")
    claims.measure(path, only or list(claims.CLAIMS), steps, out)


def _train(path: Path, steps: Sequence[int], more: bool, out: Path) -> None:
    from . import training

    files = importlib.import_module(f"{MOUNT}.lora_ops.files")
    text = _cached_embeddings(path, [*(scene.caption for scene in pictures.split()[0]), ""])
    start = files.read(out) if more else None
    for number in steps:
        before = f"{start.metadata['steps']}, " if start else ""
        training.train(text, number, partial(_keep, out, before), start.tensors if start else None)
        start = files.read(out)


def _cached_embeddings(path: Path, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Minutes of CLIP, once; in half precision."""
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
            tokens, pooled = host.embeddings(host.load_clip(path), captions, told)
        held = {"tokens": tokens.half(), "pooled": pooled.half()}
        files.write(file, held, {"captions": wanted}, overwrite=True)
    found = files.read(file).tensors
    return found["tokens"], found["pooled"]


def _keep(target: Path, before: str, weights: dict[str, torch.Tensor], steps: int) -> None:
    """before are the steps of each training that the weights had until then."""
    files = importlib.import_module(f"{MOUNT}.lora_ops.files")
    target.parent.mkdir(parents=True, exist_ok=True)
    told = {
        "made_by": "python -m harness.world train",
        "seed": "0",
        "steps": f"{before}{steps}",
        "licence": "GPL-3.0-or-later",
        "pictures": "procedural (harness/world/pictures.py)",
    }
    files.write(target, weights, told, overwrite=True)
    print(f"wrote {target.name} ({target.stat().st_size / 1e6:.1f} MB)", flush=True)


if __name__ == "__main__":
    main()
