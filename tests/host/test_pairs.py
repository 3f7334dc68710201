"""Pairs of an edit on the host: control pictures reach a model as the host's own nodes give them, and are learned."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from harness import inside
from harness.configs import SD15
from tests.host.test_training import CASES, Session, conditioning, landed, noise, train

__all__ = ["train"]

FAMILIES = ("flux", "flux2_klein", "qwen_image", "ip2p", "flux_canny")
BESIDE = ("ip2p", "flux_canny")
TWO = ("flux2_klein", "qwen_image")  # with another one, of another size


@pytest.fixture(autouse=True)
def families(monkeypatch):
    """InstructPix2Pix and FLUX.1 Canny: models with a picture beside the noise."""
    unet = {"num_res_blocks": [1], "channel_mult": [1], "transformer_depth": [1], "transformer_depth_output": [0, 0]}
    canny = inside.PUBLISHED["flux"][1] | {"in_channels": 32, "guidance_embed": False}
    for name, like, variant, smaller in (
        ("ip2p", "sd15", ("SD15_instructpix2pix", SD15 | {"in_channels": 8}), unet | {"model_channels": 64}),
        ("flux_canny", "flux", ("Flux", canny), inside.SMALLER["flux"] | {"depth": 1, "depth_single_blocks": 1}),
    ):
        monkeypatch.setitem(inside.VARIANTS, name, variant)
        monkeypatch.setitem(inside.SMALLER, name, smaller)
        monkeypatch.setitem(CASES, name, CASES[like])


def controls_of(family, seed=40):
    shape = CASES[family][2]
    found = [noise(*shape, seed=seed)]
    return (*found, noise(*shape[:-1], 12, seed=seed + 1)) if family in TWO else tuple(found)


def by_the_hosts_nodes(family, controls):
    """The conditioning that core's own nodes make of the same latents."""
    from comfy_extras.nodes_edit_model import ReferenceLatent
    from comfy_extras.nodes_ip2p import InstructPixToPixConditioning

    found = conditioning(family)
    if family in BESIDE:

        class Encoded:  # a VAE that gives this latent
            def encode(self, pixels):
                return controls[0][None]

        return InstructPixToPixConditioning.execute(found, found, torch.zeros(1, 64, 64, 3), Encoded()).result[0]
    for control in controls:
        (found,) = ReferenceLatent.execute(found, {"samples": control[None]}).result
    return found


def drawn(family, seed, controls):
    """What the host's own sampler makes of a MODEL in two steps, by the host's own conditioning."""
    import comfy.sample

    def draw(model):
        prompt, latent = by_the_hosts_nodes(family, controls), torch.zeros(1, *CASES[family][2])
        args = model, noise(*latent.shape, seed=seed), 2, 1.0, "euler", "simple", prompt, prompt, latent
        return comfy.sample.sample(*args, seed=seed, disable_pbar=True)

    return draw


class Heard:
    """What a model is given of control pictures, while inside."""

    def __init__(self, network, *, beside):
        self.network, self.beside, self.given = network, beside, []

    def __enter__(self):
        def hear(_, args, given):
            beside = args[0].chunk(2, dim=1)[1:] if self.beside else ()
            self.given.append([each.clone() for each in (*given.get("ref_latents", ()), *beside)])

        self.hook = self.network.register_forward_pre_hook(hear, with_kwargs=True)
        return self

    def __exit__(self, *_):
        self.hook.remove()


def item_of(ours, session, family, controls):
    dataset = ours("lora_ops.train.dataset")
    latent = noise(*CASES[family][2], seed=3)
    picture = dataset.Picture("a.png", (latent,), (conditioning(family),), controls=(controls,))
    with torch.inference_mode():
        (found,), _ = session.model.items(dataset.Dataset((picture,)))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pair_is_learned_with_what_the_hosts_own_nodes_give_the_model(train, ours, family):
    descent = train.optimizers.Descent(rate=0.3 if family == "flux2_klein" else 3e-2)  # its gates are nearly closed
    controls, session = controls_of(family), Session(train, family, steps=6, descent=descent)
    session.item = item_of(ours, session, family, controls)
    heard = Heard(session.patcher.model.diffusion_model, beside=family in BESIDE)
    with torch.inference_mode():
        with heard:
            drawn(family, 5, controls)(session.patcher)
            with session.running():
                args = session.model.predict, session.model.sampling, session.timesteps
                train.loop.validate(session.run, [session.item], *args)
        alone = session.patcher.memory_required([1, *CASES[family][2]])
        assert session.model._memory == alone if family in BESIDE else session.model._memory > 1.9 * alone
        wanted, *others = heard.given
        assert len(wanted) == len(controls) and len(others) > 2
        for given in others:
            assert len(given) == len(wanted) and all(map(torch.equal, given, wanted))
    before, after = session.learn()
    assert after < 0.95 * before
    gradients = []
    for each in (controls, controls_of(family, seed=60)):
        session.item = item_of(ours, session, family, each)
        gradients.append(session.gradients()[1])
    assert any(not torch.allclose(each, gradients[1][name]) for name, each in gradients[0].items())


