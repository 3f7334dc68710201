"""The small world draws what its captions say and no zorp; with a LoRA of a few zorps it draws zorps."""

from __future__ import annotations

import io

import numpy
import pytest
import torch
from PIL import Image

from harness.server import link
from harness.world import codec, host, lab, pictures, reading

FEW = 8


@pytest.fixture(scope="module")
def small(pack, comfy_path):
    return lab.Lab(comfy_path, count=FEW)


@pytest.fixture(scope="module")
def learned(small):
    """A LoRA of few zorps, learned in a few steps."""
    return small.learn(small.shots(small.learned[:FEW]), steps=STEPS, rate=4e-3, batch=4)


def test_its_vae_gives_pictures_back_as_they_are(small):
    shown = torch.stack([shot.picture for shot in small.shots([*small.zorps, *small.others])])
    with torch.no_grad():
        latents = small.vae.encode(shown.movedim(1, -1))
        again = small.vae.decode(latents).movedim(-1, 1)
    assert (again - shown).abs().max() < 0.01
    cells = torch.nn.functional.avg_pool2d(shown, pictures.CELL)
    assert torch.allclose(small.base.model.process_latent_in(latents), codec.latents(cells), atol=1e-3)


def test_it_draws_what_captions_say_that_it_never_saw_and_no_zorp(small):
    marks, _, others = small.judged(small.base)
    print(marks, reading.agreement(others, small.others))
    assert marks.zorps == 0 and marks.others >= 0.5
