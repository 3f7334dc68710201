"""The small world draws what its captions say and no zorp; with a LoRA of a few zorps it comes nearer to them.

What rank, alpha, targets, masks and preservation do is measured in a few steps, which all see the same noise: what is
compared differs in nothing else. docs/small-world has the same of longer runs.
"""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from PIL import Image

from harness.server import link
from harness.world import claims, codec, host, lab, pictures, reading

FEW = 6  # zorps to learn from, zorps and other scenes to judge by
STEPS = 80
SHORT = 40


@pytest.fixture(scope="module")
def small(pack, comfy_path):
    return lab.Lab(comfy_path, count=FEW)


@pytest.fixture(scope="module")
def before(small):
    return {name: weight.clone() for name, weight in small.base.model.state_dict().items()}


class Learned(NamedTuple):
    lora: Any
    loss: float  # the mean of the last ten steps'


@pytest.fixture(scope="module")
def learn(small, before):
    """learn(shots, …): a LoRA of very few steps."""

    def learned(shots=None, steps=SHORT, rank=16, **options) -> Learned:
        losses = []
        options |= {"batch": 2, "stepped": lambda done, session: losses.append(done.loss)}
        lora = small.learn(shots or small.shots(small.learned[:FEW]), steps=steps, rank=rank, **options)
        return Learned(lora, sum(losses[-10:]) / 10)

    return learned


@pytest.fixture(scope="module")
def short(learn):
    """A LoRA of few zorps, on all weights."""
    return learn()


@pytest.fixture(scope="module")
def learned(small, before):
    """The same, of so many steps that it shows in the pictures."""
    return small.learn(small.shots(small.learned[:FEW]), steps=STEPS, batch=4)


def drawn(small, lora, scenes):
    return torch.stack(small.draw(small.base if lora is None else small.put(lora), scenes))


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
    near, far = (float((drawn(small, lora, small.zorps) - meant).square().mean()) for lora in (learned, None))
    print(near, far)
    assert near < 0.8 * far
    after = small.base.model.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


def test_half_its_strength_changes_pictures_less(small, learned):
    scenes = small.zorps[:2]
    base, whole = (drawn(small, lora, scenes) for lora in (None, learned))
    half = torch.stack(small.draw(small.put(learned, 0.5), scenes))
    assert 0 < (half - base).norm() < (whole - base).norm()


def test_a_higher_rank_learns_more_in_as_many_steps(learn, short):
    low = learn(rank=1)
    print(low.loss, short.loss)
    assert short.loss < low.loss


def test_queries_and_keys_alone_learn_less_than_all_weights(learn, short):
    few = learn(patterns=claims.TARGETS["queries and keys"])
    print(few.loss, short.loss)
    assert set(few.lora.modules) < set(short.lora.modules)
    assert short.loss < 0.7 * few.loss


def test_alpha_is_a_factor_of_the_update_and_a_rank_divides_it(small, learn):
    """As many steps of Adam move the factors as far, whatever they are multiplied with."""
    sizes = {}
    for rank, alpha in ((8, 8.0), (8, 16.0), (32, 8.0)):
        sizes[rank, alpha] = lab.relative(learn(steps=20, rank=rank, alpha=alpha).lora, small.base)
    print(sizes)
    assert 1.3 * sizes[8, 8.0] < sizes[8, 16.0] < 3 * sizes[8, 8.0]
    assert sizes[32, 8.0] < 0.8 * sizes[8, 8.0]


def test_a_masked_loss_does_not_learn_what_the_mask_leaves_out(small, learn):
    """Here a black frame in every picture: how bright are the edges of what is drawn?"""
    framed = [shot._replace(picture=lab.framed(shot.picture)) for shot in small.shots(small.learned[:FEW])]
    edges = lab.frame()[0] > 0
    bright = []
    for mask in (None, 1 - lab.frame()):
        lora = learn([shot._replace(mask=mask) for shot in framed], rank=8).lora
        cells = torch.nn.functional.avg_pool2d(drawn(small, lora, small.zorps), pictures.CELL)
        bright.append(float(cells.amax(1)[:, edges].mean()))
    print(bright)
    assert bright[0] < 0.75 * bright[1]


def test_preservation_keeps_what_else_the_base_draws(small, learn, short):
    """By what the base itself answers to captions of other things."""
    others = [shot._replace(regularisation=True) for shot in small.shots(small.prior[:FEW])]
    kept = learn([*small.shots(small.learned[:FEW]), *others], preservation=lab.ANSWERS).lora
    base, bare, with_others = (drawn(small, lora, small.others) for lora in (None, short.lora, kept))
    away, near = ((each - base).square().mean() for each in (bare, with_others))
    print(away, near)
    assert near < 0.7 * away


def test_a_class_word_keeps_its_class_as_the_base_draws_it_while_the_concept_is_learned(small, learn, short):
    """Without other pictures. With three seeds the class moved by 1/160 to 1/217 as much, and what is drawn for a zorp
    came to 0.55, 0.74 and 0.84 of its distance from one (without preservation: 0.76, 0.99 and 0.80)."""
    known = [scene._replace(**claims.KNOWN) for scene in small.zorps if scene.ground != claims.KNOWN["colour"]]
    meant = torch.stack([pictures.draw(scene) for scene in small.zorps])
    kept = learn(preservation=lab.class_word("{colour} {shape}".format(**claims.KNOWN))).lora
    base, bare, near = (drawn(small, lora, [*small.zorps, *known]) for lora in (None, short.lora, kept))
    zorps = [float((each[:FEW] - meant).square().mean()) for each in (base, bare, near)]
    moved = [float((each[FEW:] - base[FEW:]).square().mean()) for each in (bare, near)]
    print(zorps, moved)
    assert zorps[2] < 0.92 * zorps[0] and zorps[2] < 1.3 * zorps[1]
    assert moved[1] < 0.2 * moved[0]


def test_a_lora_of_no_steps_changes_no_pixel(small, ours):
    def finish(*_):
        raise ours("nodes.host.training").Finish

    started = small.learn(small.shots(small.learned[:1]), steps=1, foreseen=finish)
    scenes = small.zorps[:2]
    assert torch.equal(drawn(small, None, scenes), drawn(small, started, scenes))


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
    shown = [torch.from_numpy(numpy.array(Image.open(io.BytesIO(file)))).movedim(-1, 0) / 255 for file in files]
    found = reading.agreement(shown, [scene] * 4)
    assert found["ground"] == 1 and found["colour"] >= 0.5, found


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}
