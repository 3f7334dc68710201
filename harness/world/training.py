"""Trains the small world: an autoencoder that the host takes for TAESD, and a FLUX on its latents.

Everything is drawn from fixed seeds. Needs the host importable (harness.inside.mount).
"""

from __future__ import annotations

import itertools
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from harness import configs

from . import pictures
from .host import TOKENS

WIDTHS = 12, 24, 40, 64  # of the autoencoder's stages; TAESD has 64 everywhere
CHANNELS = 16
SCALE, SHIFT = 0.3611, 0.1159  # of FLUX's latents: undone inside the file, as in published TAEs for FLUX
FLUX = configs.FLUX | {
    "hidden_size": 128,
    "num_heads": 1,
    "depth": 2,
    "depth_single_blocks": 2,
    "context_in_dim": 768,
    "guidance_embed": False,
}
Keep = Callable[[dict[str, Tensor], int], None]  # is given the weights of a file and the steps so far
PER_SCENE = 8  # pictures of each scene
CAPTION, PADDING = 14, 6  # tokens: a caption's own, and as many of what the host pads it with as a step looks at
ENTIRE = 0.05  # share of the steps, the last ones, that look at all of them
GO_ON = 0.3  # factor of the learning rate when training goes on
EMPTY = 0.1  # share of captions that are replaced by the empty one


# ── the autoencoder ──


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        between = ((_conv(width, width), nn.ReLU()) for _ in range(2))
        self.conv = nn.Sequential(*itertools.chain(*between), _conv(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


class Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


def autoencoder(blocks: tuple[int, int, int] = (1, 1, 1)) -> nn.ModuleDict:
    """TAESD's module tree, thinner, with one block where it has three; the decoder may have more in its first stages.

    Numbered as there: zeros around the weights and in the missing blocks make it a TAESD that computes the same.
    """
    a, b, c, d = WIDTHS
    up = nn.Upsample(scale_factor=2)
    encoder = {0: _conv(3, a), 1: Block(a), 2: _conv(a, b, stride=2, bias=False), 3: Block(b)}
    encoder |= {6: _conv(b, c, stride=2, bias=False), 7: Block(c), 10: _conv(c, d, stride=2, bias=False)}
    encoder |= {11: Block(d), 14: _conv(d, CHANNELS)}
    decoder: dict[int, nn.Module] = {0: Clamp(), 1: _conv(CHANNELS, d), 2: nn.ReLU()}
    for first, count, width, narrower in zip((3, 8, 13), blocks, (d, c, b), (c, b, a), strict=True):
        decoder |= {first + number: Block(width) for number in range(count)}
        decoder |= {first + 3: up, first + 4: _conv(width, narrower, bias=False)}
    decoder |= {18: Block(a), 19: _conv(a, 3)}
    model = nn.ModuleDict({"taesd_encoder": _numbered(encoder), "taesd_decoder": _numbered(decoder)})
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    for module in convolutions:  # without norms, what goes through must keep its size from the start
        last = module in (encoder[14], decoder[19])
        nn.init.kaiming_normal_(module.weight, nonlinearity="linear" if last or module.bias is None else "relu")
    for module in (module for module in model.modules() if isinstance(module, Block)):
        for parameter in module.conv[-1].parameters():
            nn.init.zeros_(parameter)
    return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def train_autoencoder(steps: int, keep: Keep) -> None:
    """Plain reconstruction, from latents that are noised and near N(0, 1)."""
    torch.manual_seed(0)
    model = autoencoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)
    for step, shown, noise in _shown(steps, "autoencoder"):
        with torch.autocast("cpu", torch.bfloat16):
            latents = model["taesd_encoder"](shown)
            made = model["taesd_decoder"](latents + noise)
        latents, off = latents.float(), made.float() - shown
        spread = latents.mean((0, 2, 3)).square().mean() + (latents.std((0, 2, 3)) - 1).square().mean()
        loss = off.square().mean() + 0.1 * off.abs().mean() + 0.01 * spread
        _update([optimizer], loss, step.factor)
        step.loss = float(off.detach().square().mean())
        if step.is_kept:
            keep(taesd(model), step.number + 1)


def train_decoder(steps: int, keep: Keep, start: Mapping[str, Tensor]) -> None:
    """Sharper pictures from the latents as they are: a deeper decoder, and errors that count as they are, unsquared."""
    torch.manual_seed(0)
    model = autoencoder(blocks=(3, 3, 2))
    _fill(model, start)
    decoder = model["taesd_decoder"]
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)
    for step, shown, noise in _shown(steps, "decoder"):
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                latents = model["taesd_encoder"](shown)
            off = decoder(latents + noise).float() - shown
        _update([optimizer], off.abs().mean(), step.factor)
        step.loss = float(off.detach().square().mean())
        if step.is_kept:
            keep(taesd(model), step.number + 1)


