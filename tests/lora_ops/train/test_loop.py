"""The loop: it learns, the same way every time; it stops where it should and goes on where it stopped."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_ops import files
from lora_ops.errors import TrainingError
from lora_ops.select import Pattern
from lora_ops.train import loop, state
from lora_ops.train.data import Item, batches
from lora_ops.train.optimizers import OPTIMIZERS, Descent
from lora_ops.train.places import Aim
from lora_ops.train.timesteps import Timesteps
from tests.lora_ops.train.small import PLAN, Flow, Small, items

ROOT = Path(__file__).parents[3]


def installed(optimizer: str) -> bool:
    return importlib.util.find_spec(OPTIMIZERS[optimizer].module.partition(".")[0]) is not None


def require(optimizer: str) -> None:
    if optimizer == "adamw8bit":
        pytest.skip("it is made for GPUs, whose sums are not the same each time")
    if not installed(optimizer):
        pytest.skip(f"{OPTIMIZERS[optimizer].package} is not installed")


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_loss_of_one_item_falls_and_the_base_stays_as_it_was():
    made = Small(replace(PLAN, steps=60, batch=1), items(1))
    before = {name: p.clone() for name, p in made.model.named_parameters()}
    state_of_process = torch.get_rng_state()
    args = made.run, made.items, made.predict, Flow(), Timesteps()
    loss = loop.validate(*args)
    made.train()
    made.wrapper.install()
    assert loop.validate(*args) < 0.9 * loss
    made.wrapper.remove()
    assert all(torch.equal(p, before[name]) for name, p in made.model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state_of_process)


def test_the_same_seed_learns_the_same_and_another_does_not():
    first, again, other = (Small(replace(PLAN, seed=seed)).train().result() for seed in (1, 1, 2))
    assert equal(first, again) and not equal(first, other)


def test_every_item_comes_once_in_an_epoch_and_batches_are_of_one_shape():
    data = [*items(5), *(Item((torch.zeros(4, 8, 8),)) for _ in range(2))]
    for seed in range(3):
        epochs = [[batches(data, 2, 1, seed, 4 * epoch + step)[0] for step in range(4)] for epoch in range(2)]
        for epoch in epochs:
            assert sorted(n for batch in epoch for n in batch) == list(range(7))
            assert all(len({data[n].shape for n in batch}) == 1 for batch in epoch)
        assert epochs[0] != epochs[1]
    assert batches(data, 2, 2, 0, 3) == [batches(data, 2, 1, 0, n)[0] for n in (6, 7)]


@pytest.mark.parametrize(("batch", "accumulate"), [(1, 4), (2, 2), (3, 2)])
def test_gradients_do_not_depend_on_how_a_step_is_split(batch, accumulate):
    """Also where the last batch is smaller: 3 and 1."""
    found = []
    for size, parts in ((4, 1), (batch, accumulate)):
        made = Small(replace(PLAN, batch=size, accumulate=parts), items(1) * 4)
        made.wrapper.install()
        loop._gradients(made.run, made.items, made.predict, Flow(), Timesteps())
        found.append({name: p.grad for name, p in made.run.parameters.items()})
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("accumulate", "checkpointing"), [(1, False), (1, True), (4, False), (4, True)])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_going_on_from_a_state_is_bit_identical(optimizer, accumulate, checkpointing, tmp_path):
    require(optimizer)
    plan = replace(PLAN, steps=6, accumulate=accumulate, dropout=0.1, ema=0.9, save_every=3)
    schedule = "constant" if optimizer == "schedule_free" else "cosine"
    up_factor = 1.0 if optimizer == "prodigy" else 4.0
    plan = replace(plan, descent=Descent(optimizer, 0.01, up_factor=up_factor, schedule=schedule, warmup=2))
    whole = Small(plan, checkpointing=checkpointing).train()
    path = tmp_path / "state.safetensors"

    def stop(done):
        if done.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Small(plan, checkpointing=checkpointing).train(save=lambda run, best: state.save(path, run), progress=stop)
    rest = Small(plan, checkpointing=checkpointing)
    state.restore(path, rest.run)
    assert rest.run.step == 4
    rest.train()
    assert equal(rest.result(), whole.result())
    assert [done.loss for done in rest.seen] == [done.loss for done in whole.seen[4:]]
    assert rest.run.smoothed == whole.run.smoothed


def test_the_smoothed_loss_is_the_mean_at_first_and_then_forgets():
    """Else a high first loss would be seen for as many steps as it smooths over."""
    made = Small(replace(PLAN, steps=6, smoothing=0.75)).train()
    losses, told = ([getattr(done, name) for done in made.seen] for name in ("loss", "smoothed"))
    for step in range(1, 5):
        assert told[step - 1] == pytest.approx(sum(losses[:step]) / step)
    assert told[5] == pytest.approx(0.75 * (0.75 * told[3] + 0.25 * losses[4]) + 0.25 * losses[5])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_looking_at_what_was_learned_changes_no_bit(optimizer):
    """A schedule-free optimizer's average is got in place and given back in place, to rounding only."""
    require(optimizer)
    plan = replace(PLAN, ema=0.5, descent=Descent(optimizer, 0.01))
    plain, seen = Small(plan).train(), Small(plan)
    loras = []
    seen.train(progress=lambda done: loras.append(seen.run.lora("until now")))
    assert equal(seen.result(), plain.result())
    assert torch.equal(loras[-1].modules["first"].up, plain.result()["first.up"])
    assert not torch.equal(loras[0].modules["first"].up, loras[-1].modules["first"].up)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="what is killed is forked")
