"""The small world on the host: its models loaded and sampled by ComfyUI's own functions, in this process.

Needs the host importable (harness.inside.mount).
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from harness import small
from harness.environment import cache
from harness.server import link

from . import codec
from .pictures import CELLS

MODELS = Path(__file__).parent / "models"
MODEL = "diffusion_models/small_world.safetensors"
VAE = "vae/small_world.safetensors"
CLIP = "text_encoders/clip_l.safetensors"
TOKENS = 77


def models(comfy: Path) -> Path:
    """A models folder with the small world's FLUX and VAE and the random CLIP-L that it was trained with."""
    folder = small.cached(comfy, "flux").with_name("models-world")
    for file, source in ((MODEL, MODELS / MODEL), (VAE, vae()), (CLIP, small.cached(comfy, "flux") / CLIP)):
        (folder / file).unlink(missing_ok=True)
        link(source, folder / file)
    return folder


def vae() -> Path:
    """The VAE's file, written anew: its weights are in the source."""
    from safetensors.torch import save_file

    file = cache() / "small_world_vae.safetensors"
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    save_file(codec.weights(), part)
    os.replace(part, file)
    return file


def load_model(file: Path = MODELS / MODEL):
    import comfy.sd

    return comfy.sd.load_diffusion_model(str(file))


def load_vae():
    import comfy.sd

    return comfy.sd.VAE(sd=codec.weights())


def load_clip(comfy: Path):
    import comfy.sd as host

    return host.load_clip([str(small.cached(comfy, "flux") / CLIP)], clip_type=host.CLIPType.STABLE_DIFFUSION)


def embeddings(clip, captions: list[str], told=lambda done: None) -> tuple[Tensor, Tensor]:
    """What CLIPTextEncode gives for each caption: (N, 77, 768), and pooled (N, 768)."""
    tokens, pooled = [], []
    with torch.no_grad():
        for number, caption in enumerate(captions):
            each, whole = clip.encode_from_tokens(clip.tokenize(caption), return_pooled=True)
            tokens.append(each[0, :TOKENS].float())
            pooled.append(whole[0].float())
            told(number + 1)
    return torch.stack(tokens), torch.stack(pooled)


def sample(model, vae, text: tuple[Tensor, Tensor], seed: int = 0, steps: int = 8) -> Tensor:
    """One picture (3, height, width) for each row of text, by the host's sampler at cfg 1."""
    import comfy.sample

    latent = torch.zeros(len(text[0]), codec.CHANNELS, CELLS, CELLS)
    noise = comfy.sample.prepare_noise(latent, seed)
    condition = [[text[0], {"pooled_output": text[1]}]]
    with torch.no_grad():
        made = comfy.sample.sample(
            model, noise, steps, 1.0, "euler", "simple", condition, condition, latent, disable_pbar=True, seed=seed
        )
        return vae.decode(made).movedim(-1, 1)
