"""What a run has told: kept by step, on disk as it was, and thinned without losing a peak."""

from __future__ import annotations

import json
import math

import pytest
import torch

from lora_ops.train.history import FILE, Ending, History, read, thinned
from lora_ops.train.loop import Progress


def steps(history: History, first: int, final: int, every: int = 5) -> None:
    for step in range(first, final + 1):
        validation = 1 / step if step % every == 0 else None
        history.stepped(Progress(step, 100, step / 7, step / 8, 1e-4, 0.5, validation, validation is not None), step)
        if step % every == 0:
            history.saved(step, f"ink-{step:06}.safetensors", False)
            history.sampled(step, 2, 1000 + step)


def facts(history: History) -> dict[str, object]:
    return {name: value for name, value in vars(history).items() if not name.startswith("_")}


@pytest.fixture
def history() -> History:
    history = History("ink", 100, "3", "workflow", 12.5)
    history.sampled(0, 2, 1000)
    steps(history, 1, 23)
    return history


def test_it_is_read_from_disk_as_it_was_told(history, tmp_path):
    history.stepped(Progress(24, 100, 0.1, 0.2, 1e-4, 0.5, math.inf), 7)
    history.ending = Ending("cancelled", "by hand", 13.5)
    history.write(tmp_path)
    found = read(tmp_path)
    assert math.isnan(found.validations.pop().loss) and math.isinf(history.validations.pop().loss)
    assert facts(found) == facts(history)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_who_goes_on_from_a_saved_step_has_the_history_of_one_that_never_stopped(history):
    whole = History("ink", 100, "3", "workflow", 12.5)
    whole.sampled(0, 2, 1000)
    steps(whole, 1, 40)
    whole.went_on(20)
    steps(history, 21, 40)
    history.went_on(20)
    assert facts(history) == facts(whole)


@pytest.mark.parametrize("told", ["stepped", "saved", "sampled"])
def test_who_begins_anew_keeps_nothing_of_the_old_run(history, told):
    if told == "saved":  # what is told of a step may come before the step is
        history.saved(1, "ink-000001.safetensors", False)
    elif told == "sampled":
        history.sampled(0, 1, 2000)
    steps(history, 1, 1)
    assert history.step == 1 and history.loss_map()["loss"] == [1 / 7]
    assert [each.step for each in history.saves] == ([1] if told == "saved" else [])
    assert [each.step for each in history.samples] == [0]  # a fresh run may have drawn none of its own


def test_a_step_that_is_saved_twice_stays_the_best(history):
    history.saved(23, "ink.best.safetensors", True)
    history.saved(23, "ink-000023.safetensors", False)
    assert history.saves[-1] == (23, "ink-000023.safetensors", True)


def test_the_loss_map_is_cores_list_with_all_steps(history):
    told = history.loss_map()
    assert told["loss"] == [step / 7 for step in range(1, 24)] and told["steps"] == list(range(1, 24))
    assert told["validation"] == [[step, 1 / step] for step in (5, 10, 15, 20)]
    assert (told["saves"], told["best"]) == ([5, 10, 15, 20], 20)


@pytest.mark.parametrize("broken", ["", "[]", "{}", '{"version": 2}', '{"version": 1, "columns": []}'])
def test_what_is_no_history_is_refused(tmp_path, broken):
    (tmp_path / FILE).write_text(broken)
    with pytest.raises(ValueError):
        read(tmp_path)


def test_columns_of_unlike_lengths_are_refused(history, tmp_path):
    history.write(tmp_path)
    told = json.loads((tmp_path / FILE).read_text())
    told["columns"]["loss"].pop()
    (tmp_path / FILE).write_text(json.dumps(told))
    with pytest.raises(ValueError, match="one length"):
        read(tmp_path)


@pytest.mark.parametrize("count", [1, 4, 5, 60, 61, 399])
@pytest.mark.parametrize("most", [4, 5, 17, 60])
def test_thinned_values_keep_both_ends_and_both_extremes(count, most):
    values = torch.randn(count, generator=torch.Generator().manual_seed(count)).tolist()
    kept = thinned(values, most)
    assert kept == sorted(set(kept)) and len(kept) <= most
    assert (kept[0], kept[-1]) == (0, count - 1)
    assert {min(values), max(values)} <= {values[place] for place in kept}
