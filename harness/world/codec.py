"""The small world's VAE: a TAESD whose weights are written down, not trained; a latent is its cell's colour.

A picture of cells goes through it and back as it is. Needs the host importable (harness.inside.mount).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CHANNELS = 16
SCALE, SHIFT = 0.3611, 0.1159  # of FLUX's latents: undone inside the file, as in published TAEs for FLUX
BRIGHTEST = 3 * math.tanh(1 / 3)  # what the decoder's first layer makes of a latent of 1
DECODED = 2 * BRIGHTEST


def latents(cells: Tensor) -> Tensor:
    """What a model sees of pictures (…, 3, rows, columns) in 0..1, a value a cell: (…, 16, rows, columns) in -1..1.

    Each channel holds one of the three colours.
    """
    return cells[..., _colours(), :, :] * 2 - 1


def weights() -> dict[str, Tensor]:
    """As TAESD names them, fp16. Nothing below 0 comes by, so its ReLUs and its blocks of zeros change nothing."""
    import comfy.taesd.taesd

    with torch.device("meta"):
        shapes = comfy.taesd.taesd.TAESD(latent_channels=CHANNELS).state_dict()
    found = {name: torch.zeros(shape.shape, dtype=torch.float16) for name, shape in shapes.items()}
    found |= {"vae_scale": torch.tensor(SCALE).half(), "vae_shift": torch.tensor(SHIFT).half()}
    colours = _colours()
    three = torch.arange(3)
    found["taesd_encoder.0.weight"][three, three, 1, 1] = 1
    for number in (2, 6, 10):  # each halves the picture: the mean of two by two
        for row, column in ((1, 1), (1, 2), (2, 1), (2, 2)):
            found[f"taesd_encoder.{number}.weight"][three, three, row, column] = 0.25
    found["taesd_encoder.14.weight"][torch.arange(CHANNELS), colours, 1, 1] = 2
    found["taesd_encoder.14.bias"][:] = -1
    for channel, colour in enumerate(colours.tolist()):
        share = 1 / int((colours == colour).sum())
        found["taesd_decoder.1.weight"][colour, channel, 1, 1] = share / DECODED
    found["taesd_decoder.1.bias"][:3] = 0.5
    for number in (7, 12, 17, 19):
        found[f"taesd_decoder.{number}.weight"][three, three, 1, 1] = 1
    return found


def _colours() -> Tensor:
    """Of each channel."""
    return torch.arange(CHANNELS) % 3
