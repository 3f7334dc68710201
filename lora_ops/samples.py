"""Small random LoRAs in several dialects for a given checkpoint: for demonstrations and tests.

`python -m lora_ops.samples CHECKPOINT FOLDER` writes `ink_kohya`, `ink_comfy`, `ink_diffusers` and `ink_peft`.
Where the dialects name whole weights alike (SD1.5, SDXL) the four hold the same update.
"""

from __future__ import annotations

import hashlib
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .dialects import target_map
from .families import Shapes, recognise, unet
from .families.text import clip_shapes
from .files import read_header, write
from .lora import Target, TargetMap

RANK = 4
RELATIVE_NORM = 0.1  # of ΔW to a weight of unit-variance outputs
USUAL = re.compile(r"attn|attention|\.ff\.|mlp|linear[12]|proj_in|in_layers\.2")  # what trainers usually train


@dataclass(frozen=True)
class Sample:
    """How a writer would store the samples: its dialect, its factor suffixes, and whether it writes alpha."""

    name: str
    dialect: str
    up: str
    down: str
    alpha: bool


SAMPLES = (
    Sample("ink_kohya", "kohya", ".lora_up.weight", ".lora_down.weight", True),
    Sample("ink_comfy", "comfy", ".lora_up.weight", ".lora_down.weight", True),
    Sample("ink_diffusers", "diffusers", ".lora_B.weight", ".lora_A.weight", False),
    Sample("ink_peft", "peft", ".lora_B.weight", ".lora_A.weight", False),
)


def tensors(sample: Sample, targets: TargetMap) -> dict[str, Tensor]:
    """The tensors of a sample for a model; a target's factors depend on the target alone."""
    found: dict[str, Tensor] = {}
    for module, target in _modules(sample.dialect, targets):
        up, down = _factors(target)
        if sample.alpha:  # alpha = rank / 2 halves the product, so the stored up is doubled: the same update
            found[f"{module}.alpha"] = torch.tensor(RANK / 2)
            up = up * 2
        found[module + sample.up] = up
        found[module + sample.down] = down
    return found


def _modules(dialect: str, targets: TargetMap) -> Iterator[tuple[str, Target]]:
    done: set[Target] = set()
    for module, (target, spoken) in targets.names.items():
        if spoken == dialect and len(target.shape) > 1 and USUAL.search(target.key) and target not in done:
            done.add(target)
            yield module, target


def _factors(target: Target) -> tuple[Tensor, Tensor]:
    seed = hashlib.sha256(f"{target.part} {target.key} {target.band}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(seed[:7], "little"))
    rows, *inputs = target.delta_shape
    up = torch.randn(rows, RANK, *(1 for _ in inputs[1:]), generator=generator)
    down = torch.randn(RANK, *inputs, generator=generator)
    return up * RELATIVE_NORM / math.sqrt(RANK), down / math.sqrt(math.prod(inputs))


def write_samples(shapes: Shapes, folder: Path) -> list[Path]:
    """Write every sample that has names for the model with these weights; returns the files."""
    targets = target_map(recognise(shapes), shapes)
    metadata = {"modelspec.title": "Ink (random sample)", "modelspec.trigger_phrase": "ink wash"}
    paths = []
    for sample in SAMPLES:
        if content := tensors(sample, targets):
            paths.append(folder / f"{sample.name}.safetensors")
            write(paths[-1], content, metadata, overwrite=True)
    return paths


def small_checkpoint(seed: int = 0) -> dict[str, Tensor]:
    """A random checkpoint of SD1.5's make, of a few megabytes: names and shapes are right, pictures are not."""
    denoiser = unet.shapes(
        channels=32, multipliers=(1, 2, 4, 4), depths=(1, 1, 1, 0), middle_depth=1, context=768, linear_projection=False
    )
    shapes = {f"model.diffusion_model.{key}": shape for key, shape in denoiser.items()}
    text = {key: shape for key, shape in clip_shapes(layers=1, width=768).items() if "embedding" not in key}
    shapes |= {f"cond_stage_model.transformer.{key}": shape for key, shape in text.items()}
    generator = torch.Generator().manual_seed(seed)
    return {
        key: (torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]) or 1)).half()
        for key, shape in shapes.items()
    }


def main(arguments: list[str]) -> int:
    checkpoint, folder = arguments
    header = read_header(checkpoint)
    for path in write_samples({key: entry.shape for key, entry in header.entries.items()}, Path(folder)):
        print(path.name)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
