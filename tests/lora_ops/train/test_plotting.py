"""The picture of a run's losses: what is drawn can be told from its colours."""

from __future__ import annotations

import math

import pytest
from PIL import ImageColor

from lora_ops.errors import TrainingError
from lora_ops.train.plotting import BEST, RAW, SAVED, SMOOTHED, VALIDATION, Curves, decades, plot, ticks


def has(image, colour):
    return ImageColor.getrgb(colour) in {each for _, each in image.getcolors(1 << 20)}


def rows(image, colour, column):
    """Where a colour, or nearly that one, is in a column, from the top."""
    wanted = ImageColor.getrgb(colour)

    def near(pixel):
        return max(abs(one - other) for one, other in zip(pixel, wanted, strict=True)) < 60

    return [y for y in range(40, image.height - 40) if near(image.getpixel((column, y)))]


def drawn(loss_map, **more):
    return plot(Curves.of(loss_map), 400, 300, **more)


def test_a_run_is_drawn_whole_and_cores_losses_alone_are_drawn_too():
    steps = list(range(1, 101))
    whole = {
        "loss": [1 / step for step in steps],
        "smoothed": [2 / step for step in steps],
        "steps": steps,
        "validation": [[50, 1.5], [100, 1.2]],
        "saves": [50],
        "best": 100,
    }
    image = drawn(whole)
    assert image.size == (400, 300) and all(has(image, each) for each in (RAW, SMOOTHED, VALIDATION, BEST, SAVED))
    image = drawn({"loss": whole["loss"]})
    assert has(image, RAW) and has(image, SMOOTHED) and not any(has(image, each) for each in (VALIDATION, BEST, SAVED))


@pytest.mark.parametrize("log_scale", [False, True])
def test_higher_losses_are_higher(log_scale):
    image = drawn({"loss": [4.0, 4.0, 1.0, 1.0], "smoothed": [4.0, 4.0, 1.0, 1.0]}, log_scale=log_scale)
    left, right = (min(rows(image, SMOOTHED, column)) for column in (100, 350))
    assert left < right


def test_a_loss_that_is_no_number_is_left_out():
    image = drawn({"loss": [1.0, math.nan, 2.0, 0.0], "smoothed": [1.0, math.nan, 1.5, 1.4]}, log_scale=True)
    assert has(image, SMOOTHED)


@pytest.mark.parametrize("loss_map", [{}, {"loss": []}, None, {"loss": [math.nan]}, {"loss": [1.0], "steps": [1, 2]}])
def test_what_has_no_losses_is_refused(loss_map):
    with pytest.raises(TrainingError):
        drawn(loss_map)


def test_marks_are_round_numbers():
    assert ticks(0.0, 1.0, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert ticks(3, 47, 4) == [20, 40] and ticks(2, 2, 4) == [2]
    assert decades(0.03, 3, 5) == pytest.approx([0.05, 0.1, 0.2, 0.5, 1, 2])
