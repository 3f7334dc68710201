"""Recipes: what a file says was merged into it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_ops import recipe, samples
from lora_ops.dialects import target_map
from lora_ops.errors import StackError
from lora_ops.families import recognise
from lora_ops.files import TensorFile
from lora_ops.landing import land
from lora_ops.lora import from_file
from lora_ops.recipe import Ingredient, Recipe
from lora_ops.select import parse_selectors
from lora_ops.stack import Entry

HASH = "ab" * 32
INK = Ingredient("ink.safetensors", HASH, {"model": 0.8, "clip": -0.5}, "role:mlp=0.5, *.attn1.*=1e-05")
WASH = Ingredient("wash", "", {"model": 1.0})

ingredients = st.builds(
    Ingredient,
    st.text(max_size=20).filter(lambda text: text.isprintable()),
    st.sampled_from(["", HASH]),
    st.dictionaries(st.sampled_from(["model", "clip"]), st.floats(allow_nan=False, allow_infinity=False)),
    st.sampled_from(["", "role:attn=0.25"]),
)


@settings(max_examples=50, deadline=None)
@given(st.lists(ingredients, max_size=3))
def test_a_recipe_comes_back_from_its_text(loras):
    written = Recipe(tuple(loras))
    assert Recipe.parse(written.text) == written


def test_no_text_is_an_empty_recipe_and_another_follows_the_first():
    assert Recipe.parse("") == Recipe() == Recipe.of_metadata({}, "x")
    assert Recipe((INK,)).joined(Recipe((WASH,))).loras == (INK, WASH)


def changed(**fields) -> str:
    [row] = json.loads(Recipe((INK,)).text)["loras"]
    return json.dumps({"version": 1, "loras": [row | fields]})


@pytest.mark.parametrize(
    "text",
    [
        *("{", "[]", "null", "{}", '{"version":1}', '{"version":1,"loras":{}}', '{"version":1,"loras":[{}]}'),
        *('{"version":2,"loras":[]}', '{"version":true,"loras":[]}', "[" * 100_000),
        *(changed(lora=1), changed(sha256="xy"), changed(sha256=None), changed(strengths=[]), changed(more=1)),
        *(changed(strengths={"vae": 1}), changed(strengths={"model": "1"}), changed(strengths={"model": True})),
        *(
            changed(strengths={"model": float("nan")}),
            changed(strengths={"model": 10**400}),
            changed(blocks="role:x=1"),
        ),
    ],
)
def test_a_recipe_that_would_have_to_be_guessed_is_refused(text):
    with pytest.raises(StackError):
        Recipe.parse(text)
    with pytest.raises(StackError) as caught:
        Recipe.of_metadata({recipe.KEY: text}, "kurt.safetensors")
    assert caught.value.file == "kurt.safetensors"


def test_a_landing_tells_what_it_merges():
    """Strengths where something landed; at strength 0 there is nothing to tell."""
    shapes = {key: tuple(tensor.shape) for key, tensor in samples.small_checkpoint().items()}
    targets = target_map(recognise(shapes), shapes)
    lora = from_file(TensorFile("ink", samples.tensors(samples.SAMPLES[0], targets)))
    blocks = parse_selectors("role:mlp=0.5,role:attn=1")
    both = Entry(lora, {"model": 0.8, "clip": 0.0}, blocks=blocks, sha256=HASH)
    none = Entry(lora, {"model": 0.0, "clip": 0.0})
    found = recipe.of(land([both, none], targets))
    assert found.loras == (Ingredient("ink", HASH, {"model": 0.8}, "role:mlp=0.5, role:attn=1"),)
    assert parse_selectors(found.loras[0].blocks) == blocks
