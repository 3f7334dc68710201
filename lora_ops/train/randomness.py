"""Randomness: every random number of a run, told by the seed and what it is for; nothing is carried from step to step.

So a run that goes on after a restart draws what it would have drawn, and the process's own generators stay as they are.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Generator


def generator(*purpose: int | str, device: torch.device | str = "cpu") -> Generator:
    """A generator of its own for a purpose: a seed, a word and what else tells it apart from others."""
    digest = hashlib.sha256(repr(purpose).encode()).digest()
    return Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
