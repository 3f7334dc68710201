"""What `python run.py demo` does with a ComfyUI: the example workflows, run headless through its real server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness import comfy, small
from harness.comfy import PACK
from harness.server import Server, ServerError, WorkflowError
from harness.workflow import ConversionError, Prompt, brief, smaller, to_prompt, with_models, without_t5
from harness.world import host as world
from harness.world import pictures
from lora_ops import samples
from lora_ops.files import read_header

# Where the sample LoRAs of each small model go under models/loras.
SAMPLES = {
    "checkpoints/v1-5-pruned-emaonly-fp16.safetensors": "",
    "diffusion_models/flux1-dev.safetensors": "flux",
}


STEPS = 20  # of each training


def main(host: Path, out: Path) -> int:
    """Write pictures, receipts and the server's log into out; returns the exit status. host is a ComfyUI."""
    workflows = sorted((PACK / "example_workflows").glob("*.json"))
    if not workflows:
        print(f"{PACK / 'example_workflows'} holds no workflow to run.")
        return 1
    out.mkdir(parents=True, exist_ok=True)
    print(f"ComfyUI {comfy.version(host)} in {host}", flush=True)
    models = small.cached(host, *small.FILES)
    with tempfile.TemporaryDirectory(prefix="lora-ops-demo-") as folder:
        base = Path(folder)
        write_samples(models, base / "models" / "loras")
        server = Server(host, base, models=models)
        write_world(host, base / "models")
        try:
            with server:
                failures = [path.stem for path in workflows if not _run(server, path, out)]
        finally:
            (out / "server.log").write_text(server.log(), encoding="utf-8")
    print(f"\nThe server's log is {_shown(out / 'server.log')}")
    if failures:
        print(f"FAILED: {', '.join(failures)}")
    return 1 if failures else 0


def write_samples(models: Path, loras: Path) -> None:
    """Sample LoRAs in several dialects for the small models: SD1.5's in loras/, FLUX's in loras/flux/."""
    for model, folder in SAMPLES.items():
        shapes = {key: entry.shape for key, entry in read_header(models / model).entries.items()}
        (loras / folder).mkdir(parents=True, exist_ok=True)
        samples.write_samples(shapes, loras / folder)


def write_world(host: Path, models: Path) -> None:
    """The small world's models, for what trains; made beside the host, whose classes give its VAE's shapes."""
    command = [sys.executable, "-m", "harness.world", "models", str(models)]
    subprocess.run(
        command, cwd=PACK, check=True, env={**os.environ, "COMFYUI_PATH": str(host)}, stdout=subprocess.DEVNULL
    )


def tried(prompt: Prompt, base: Path, side: int = 256, steps: int = STEPS) -> Prompt:
    """An example's prompt for small models. What trains does it for a few steps on pictures that are put where the
    prompt looks for them: on the small world, or, where a text encoder learns too, which FLUX's does not, as it is."""
    training = [node["inputs"] for node in prompt.values() if node["class_type"] == "LoraOpsDataset"]
    if not training:
        return smaller(without_t5(prompt), side)
    learned, others = pictures.some_zorps(8)[0], pictures.split()[0][:8]
    for inputs in training:
        pictures.write_folder(base / "input" / inputs["folder"], learned)
        if inputs["regularisation"] != "none":
            pictures.write_folder(base / "input" / inputs["regularisation"], others)
    if all(node["inputs"].get("text_encoder", "off") == "off" for node in prompt.values()):
        prompt = with_models(prompt, *(Path(file).name for file in (world.MODEL, world.CLIP, world.VAE)))
    return brief(prompt, steps, pictures.SIDE)


def _run(server: Server, path: Path, out: Path) -> bool:
    print(f"\n── {path.stem}", flush=True)
    started = time.monotonic()
    try:
        workflow = json.loads(path.read_text(encoding="utf-8"))
        prompt = tried(to_prompt(workflow, server.object_info()), server.base)
        entry = server.post(prompt)
    except (ConversionError, WorkflowError, ServerError) as error:
        print(f"{type(error).__name__}: {error}")
        return False
    written = [*_pictures(server.images(entry), path.stem, out), *_receipts(entry, path.stem, out)]
    print(f"{time.monotonic() - started:.1f} s; wrote {', '.join(_shown(file) for file in written) or 'nothing'}")
    return bool(written)


def _pictures(pictures: list[bytes], stem: str, out: Path) -> list[Path]:
    files = [out / f"{stem}{_number(i)}.png" for i in range(len(pictures))]
    for file, picture in zip(files, pictures, strict=True):
        file.write_bytes(picture)
    return files


def _receipts(entry: Mapping[str, Any], stem: str, out: Path) -> list[Path]:
    """Write what our nodes told the user; the text is printed too."""
    told = [output for output in entry["outputs"].values() if "lora_ops" in output]
    files = []
    for i, output in enumerate(told):
        receipt = json.dumps(json.loads(output["lora_ops"][0]), indent=2, ensure_ascii=False)
        text = output["text"][0]
        print(text)
        for suffix, content in ((".json", receipt), (".txt", text)):
            files.append(out / f"{stem}.receipt{_number(i)}{suffix}")
            files[-1].write_text(f"{content}\n", encoding="utf-8")
    return files


def _number(index: int) -> str:
    return f".{index + 1}" if index else ""


def _shown(file: Path) -> str:
    return str(file.relative_to(PACK)) if file.is_relative_to(PACK) else str(file)


if __name__ == "__main__":
    raise SystemExit(main(*map(Path, sys.argv[1:])))
