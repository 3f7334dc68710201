"""Prior preservation on the host: what should stay is to the bit what the model makes of it without the LoRA."""

from __future__ import annotations

import pytest
import torch

from harness import inside, texts

CLASS = {"key": "class word", "class_word": "fox", "trigger_word": "", "weight": 2.0}


@pytest.fixture(scope="module")
def parts(ours):
    class Modules:
        course, settings, errors = ours("nodes.host.course"), ours("lora_ops.train.settings"), ours("lora_ops.errors")
        dataset = ours("lora_ops.train.dataset")

    return Modules


@pytest.fixture(scope="module")
def pair(pack):
    return inside.model("sd15"), texts.clip("sd15")


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def data(parts, clip, regularisation=()):
    def picture(name, caption, seed, regularisation=False):
        condition = clip.encode_from_tokens_scheduled(clip.tokenize(caption))
        latent = noise(4, 8, 8, seed=seed)
        return parts.dataset.Picture(name, (latent,), (condition,), captions=(caption,), regularisation=regularisation)

    every = [picture("a.png", "a red sks", 1), *(picture("b.png", each, 2, True) for each in regularisation)]
    return parts.dataset.Dataset(tuple(every), report={"captions": {"trigger": "sks"}})


def course(parts, pair, dataset, *, clip=True, **settings):
    chosen = {"steps": 2, "sample_every": 0, "rank": 4, "alpha": 4.0, "learning_rate": 0.01}
    with torch.inference_mode():
        wires = parts.course.Wires(pair[0], dataset, pair[1] if clip else None)
        return parts.course.Course(parts.settings.Settings(**chosen | settings), wires)


def carried_out(made):
    """The LoRA, and what the model was asked and answered in the last step."""
    asked, predict = [], made.model.predict

    def told(noisy, sigma, conditions):
        answer = predict(noisy, sigma, conditions)
        asked.append((torch.is_grad_enabled(), noisy, sigma, conditions[0], answer.detach().clone()))
        return answer

    made.model.predict = told
    lora = made.model.learn(made.plan, made.items, name="x")
    return lora, asked[-3:]


def answer(pair, text, noisy, sigma):
    """The picture that the MODEL, as it came, makes of noise for a text."""
    import comfy.model_management

    model, clip = pair
    with torch.inference_mode():
        ((cross, _),) = clip.encode_from_tokens_scheduled(clip.tokenize(text))
        comfy.model_management.load_models_gpu([model])
        return model.model.apply_model(noisy, sigma, c_crossattn=cross)


@pytest.mark.parametrize("encoder", [{"key": "off"}, {"key": "on", "learning_rate": 1e-3}], ids=["model", "both"])
def test_beside_a_picture_the_models_own_answer_to_its_class_is_learned(parts, pair, encoder):
    with torch.inference_mode():
        made = course(parts, pair, data(parts, pair[1]), preservation=CLASS, text_encoder=encoder)
        lora, (picture, wanted, kept) = carried_out(made)
    assert any(name.startswith("text_encoders.") for name in lora.modules) == (encoder["key"] == "on")
    assert [each[0] for each in (picture, wanted, kept)] == [True, False, True]
    for each in (wanted, kept):
        assert torch.equal(each[1], picture[1]) and torch.equal(each[2], picture[2])
    _, noisy, sigma, _, found = wanted
    as_picture = pair[0].model.model_sampling.calculate_denoised(sigma, found, noisy)
    assert torch.equal(as_picture, answer(pair, "a red fox", noisy, sigma))
    assert not torch.equal(found, kept[4])  # the LoRA has moved it, and is drawn back


def test_regularisation_pictures_teach_the_models_own_answer(parts, pair):
    with torch.inference_mode():
        asked = {"key": "regularisation pictures"}
        made = course(parts, pair, data(parts, pair[1], ["a blue fox"]), preservation=asked, accumulation=2)
        _, calls = carried_out(made)
    (_, noisy, sigma, _, found) = next(each for each in calls if not each[0])
    as_picture = pair[0].model.model_sampling.calculate_denoised(sigma, found, noisy)
    assert torch.equal(as_picture, answer(pair, "a blue fox", noisy, sigma))


def test_what_cannot_be_preserved_is_refused_before_anything_runs(parts, pair):
    with torch.inference_mode():
        dataset = data(parts, pair[1])
    for settings, match in (
        ({"preservation": {"key": "regularisation pictures"}}, "has none"),
        ({"preservation": CLASS, "clip": False}, "need a CLIP"),
        ({"preservation": CLASS | {"trigger_word": "zwx"}}, r"a\.png.*stand for 'zwx'"),
    ):
        with pytest.raises(parts.errors.TrainingError, match=match):
            course(parts, pair, dataset, **settings)
