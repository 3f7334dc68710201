"""What a person chooses, as the plan that it means."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from lora_ops.dialects import published_map
from lora_ops.errors import LoraOpsError
from lora_ops.families import FAMILIES
from lora_ops.train.dataset import BESIDE, REFERENCES, Dataset, Picture
from lora_ops.train.encoders import LANGUAGE, TRAINED, require_known, text_aims
from lora_ops.train.places import places
from lora_ops.train.presets import PRESETS, Chosen
from lora_ops.train.recipes import differences, recipe
from lora_ops.train.settings import Settings, aims
from lora_ops.train.timesteps import Timesteps

CHOSEN = Chosen("FLUX.1", "constant", Timesteps("logit_normal"), 1.0, 1.0, "simple")


@pytest.fixture(scope="module")
def flux():
    return published_map(next(family for family in FAMILIES if family.name == "flux"))


def told(found):
    return [(aim.pattern and aim.pattern.text, aim.rank, aim.alpha) for aim in found]


def test_selectors_have_ranks_of_their_own_and_alpha_keeps_its_ratio(flux):
    chosen = {"key": "selectors", "selectors": "role:attn, *.to_k=4\nrole:mlp = 32, double_blocks.0=0"}
    found = aims(chosen, 16, 8.0, flux)
    assert told(found) == [
        ("role:attn", 16, 8.0),
        ("*.to_k", 4, 2.0),
        ("role:mlp", 32, 16.0),
        ("double_blocks.0", 0, 8.0),
    ]
    assert told(aims(chosen, 16, None, flux))[1] == ("*.to_k", 4, None)


@pytest.mark.parametrize("text", ["", " , ", "role:attn=1.5", "role:attn=-1", "role:attn=x", "role:nothing=4", "=4"])
def test_what_is_no_selector_with_a_rank_is_refused(flux, text):
    with pytest.raises(LoraOpsError):
        aims({"key": "selectors", "selectors": text}, 16, 16.0, flux)


def test_a_choice_of_roles_is_of_those_that_the_model_has(flux):
    assert told(aims({"key": "attention"}, 8, 8.0, flux)) == [(None, 8, 8.0)]
    assert [text for text, _, _ in told(aims({"key": "attention and mlp"}, 8, 8.0, flux))] == ["role:attn", "role:mlp"]
    places = [
        len(Settings(targets={"key": key}).plan(CHOSEN, flux).places(flux))
        for key in ("attention", "attention and mlp", "all")
    ]
    assert places == sorted(places) and len(set(places)) == 3


def of_text(name, choice):
    targets = published_map(next(family for family in FAMILIES if family.name == name))
    found = places(targets, text_aims(choice, 4, 4.0, targets), "clip")
    return Counter("t5" if "t5xxl" in place.target.key else "clip" for place in found)


def test_a_text_encoder_learns_with_its_t5_where_that_is_asked_for():
    clips = {"sd15": 12, "sd2": 24, "sdxl": 44, "sd3": 44, "flux": 12, "cascade_c": 32}
    for name, layers in clips.items():
        assert of_text(name, "on") == {"clip": 4 * layers}
    assert of_text("sd3", "with t5") == {"clip": 4 * 44, "t5": 4 * 24}
    assert of_text("chroma", "with t5") == {"t5": 4 * 24}
    assert text_aims("off", 4, 4.0, None) == ()
    for name, choice, match in (("sdxl", "with t5", "has no T5"), ("chroma", "on", "is T5 alone")):
        with pytest.raises(LoraOpsError, match=match):
            of_text(name, choice)


def test_every_family_that_trains_trains_its_text_encoder_or_says_why_not():
    said = {name: "is a language model .*, which stays as it is" for name in LANGUAGE} | {"anima": "Anima is none"}
    assert PRESETS.keys() == {*TRAINED, *said} and not said.keys() & set(TRAINED)
    for name, match in said.items():
        with pytest.raises(LoraOpsError, match=match):
            require_known(name)


def test_every_setting_reaches_the_plan(flux):
    settings = Settings(
        steps=7,
        batch=2,
        accumulation=3,
        learning_rate=0.5,
        rank=8,
        alpha=4.0,
        adapter={"key": "rs-lora", "initial": "orthogonal"},
        optimizer={"key": "lion", "weight_decay": 0.2, "lora_plus": 4.0},
        schedule={"key": "cosine_with_restarts", "warmup": 5, "cycles": 3},
        objective={"key": "min-snr", "gamma": 3.0},
        loss={"key": "huber", "huber_c": 0.3, "huber_schedule": "constant"},
        timesteps={"key": "logit-normal", "mean": 0.1, "deviation": 0.9, "shift": 2.0},
        text_encoder={"key": "on", "learning_rate": 0.25},
        save_every=11,
        validate_every=13,
        seed=17,
        precision="bf16",
        ema=0.9,
        dropout=0.1,
        clip_norm=2.0,
        noise_offset=0.05,
    )
    plan = settings.plan(CHOSEN, flux)
    assert (plan.steps, plan.batch, plan.accumulate, plan.seed, plan.save_every, plan.validate_every) == (
        7,
        2,
        3,
        17,
        11,
        13,
    )
    assert (plan.algebra, plan.initial, plan.rank_stabilised) == ("lora", "orthogonal", True)
    assert (plan.ema, plan.dropout, plan.clip, str(plan.autocast)) == (0.9, 0.1, 2.0, "torch.bfloat16")
    assert told(plan.aims) == told(plan.text_aims)[:1] == [(None, 8, 4.0)]
    descent, objective = plan.descent, plan.objective
    assert (descent.optimizer, descent.rate, descent.text_rate, descent.weight_decay) == ("lion", 0.5, 0.25, 0.2)
    assert (descent.up_factor, descent.schedule, descent.warmup) == (4.0, "cosine_with_restarts", 5)
    assert descent.schedule_options == {"num_cycles": 3}
    assert (objective.weighting, objective.gamma, objective.noise_offset) == ("min_snr", 3.0, 0.05)
    assert (objective.loss, objective.huber_c, objective.huber_schedule) == ("huber", 0.3, "constant")
    assert plan.timesteps == Timesteps("logit_normal", 0.1, 0.9, 2.0)
    assert Settings().plan(CHOSEN, flux).timesteps is CHOSEN.timesteps
    prodigy = Settings(optimizer={"key": "prodigy", "weight_decay": 0.0, "d_coef": 2.0}).plan(CHOSEN, flux).descent
    assert prodigy.options == {"d_coef": 2.0}


def test_recipes_differ_by_what_is_learned_and_not_by_what_nodes_are_called():
    def made(names, **inputs):
        load, train = names
        prompt = {
            load: {"class_type": "Load", "inputs": {"file": inputs.pop("file", "a")}},
            train: {"class_type": "LoraOpsTrain", "inputs": {"model": [load, 0], "rank": 4, **inputs}},
        }
        return {"prompt": prompt, "node": train, "pictures": "x"}

    one = made(("1", "2"), steps=4)
    assert differences(one, made(("7", "9"), steps=8, sample_every=3)) == []
    assert differences(one, made(("1", "2"), file="b", rank=8)) == ["model", "rank"]
    assert differences(one, one | {"pictures": "y"}) == ["pictures"]
    assert differences(one, made(("1", "2"), preservation="off")) == []  # an older version's is off, too
    assert differences(one, made(("1", "2"), preservation="class word")) == ["preservation"]


def test_a_recipe_tells_other_control_pictures_wherever_they_are():
    nodes = {"1": {"class_type": "LoraOpsTrain", "inputs": {}}}

    def told(controls=(), **options):
        picture = Picture("a.png", (torch.zeros(1, 2, 2),), ([[torch.zeros(1), options]],), controls=controls)
        return recipe(nodes, "1", Dataset((picture,)))["pictures"]

    one, other = torch.ones(1, 2, 2), torch.full((1, 2, 2), 2.0)
    for before, after in (
        ({"controls": ((one,),)}, {"controls": ((other,),)}),
        ({REFERENCES: [one]}, {REFERENCES: [other]}),
        ({BESIDE: one}, {BESIDE: other}),
    ):
        assert len({told(), told(**before), told(**after)}) == 3


def test_whether_a_data_set_is_kept_on_disk_makes_no_difference_to_a_run():
    def made(**inputs):
        data = {"class_type": "LoraOpsDataset", "inputs": {"folder": "ink", "mirror": False, **inputs}}
        train = {"class_type": "LoraOpsTrain", "inputs": {"dataset": ["1", 0]}}
        return {"prompt": {"1": data, "2": train}, "node": "2", "pictures": "x"}

    assert differences(made(cache=True), made(cache=False)) == differences(made(), made(cache=True)) == []
    assert differences(made(cache=True), made(cache=True, mirror=True)) == ["dataset"]