def test_killed_at_any_moment_it_goes_on_to_the_same_bits(tmp_path):
    """LORA_OPS_KILLS times with each optimizer that is installed; without it twice with AdamW."""
    runs = ["adamw,4,1", "adafactor,1,0", "prodigy,4,0", "schedule_free,1,1", "lion,4,1"]
    kills = os.environ.get("LORA_OPS_KILLS")
    runs = [run for run in runs if installed(run.partition(",")[0])] if kills else runs[:1]
    command = [sys.executable, "-m", "tests.lora_ops.train.killed", tmp_path, kills or "2", *runs]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stderr


def test_a_state_of_another_rank_or_other_places_is_refused_naming_both(tmp_path):
    path = tmp_path / "state.safetensors"
    state.save(path, Small().run)
    with pytest.raises(TrainingError, match="rank 4 and alpha 4.*rank 8 and alpha 8") as caught:
        state.restore(path, Small(replace(PLAN, aims=(Aim(Pattern.parse("*"), 8),))).run)
    assert caught.value.module == "first"
    with pytest.raises(TrainingError, match="4 places, the plan 1.*does not train"):
        state.restore(path, Small(replace(PLAN, aims=(Aim(Pattern.parse("blocks.0.out"), 4),))).run)
    with pytest.raises(TrainingError, match="adamw.*adafactor"):
        state.restore(path, Small(replace(PLAN, descent=Descent("adafactor"))).run)
    files.write(path, {"x": torch.zeros(1)}, overwrite=True)
    with pytest.raises(TrainingError, match="no state"):
        state.restore(path, Small().run)


def test_a_loss_that_is_not_finite_stops_within_its_step_and_keeps_what_was_learned(tmp_path):
    path, made = tmp_path / "state.safetensors", Small()
    answer = made.predict
    made.predict = lambda x, *rest: answer(x, *rest) * (float("nan") if made.run.step == 4 else 1)
    with pytest.raises(TrainingError, match="step 5"):
        made.train(save=lambda run, best: state.save(path, run))
    rest = Small()
    state.restore(path, rest.run)
    assert rest.run.step == 4
    assert equal(rest.train().result(), Small().train().result())


def test_the_average_follows_the_parameters():
    """With the past's weight min(ema, (1 + step) / (10 + step)), in float64 here."""
    made, seen = Small(replace(PLAN, ema=0.5)), []
    average = {name: p.detach().double() for name, p in made.run.parameters.items()}
    made.train(progress=lambda done: seen.append({n: p.detach().double() for n, p in made.run.parameters.items()}))
    for step, now in enumerate(seen, 1):
        past = min(0.5, (1 + step) / (10 + step))
        average = {name: past * average[name] + (1 - past) * now[name] for name in now}
    for name, tensor in made.result().items():
        torch.testing.assert_close(tensor.double(), average[name], rtol=1e-5, atol=1e-7)