def _fill(model: nn.ModuleDict, whole: Mapping[str, Tensor]) -> None:
    """With what a TAESD's weights hold besides zeros."""
    for name, weight in model.state_dict().items():
        known = whole[name][tuple(slice(size) for size in weight.shape)]
        if known.any():
            weight.copy_(known)


def _shown(steps: int, what: str, batch: int = 8) -> Iterator[tuple[_Step, Tensor, Tensor]]:
    """For each step the world's pictures and collages of them, half and half, and noise for their latents."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([pictures.draw(scene, generator) for scene in pictures.split()[0]])
    side = pictures.SIDE // 8
    for step in _steps(steps, what):
        picked = drawn[torch.randint(len(drawn), (2 * batch,), generator=generator)]
        shown = torch.cat([picked[: batch // 2], _collages(picked[batch // 2 :], generator)])
        noise = 0.05 * torch.randn(batch, CHANNELS, side, side, generator=generator)
        yield step, shown.to(memory_format=torch.channels_last), noise


def taesd(model: nn.ModuleDict) -> dict[str, Tensor]:
    """The weights as TAESD's own: fp16, zeros where it is wider or deeper."""
    import comfy.taesd.taesd

    with torch.device("meta"):
        shapes = comfy.taesd.taesd.TAESD(latent_channels=CHANNELS).state_dict()
    own = model.state_dict()
    whole = {"vae_scale": torch.tensor(SCALE).half(), "vae_shift": torch.tensor(SHIFT).half()}
    for name in shapes.keys() - whole.keys():
        whole[name] = torch.zeros(shapes[name].shape, dtype=torch.float16)
        if name in own:
            whole[name][tuple(slice(size) for size in own.pop(name).shape)] = model.state_dict()[name].half()
    assert not own, f"TAESD has no {sorted(own)}"
    return whole


def _collages(picked: Tensor, generator: torch.Generator) -> Tensor:
    """Figures cut from one picture, on another, both with their colours mixed at random.

    A codec of the world's own pictures alone would fail on a new concept.
    """
    count = len(picked) // 3
    mixing = torch.randn(2 * count, 3, 3, generator=generator) * 0.7
    middle = 0.5 + 0.2 * torch.randn(2 * count, 3, 1, 1, generator=generator)
    mixed = (torch.einsum("nij,njhw->nihw", mixing, picked[: 2 * count] - 0.5) + middle).clamp(0, 1)
    ground = picked[2 * count :, :, :1, :1]
    figure = (picked[2 * count :] - ground).square().sum(1, keepdim=True) > 0.1  # with what the ground's texture adds
    return torch.where(figure, mixed[:count], mixed[count:])


def _conv(inside: int, outside: int, **options) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, 3, padding=1, **options)


def _numbered(modules: Mapping[int, nn.Module]) -> nn.Sequential:
    return nn.Sequential(OrderedDict((str(number), module) for number, module in modules.items()))


# ── the FLUX ──


