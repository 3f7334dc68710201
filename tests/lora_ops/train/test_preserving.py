"""What should stay what the model makes of it without the LoRA."""

from __future__ import annotations

import pytest
import torch

from lora_ops.errors import TrainingError
from lora_ops.train.dataset import Dataset, Picture
from lora_ops.train.preserving import classed, preserved


def picture(name, *captions, **more):
    conditions = tuple([[torch.full((1, 2, 3), float(n)), {"guidance": n}]] for n in range(len(captions) or 1))
    return Picture(name, (torch.zeros(4, 8, 8),), conditions, captions=captions, **more)


def encode(texts):
    return {text: [[text, {"pooled_output": text}]] for text in texts}


def choice(word="dog", trigger="", weight=1.0):
    return {"key": "class word", "class_word": word, "trigger_word": trigger, "weight": weight}


def test_a_class_word_stands_for_the_trigger_word_only():
    assert classed("a photo of sks, sksy grass", "sks", "a dog") == "a photo of a dog, sksy grass"
    assert classed("Ink Style, a fox", "ink style", "") == "a fox"
    assert classed("a fox, in ink style, red", "ink style", "") == "a fox, in, red"
    assert classed(r"sks", "sks", r"\1") == r"\1"


@pytest.mark.parametrize(("caption", "word"), [("a dog", "dog"), ("sksy", "dog"), ("sks dog", "SKS")])
def test_a_caption_that_would_stay_the_same_is_refused(caption, word):
    with pytest.raises(TrainingError, match=r"a\.png.*can stand for 'sks'"):
        preserved(Dataset((picture("a.png", caption),)), choice(word, "sks"), encode)


def test_beside_each_picture_but_those_for_regularisation_stands_one_of_its_class():
    first = picture("a.png", "sks dog", "dog, sks", weight=2.0, masks=(torch.ones(1, 8, 8),))
    other = picture("b.png", "dog", regularisation=True)
    data = Dataset((first, other), (picture("c.png", "sks"),), report={"captions": {"trigger": "sks"}})
    found = preserved(data, choice("toy", weight=0.5), encode)
    learned, regular = found.pictures
    assert (learned.captions, learned.of_base) == (first.captions, False) and regular is other
    assert found.held_out is data.held_out
    beside = learned.beside
    assert beside.captions == ("toy dog", "dog, toy") and beside.latents is first.latents
    assert (beside.of_base, beside.weight, beside.masks) == (True, 1.0, ())
    assert beside.conditions[1] == [["dog, toy", {"guidance": 1, "pooled_output": "dog, toy"}]]


def test_a_class_word_is_refused_where_the_text_encoder_sees_the_control_picture():
    seen = picture("a.png", "sks dog")
    seen.conditions[0][0][1]["reference_latents"] = [torch.zeros(1, 4, 8, 8)]
    with pytest.raises(TrainingError, match=r"a\.png.*control picture"):
        preserved(Dataset((seen,)), choice("toy", "sks"), encode)


def test_regularisation_pictures_become_what_the_model_makes_of_them():
    data = Dataset((picture("a.png", "x"), picture("b.png", "y", regularisation=True)))
    found = preserved(data, {"key": "regularisation pictures"}, encode)
    assert [each.of_base for each in found.pictures] == [False, True]
    assert preserved(data, {"key": "off"}, encode) is data


def test_where_there_is_nothing_to_preserve_it_is_said():
    for data, asked, match in (
        (Dataset((picture("a.png", "x"),)), {"key": "regularisation pictures"}, "has none"),
        (Dataset((picture("a.png", "x"),), report={"captions": None}), choice(), "there is none"),
        (Dataset((picture("a.png"),)), choice("dog", "sks"), r"a\.png.*has no caption"),
    ):
        with pytest.raises(TrainingError, match=match):
            preserved(data, asked, encode)
