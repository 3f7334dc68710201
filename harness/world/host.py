"""The small world on the host: its weights loaded and sampled by ComfyUI's own functions, in this process.

Needs the host importable (harness.inside.mount).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from harness import small
from harness.server import link

MODELS = Path(__file__).parent / "models"
MODEL = "diffusion_models/small_world.safetensors"
VAE = "vae/small_world.safetensors"
CLIP = "text_encoders/clip_l.safetensors"
TOKENS = 77


def models(comfy: Path) -> Path:
    """A models folder with the small world's FLUX and VAE and the random CLIP-L that it was trained with."""
    folder = small.cached(comfy, "flux").with_name("models-world")
    for file in (MODEL, VAE):
        (folder / file).unlink(missing_ok=True)
        link(MODELS / file, folder / file)
    (folder / CLIP).unlink(missing_ok=True)
    link(small.cached(comfy, "flux") / CLIP, folder / CLIP)
    return folder


def load_model(file: Path = MODELS / MODEL):
    import comfy.sd

    return comfy.sd.load_diffusion_model(str(file))


def load_vae(file: Path = MODELS / VAE):
    import comfy.sd
    import comfy.utils

    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(file)))


def embeddings(comfy: Path, captions: list[str], told=lambda done: None) -> tuple[Tensor, Tensor]:
    """What CLIPTextEncode gives for each caption: (N, 77, 768), and pooled (N, 768)."""
    import comfy.sd as host

    clip = host.load_clip([str(small.cached(comfy, "flux") / CLIP)], clip_type=host.CLIPType.STABLE_DIFFUSION)
    tokens, pooled = [], []
    with torch.no_grad():
        for number, caption in enumerate(captions):
            each, whole = clip.encode_from_tokens(clip.tokenize(caption), return_pooled=True)
            tokens.append(each[0, :TOKENS].float())
            pooled.append(whole[0].float())
            told(number + 1)
    return torch.stack(tokens), torch.stack(pooled)


def sample(model, vae, text: tuple[Tensor, Tensor], seed: int = 0, steps: int = 8, side: int = 64) -> Tensor:
    """One picture (3, side, side) for each row of text, by the host's sampler at cfg 1."""
    import comfy.sample

    count = len(text[0])
    latent = torch.zeros(count, 16, side // 8, side // 8)
    noise = comfy.sample.prepare_noise(latent, seed)
    condition = [[text[0], {"pooled_output": text[1]}]]
    with torch.no_grad():
        made = comfy.sample.sample(
            model, noise, steps, 1.0, "euler", "simple", condition, condition, latent, disable_pbar=True, seed=seed
        )
        return vae.decode(made).movedim(-1, 1)