def train_model(
    vae: Mapping[str, Tensor],
    text: tuple[Tensor, Tensor],
    steps: int,
    keep: Keep,
    start: Mapping[str, Tensor] | None,
    batch: int = 32,
) -> None:
    """Flow matching of the host's own FLUX module; text holds the seen scenes' embeddings and, last, the empty one's.

    What is kept is the average of the weights. start continues from a file's weights with a new optimizer.
    """
    import comfy.model_management

    generator = torch.Generator().manual_seed(0)
    scenes = pictures.split()[0]
    drawn = torch.stack([pictures.draw(scene, generator) for scene in scenes for _ in range(PER_SCENE)])
    codec = autoencoder()
    _fill(codec, vae)
    with torch.no_grad():
        latents = torch.cat([codec["taesd_encoder"](part) for part in drawn.split(64)])
    model = _flux(text, generator)
    if start:
        model.load_state_dict(start)
    average = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    optimizers = _optimizers(model)
    trained_before = comfy.model_management.in_training
    comfy.model_management.in_training = True  # the host's fused rope has no gradient
    try:
        for step in _steps(steps, "model"):
            picked = torch.randint(len(latents), (batch,), generator=generator)
            caption = picked // PER_SCENE
            caption[torch.rand(batch, generator=generator) < EMPTY] = len(scenes)
            sigma = torch.sigmoid(torch.randn(batch, generator=generator) * 1.2)
            clean = latents[picked]
            noise = torch.randn(clean.shape, generator=generator)
            mixed = torch.lerp(clean, noise, sigma[:, None, None, None])
            shown = torch.arange(TOKENS)
            if not start and step.number < (1 - ENTIRE) * steps:
                padding = CAPTION + torch.randperm(TOKENS - CAPTION, generator=generator)[:PADDING]
                shown = torch.cat([shown[:CAPTION], padding])
            with torch.autograd.graph.allow_mutation_on_saved_tensors():  # the host's blocks add in place
                with torch.autocast("cpu", torch.bfloat16):
                    velocity = model(mixed, sigma, text[0][caption][:, shown], text[1][caption])
                loss = mse_loss(velocity.float(), noise - clean)
                _update(optimizers, loss, step.factor * (GO_ON if start else 1))
            for name, weight in model.state_dict().items():
                average[name].lerp_(weight, max(0.02, 10 / (step.number + 10)))
            step.loss = loss.item()
            if step.is_kept:
                keep({name: weight.half() for name, weight in average.items()}, step.number + 1)
    finally:
        comfy.model_management.in_training = trained_before


def _flux(text: tuple[Tensor, Tensor], generator: torch.Generator) -> nn.Module:
    """The host's module, started so that it adds nothing yet and sees the captions' differences.

    A random CLIP's outputs for two captions are nearly parallel (cosine 0.93): what reads them starts centred and
    stretched to unit variance.
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
        for layer, seen in ((model.txt_in, text[0][:, :CAPTION].flatten(0, 1)), (model.vector_in.in_layer, text[1])):
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


# ── both ──


@dataclass
class _Step:
    number: int
    factor: float  # of the learning rate: 20 steps up, then a cosine down
    is_kept: bool  # every hundredth and the last
    loss: float = math.nan


def _steps(count: int, what: str) -> Iterator[_Step]:
    """Counts, and every ten seconds says how far it is."""
    started = spoke = time.monotonic()
    smoothed = math.nan
    for number in range(count):
        factor = min(1.0, (number + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * number / count))
        yield (step := _Step(number, factor, (number + 1) % 100 == 0 or number + 1 == count))
        smoothed = step.loss if number == 0 else 0.95 * smoothed + 0.05 * step.loss
        now = time.monotonic()
        if now - spoke > 10 or number + 1 == count:
            spoke, left = now, (now - started) * (count - number - 1) / (number + 1)
            print(f"{what}: step {number + 1} of {count}, loss {smoothed:.5f}, {left:.0f} s left", flush=True)


def _update(optimizers: list[torch.optim.Optimizer], loss: Tensor, factor: float) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        optimizer.step()
