"""Small random models of real families, which the host's own loaders take for the real ones.

Run as a program (`python -m harness.small --comfy PATH --out MODELS_DIR sd15 flux`) it builds them: shapes come from
the host's own classes on the meta device, so nothing here repeats an architecture. It must be a process of its own:
with the pack's root on sys.path the host's `import nodes` would find the pack's.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from harness import configs
from harness.comfy import PACK
from harness.environment import cache

FILES = {
    "sd15": ("checkpoints/v1-5-pruned-emaonly-fp16.safetensors",),
    "flux": (
        "diffusion_models/flux1-dev.safetensors",
        "text_encoders/clip_l.safetensors",
        "vae/ae.safetensors",
    ),
}

LAST_CONVOLUTION = "taesd_decoder.19."  # kept around mid-grey and small, or most of a picture would be clipped


def cached(comfy: Path, *families: str) -> Path:
    """A models folder in the user's cache that holds these families, built if they are missing.

    Keyed by the bytes of this file and the configurations, and torch's version: the same key holds the same bytes.
    """
    sources = Path(__file__).read_bytes() + Path(configs.__file__).read_bytes()
    key = hashlib.sha256(sources + metadata.version("torch").encode()).hexdigest()[:12]
    models = cache() / f"models-{key}"
    missing = [f for f in families if not all((models / file).exists() for file in FILES[f])]
    if missing:
        command = [sys.executable, "-m", "harness.small", "--comfy", str(comfy), "--out", str(models), *missing]
        subprocess.run(command, cwd=PACK, check=True)
    return models


def build(family: str, models: Path, seed: int = 0) -> None:
    """Write the files of one family under models/; those already there stay as they are."""
    for file in FILES[family]:
        if not (models / file).exists():
            _save(_random(WEIGHTS[file](), seed), models / file)


def _sd15_checkpoint():
    """UNet, CLIP-L and TAESD in one file.

    The UNet is the first level, the middle block and the first up blocks, so that every name in it (the host's and
    diffusers') stands at the same place in the real one. Its widths are what detection pins. CLIP-L is 246 of the MB:
    a shorter one would load too, and leave uninitialised memory in the missing layers.
    """
    import comfy.sd1_clip
    import comfy.supported_models
    import torch

    config = comfy.supported_models.SD15(
        configs.SD15
        | {
            "num_res_blocks": [1],
            "channel_mult": [1],
            "transformer_depth": [1],
            "transformer_depth_output": [0, 0],
        }
    )
    clip = comfy.sd1_clip.SD1ClipModel(device="meta", dtype=torch.float16).state_dict()
    return {
        **config.process_unet_state_dict_for_saving(_unet(config)),
        **config.process_clip_state_dict_for_saving(clip),
        **config.process_vae_state_dict_for_saving(_taesd(4)),
    }


def _flux_dev():
    """2 double and 2 single blocks of width 256, conditioned by CLIP-L alone (768 wide): no T5-XXL is small."""
    import comfy.supported_models

    config = comfy.supported_models.Flux(
        configs.FLUX | {"hidden_size": 256, "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "context_in_dim": 768}
    )
    return _unet(config)


def _clip_l():
    import comfy.sd1_clip
    import torch

    weights = comfy.sd1_clip.SD1ClipModel(device="meta", dtype=torch.float16).state_dict()
    prefix = "clip_l.transformer."
    return {
        name.removeprefix(prefix): weight
        for name, weight in weights.items()
        if name.startswith(f"{prefix}text_model.")  # the published file holds no projection either
    }


WEIGHTS = {
    "checkpoints/v1-5-pruned-emaonly-fp16.safetensors": _sd15_checkpoint,
    "diffusion_models/flux1-dev.safetensors": _flux_dev,
    "text_encoders/clip_l.safetensors": _clip_l,
    "vae/ae.safetensors": lambda: _taesd(16),
}


def _unet(config):
    import torch

    config.set_inference_dtype(torch.float16, None)
    return config.get_model({}, device=torch.device("meta")).diffusion_model.state_dict()


def _taesd(channels: int):
    import comfy.taesd.taesd
    import torch

    with torch.device("meta"):
        return comfy.taesd.taesd.TAESD(latent_channels=channels).half().state_dict()


def _random(shapes, seed: int):
    """Weights N(0, 1/fan_in) so that activations keep their size; norms 1, biases and shifts 0."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return {name: _fill(name, shapes[name], generator) for name in sorted(shapes)}


def _fill(name: str, shape, generator):
    import torch

    paints = LAST_CONVOLUTION in name
    if name.endswith("bias"):
        return torch.full_like(shape, 0.5 if paints else 0.0, device="cpu")
    if shape.ndim < 2:
        return torch.full_like(shape, 0.0 if name.endswith("shift") else 1.0, device="cpu")
    std = (0.3 if paints else 1.0) / math.sqrt(math.prod(shape.shape[1:]))
    return (torch.randn(shape.shape, generator=generator) * std).to(shape.dtype)


def _save(weights, file: Path) -> None:
    """A killed build leaves no file under the final name."""
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        save_file(weights, part)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfy", type=Path, required=True, help="folder of the ComfyUI whose classes give the shapes")
    parser.add_argument("--out", type=Path, required=True, help="models folder to write into")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("families", nargs="+", choices=FILES)
    asked = parser.parse_args()

    sys.path[0] = str(asked.comfy)  # the pack's root goes: its nodes would hide the host's
    from comfy.cli_args import args

    args.cpu = True  # before anything else of the host is imported, which looks for a GPU at once
    for family in asked.families:
        build(family, asked.out, asked.seed)


if __name__ == "__main__":
    main()
