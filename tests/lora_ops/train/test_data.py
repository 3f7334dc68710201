"""Data: an item comes in its guises, drawn by seed, step and place alone, and as often as it repeats."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from lora_ops.errors import TrainingError
from lora_ops.train import state
from lora_ops.train.data import Guises, Item, batches
from lora_ops.train.randomness import generator
from tests.lora_ops.train.small import PLAN, Small, items


def guises(item, count=4000):
    return [item.guise(generator(0, "guise", step, 0)) for step in range(count)]


def various(**more):
    latents = tuple(torch.full((4, 8, 8), float(n)) for n in range(2))
    masks = tuple(torch.full((1, 8, 8), n + 1.0) for n in range(2))
    return Item(latents, ("one", "two", "three"), masks, "", **more)


def test_each_latent_comes_with_its_mask_and_each_caption_alike_often():
    found = guises(various(dropout=0.25))
    assert all(float(guise.mask[0, 0, 0]) == float(guise.latent[0, 0, 0]) + 1 for guise in found)
    shares = Counter((float(guise.latent[0, 0, 0]), guise.condition) for guise in found)
    for latent in (0.0, 1.0):
        assert shares[latent, ""] == pytest.approx(4000 / 8, abs=110)  # five standard deviations
        for caption in ("one", "two", "three"):
            assert shares[latent, caption] == pytest.approx(4000 / 8, abs=110)


def test_captions_are_left_out_never_or_always_where_the_probability_says_so():
    assert "" not in {guise.condition for guise in guises(various(), 200)}
    assert {guise.condition for guise in guises(various(dropout=1.0), 200)} == {""}


def test_held_out_items_come_in_their_first_guise():
    item = various(dropout=1.0)
    guise = item.guise()
    assert guise.latent is item.latents[0] and guise.mask is item.masks[0] and guise.condition == "one"


def test_in_an_epoch_an_item_comes_as_often_as_it_repeats():
    data = [replace(item, repeats=times) for item, times in zip(items(3), (1, 2, 4), strict=True)]
    for seed in range(3):
        epoch = [number for step in range(4) for batch in batches(data, 2, 1, seed, step) for number in batch]
        assert Counter(epoch) == {0: 1, 1: 2, 2: 4}


@pytest.mark.parametrize("accumulate", [1, 4])
def test_guises_go_on_as_they_would_have_after_a_restart(accumulate, tmp_path):
    def made():
        small = Small(replace(PLAN, steps=6, accumulate=accumulate, save_every=3), [data] * 2)
        small.told = []

        def predict(x, sigma, conditions):
            small.told.append((small.run.step, *conditions))
            return small.model(x) * torch.tensor([1.0 + len(each) for each in conditions]).reshape(-1, 1, 1, 1)

        small.predict = predict
        return small

    latent = items(1)[0].latents[0]
    data, path = Item((latent, latent.flip(-1)), ("a", "bc"), empty="", dropout=0.3), tmp_path / "state.safetensors"
    whole = made().train(save=lambda run, best: state.save(path, run) if run.step == 3 else None)
    rest = made()
    state.restore(path, rest.run)
    rest.train()
    assert rest.told == [each for each in whole.told if each[0] >= 3] and len(set(whole.told)) > 4
    assert all(torch.equal(tensor, whole.result()[name]) for name, tensor in rest.result().items())


def test_what_a_condition_shows_is_mirrored_with_the_picture_with_text_and_without():
    latent = items(1)[0].latents[0]
    item = Item((latent, latent.flip(-1)), (Guises("ab"), Guises("cd")), empty=Guises("ef"), dropout=0.3)
    draws, seen = torch.Generator().manual_seed(0), set()
    for _ in range(60):
        guise = item.guise(draws)
        turned = torch.equal(guise.latent, item.latents[1])
        assert guise.condition in ("bdf" if turned else "ace")
        seen.add(guise.condition)
    assert seen == set("abcdef") and item.guise().condition == "a"
    with pytest.raises(TrainingError, match="2 latents has a condition in other guises"):
        replace(item, empty=Guises("e"))


def test_the_loss_of_a_regularisation_picture_counts_as_its_weight_says():
    """With two pictures, one at weight 0, the gradients are half of those of the other alone: the mean is of both."""
    found = []
    for weights in ((1.0, 0.0), (1.0, 1.0), (2.0, 1.0)):
        data = [replace(item, weight=weight) for item, weight in zip(items(2), weights, strict=True)]
        made = Small(replace(PLAN, steps=1), data).train()
        found.append(made.seen[0].loss)
    first, both, doubled = found
    assert doubled == pytest.approx(both + first, rel=1e-5)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"latents": ()}, "at least"),
        ({"latents": (torch.zeros(4, 8, 8), torch.zeros(4, 8, 4))}, "different shapes"),
        ({"masks": (torch.ones(1, 8, 8),)}, "1 masks for 2 latents"),
        ({"masks": (torch.ones(1, 8, 8), torch.zeros(1, 8, 8))}, "leaves nothing"),
        ({"dropout": 0.5, "empty": None}, "no text"),
        ({"repeats": 0}, "once at least"),
    ],
)
def test_what_does_not_fit_together_is_refused(wrong, says):
    with pytest.raises(TrainingError, match=says):
        replace(various(), **wrong)
