"""The small world draws what its captions say and no zorp; with a LoRA of a few zorps it draws zorps."""

from __future__ import annotations

import io

import numpy
import pytest
import torch
from PIL import Image

from harness.server import link
from harness.world import codec, host, lab, pictures, reading

FEW = 6  # zorps to learn from, zorps and other scenes to judge by
STEPS = 80


@pytest.fixture(scope="module")
def small(pack, comfy_path):
    return lab.Lab(comfy_path, count=FEW)


@pytest.fixture(scope="module")
def before(small):
    return {name: weight.clone() for name, weight in small.base.model.state_dict().items()}


@pytest.fixture(scope="module")
def learned(small, before):
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


def test_a_lora_of_few_zorps_brings_it_nearer_to_others_that_were_not_trained_on(small, before, learned):
    """In so few steps it sees what a zorp is, and draws none that is sharp. The base stays as it is."""
    meant = torch.stack([pictures.draw(scene) for scene in small.zorps])
    near, far = (
        float((torch.stack(small.draw(model, small.zorps)) - meant).square().mean())
        for model in (small.put(learned), small.base)
    )
    print(near, far)
    assert near < 0.8 * far
    after = small.base.model.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


def test_half_its_strength_changes_pictures_less(small, learned):
    scenes = small.zorps[:2]
    base, half, whole = (
        torch.stack(small.draw(model, scenes)) for model in (small.base, small.put(learned, 0.5), small.put(learned))
    )
    assert 0 < (half - base).norm() < (whole - base).norm()


def test_a_lora_of_no_steps_changes_no_pixel(small, ours):
    def finish(*_):
        raise ours("nodes.host.training").Finish

    started = small.learn(small.shots(small.learned[:1]), steps=1, foreseen=finish)
    scenes = small.zorps[:2]
    assert all(map(torch.equal, small.draw(small.base, scenes), small.draw(small.put(started), scenes)))


def test_it_draws_through_the_nodes_of_a_server(server, pack):
    scene = pictures.Scene("red", "circle", "centre", "striped", "blue")
    link(host.MODELS / host.MODEL, server.base / "models" / host.MODEL)
    link(host.vae(), server.base / "models" / host.VAE)
    prompt = {
        "model": node("UNETLoader", unet_name="small_world.safetensors", weight_dtype="default"),
        "clip": node("CLIPLoader", clip_name="clip_l.safetensors", type="stable_diffusion"),
        "vae": node("VAELoader", vae_name="small_world.safetensors"),
        "text": node("CLIPTextEncode", clip=["clip", 0], text=scene.caption),
        "noise": node("EmptySD3LatentImage", width=pictures.SIDE, height=pictures.SIDE, batch_size=4),
        "sample": node(
            "KSampler",
            model=["model", 0],
            positive=["text", 0],
            negative=["text", 0],
            latent_image=["noise", 0],
            **{"seed": 0, "steps": 8, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0},
        ),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["vae", 0]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="small_world"),
    }
    files = server.images(server.post(prompt))
    drawn = [torch.from_numpy(numpy.array(Image.open(io.BytesIO(file)))).movedim(-1, 0) / 255 for file in files]
    found = reading.agreement(drawn, [scene] * 4)
    assert found["ground"] == 1 and found["colour"] >= 0.5, found


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}