def test_lora_plus_moves_up_faster():
    """A first step of AdamW moves everything by its rate."""
    made = Small(replace(PLAN, steps=1, descent=Descent(rate=0.01, weight_decay=0.0, up_factor=4.0)))
    made.train()
    ups = {name: p for name, p in made.result().items() if name.endswith(".up")}
    assert all(p.abs().max().item() == pytest.approx(0.04, rel=1e-2) for p in ups.values()) and ups


def test_prior_preservation_pulls_to_the_base_model():
    """An item that should stay as the base makes it costs nothing before the first step, and pulls back after."""
    kept = [Item(item.latents, of_base=True, weight=3.0) for item in items(2)]
    made = Small(replace(PLAN, steps=1, batch=1), kept).train()
    assert made.seen[0].loss == 0
    both = Small(replace(PLAN, steps=30, batch=1, accumulate=4), [*items(2), *kept]).train()
    alone = Small(replace(PLAN, steps=30, batch=1, accumulate=2), items(2)).train()
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))

    def drift(made):
        before = made.model(x)
        made.wrapper.install()
        return (made.model(x) - before).norm()

    assert drift(both) < drift(alone)


def test_held_out_items_are_looked_at_alike_each_time_and_the_best_state_is_marked():
    plan, marked = replace(PLAN, steps=12, validate_every=3), []
    made = Small(plan)
    made.train(held_out=items(6)[5:], save=lambda run, best: marked.append((run.step, best)))
    seen = {done.step: done.validation for done in made.seen if done.validation is not None}
    assert list(seen) == [3, 6, 9, 12] and made.run.best == min(seen.values())
    best = [step for step, value in seen.items() if value == min(v for s, v in seen.items() if s <= step)]
    assert [step for step, is_best in marked if is_best] == best
    again = loop.validate
    made.wrapper.install()
    args = (made.run, items(6)[5:], made.predict, Flow(), Timesteps())
    assert again(*args) == again(*args)


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    with pytest.raises(TrainingError, match="pip install prodigyopt"):
        Small(replace(PLAN, descent=Descent("prodigy")))


def test_gradients_too_large_for_float16_are_tried_again_with_a_smaller_scale():
    made, plain = Small(replace(PLAN, steps=3)), Small(replace(PLAN, steps=3)).train()
    made.run = loop.Run(made.run.plan, made.wrapper, scaled=True)
    made.run.scaler = torch.GradScaler("cpu", init_scale=2.0**32)
    answer = made.predict
    made.predict = lambda x, *rest: answer(x, *rest).half()
    made.train()
    assert made.run.step == 3 and made.run.scaler.get_scale() < 2.0**32
    for name, tensor in plain.result().items():
        torch.testing.assert_close(made.result()[name], tensor, rtol=0.05, atol=0.005)


def test_what_is_learned_beside_an_item_takes_its_noise_and_pulls_to_the_base_model():
    """Beside each batch the base is asked once, and the model once more, at the same noisy latents."""
    beside = [replace(item, beside=Item(item.latents, of_base=True, weight=3.0)) for item in items(2)]
    asked = []

    def spy(made):
        predict = made.predict

        def told(noisy, sigma, conditions):
            asked.append((noisy.clone(), sigma.clone(), torch.is_grad_enabled()))
            return predict(noisy, sigma, conditions)

        made.predict = told
        return made

    plan = replace(PLAN, steps=1, batch=1)
    made, alone = spy(Small(plan, beside)).train(), Small(plan, items(2)).train()
    assert [grad for _, _, grad in asked] == [True, False, True]
    assert all(torch.equal(noisy, asked[0][0]) and torch.equal(sigma, asked[0][1]) for noisy, sigma, _ in asked)
    assert made.seen[0].loss == alone.seen[0].loss  # nothing is lost of the base yet
    plan = replace(PLAN, steps=30, batch=1, accumulate=2)
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))

    def drift(items):
        made = Small(plan, items).train()
        before = made.model(x)
        made.wrapper.install()
        return (made.model(x) - before).norm()

    assert drift(beside) < drift(items(2))
