"""Trains the small world's FLUX, from fixed seeds. Needs the host importable (harness.inside.mount)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from harness import configs

from . import codec, pictures

FLUX = configs.FLUX | {
    "hidden_size": 128,
    "num_heads": 1,
    "depth": 2,
    "depth_single_blocks": 2,
    "context_in_dim": 768,
    "guidance_embed": False,
}
Keep = Callable[[dict[str, Tensor], int], None]  # is given the weights of a file and the steps so far
TOKENS = 77  # of a caption, as the host hands it over
CAPTION, PADDING = 12, 5  # of these: a caption's own, and as many of what it is padded with as a step looks at
ENTIRE = 0.1  # share of the steps, the last ones, that look at all of them, as all do where training goes on
EMPTY = 0.1  # share of captions that are replaced by the empty one
FIGURE = 3.0  # weight of the figure's cells beside the ground's
GO_ON = 0.3  # factor of the learning rate where training goes on
KEPT = 200  # steps between two times that the weights are kept


def train(
    text: tuple[Tensor, Tensor], steps: int, keep: Keep, start: Mapping[str, Tensor] | None = None, batch: int = 32
) -> None:
    """Flow matching of the host's own FLUX module; text holds the seen scenes' embeddings and, last, the empty one's.

    What is kept is the average of the weights. start goes on from a file's weights with a new optimizer.
    """
    import comfy.model_management

    generator = torch.Generator().manual_seed(0)
    drawn, weights = _drawn()
    model = _flux(text, generator)
    if start:
        model.load_state_dict(start)
    average = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    optimizers = _optimizers(model)
    told = _Told(steps)
    trained_before = comfy.model_management.in_training
    comfy.model_management.in_training = True  # the host's fused rope has no gradient
    try:
        for step in range(steps):
            scene = torch.randint(len(drawn), (batch,), generator=generator)
            clean, weight = drawn[scene], weights[scene]
            scene[torch.rand(batch, generator=generator) < EMPTY] = len(drawn)
            sigma = torch.sigmoid(0.4 + 1.2 * torch.randn(batch, generator=generator))
            noise = torch.randn(clean.shape, generator=generator)
            mixed = torch.lerp(clean, noise, sigma[:, None, None, None])
            shown = torch.arange(TOKENS)
            if not start and step < (1 - ENTIRE) * steps:
                padding = CAPTION + torch.randperm(TOKENS - CAPTION, generator=generator)[:PADDING]
                shown = torch.cat([shown[:CAPTION], padding])
            with torch.autograd.graph.allow_mutation_on_saved_tensors():  # the host's blocks add in place
                with torch.autocast("cpu", torch.bfloat16):
                    velocity = model(mixed, sigma, text[0][scene][:, shown].float(), text[1][scene].float())
                error = (velocity.float() - (noise - clean)).square()
                _update(optimizers, (error * weight).mean(), _factor(step, steps) * (GO_ON if start else 1))
            for name, current in model.state_dict().items():
                average[name].lerp_(current, max(0.01, 10 / (step + 10)))
            told(step + 1, float(error.detach().mean()))
            if (step + 1) % KEPT == 0 or step + 1 == steps:
                keep({name: current.half() for name, current in average.items()}, step + 1)
    finally:
        comfy.model_management.in_training = trained_before


def _drawn() -> tuple[Tensor, Tensor]:
    """Latents of every seen scene (scenes, 16, rows, columns), and their cells' weights."""
    scenes = pictures.split()[0]
    inside = torch.stack([pictures.where(scene)[None] for scene in scenes])
    weights = 1 + (FIGURE - 1) * inside
    return codec.latents(torch.stack(list(map(pictures.in_cells, scenes)))), weights / weights.mean((-2, -1), True)


def _flux(text: tuple[Tensor, Tensor], generator: torch.Generator) -> nn.Module:
    """The host's module, started so that it adds nothing yet and sees the captions' differences and what is near.

    A random CLIP's outputs for two captions are nearly parallel (cosine 0.93): what reads them starts centred and
    stretched to unit variance. Where a token is only attention can tell: its queries and keys start with a part that
    all have, which positions turn.
    """
    import comfy.supported_models

    config = comfy.supported_models.FluxSchnell(FLUX)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, device=torch.device("cpu")).diffusion_model
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.requires_grad_(True)
            if name.endswith("norm.weight") or name.endswith("norm.scale"):
                weight.fill_(1)
            elif weight.ndim < 2 or "mod" in name or name == "final_layer.linear.weight":
                weight.zero_()
            else:
                weight.copy_(torch.randn(weight.shape, generator=generator) / math.sqrt(weight.shape[1]))
        for block in model.double_blocks:
            same, other = torch.randn(2, FLUX["hidden_size"], generator=generator)
            query_key = slice(2 * FLUX["hidden_size"])
            block.img_attn.qkv.bias[query_key] = torch.cat([same, same])
            block.txt_attn.qkv.bias[query_key] = torch.cat([same, other])
        tokens, pooled = text[0][:, :CAPTION].float().flatten(0, 1), text[1].float()
        for layer, seen in ((model.txt_in, tokens), (model.vector_in.in_layer, pooled)):
            layer.weight.div_(seen.std(0).mean())
            layer.bias.copy_(-layer.weight @ seen.mean(0))
    return model


def _optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, Adam for the rest."""
    inner, outer = [], []
    for name, weight in model.named_parameters():
        (inner if weight.ndim == 2 and "blocks" in name and "mod" not in name else outer).append(weight)
    muon = torch.optim.Muon(inner, lr=0.02, momentum=0.95, weight_decay=0.0)
    adam = torch.optim.AdamW(outer, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)
    return [muon, adam]


def _factor(step: int, steps: int) -> float:
    """Of the learning rate: 20 steps up, then a cosine down."""
    return min(1.0, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def _update(optimizers: list[torch.optim.Optimizer], loss: Tensor, factor: float) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        optimizer.step()


class _Told:
    """Every ten seconds says how far it is."""

    def __init__(self, steps: int) -> None:
        self.steps, self.started, self.spoke, self.loss = steps, time.monotonic(), time.monotonic(), math.nan

    def __call__(self, step: int, loss: float) -> None:
        self.loss = loss if step == 1 else 0.95 * self.loss + 0.05 * loss
        now = time.monotonic()
        if now - self.spoke > 10 or step == self.steps:
            self.spoke, left = now, (now - self.started) * (self.steps - step) / step
            print(f"step {step} of {self.steps}, loss {self.loss:.5f}, {left:.0f} s left", flush=True)