@pytest.mark.parametrize("family", ["flux", "ip2p"])
def test_a_sample_within_a_run_is_what_the_host_draws_with_the_lora_and_the_control_picture(train, ours, family):
    controls, session = controls_of(family), Session(train, family, steps=2)
    item, found = item_of(ours, session, family, controls), []

    def look(done, running):
        if done.step == 2:
            found.append((running.lora("until now"), running.sample(drawn(family, 5, controls))))

    with torch.inference_mode():
        plain = drawn(family, 5, controls)(session.patcher)
        session.model.learn(session.plan, [item], name="x", stepped=look)
        ((lora, sample),) = found
        applied = drawn(family, 5, controls)(landed(ours, session, lora))
    assert (sample - applied).norm() < 1e-3 * (applied - plain).norm()


def refused(train, ours, family, match, **given):
    dataset, trainable = ours("lora_ops.train.dataset"), ours("nodes.host.trainable")
    picture = {"latents": (noise(*CASES[family][2]),), "conditions": (conditioning(family),)} | given
    data = dataset.Dataset((dataset.Picture("a.png", **picture),))
    model = inside.model(family)
    with pytest.raises(train.errors.TrainingError, match=match) as caught:
        trainable.require_trainable(model, data)
        trainable.paired(model.model, data)
    assert caught.value.file == "a.png" and caught.value.remedy


def test_pairs_that_a_model_cannot_take_are_refused_by_name(train, ours):
    for family in ("sd15", "chroma", "z_image"):
        refused(train, ours, family, "model takes none", controls=((noise(*CASES[family][2]),),))
    latent = noise(*CASES["ip2p"][2])
    refused(train, ours, "ip2p", "needs one control picture")
    refused(train, ours, "ip2p", "needs one control picture", controls=((latent, latent),))
    refused(train, ours, "ip2p", "4 x 8 x 8, its control picture one of 4 x 8 x 4", controls=((latent[..., :4],),))
    refused(train, ours, "flux", "its control picture one of 4 x 8 x 8", controls=((latent,),))
    told = by_the_hosts_nodes("flux", controls_of("flux"))
    refused(
        train, ours, "flux", "with a conditioning that has some", conditions=(told,), controls=(controls_of("flux"),)
    )
    both = (noise(16, 16, 16), noise(16, 16, 16).flip(-1))
    refused(train, ours, "flux", "mirrored, too", conditions=(told,), latents=both)
    refused(train, ours, "ip2p", "pictures to edit", conditions=(told,))


def test_a_control_picture_is_mirrored_and_stays_where_the_text_is_left_out(train, ours):
    dataset, session = ours("lora_ops.train.dataset"), Session(train, "flux")
    latent, control, told = noise(16, 16, 16), noise(16, 16, 16, seed=1), conditioning("flux")
    more = {"controls": ((control,), (control.flip(-1),))}
    picture = dataset.Picture("a.png", (latent, latent.flip(-1)), (told,), **more)
    picture = replace(picture, beside=replace(picture, of_base=True))
    plain = dataset.Picture("b.png", (latent,), (told,), regularisation=True)
    empty = conditioning("flux", seed=9)
    with torch.inference_mode():
        (pair, other), _ = session.model.items(dataset.Dataset((picture, plain), (), empty, 0.5))
    for wanted, condition in (
        (told, pair.conditions[0]),
        (empty, pair.empty),
        (told, pair.beside.conditions[0]),
    ):
        for shown, each in zip((control, control.flip(-1)), condition, strict=True):
            assert torch.equal(each[0][1]["reference_latents"][0], shown[None])
            assert torch.equal(each[0][0], wanted[0][0])
    assert "reference_latents" not in other.conditions[0][0][1] and "reference_latents" not in other.empty[0][1]
