"""Gathering: which pictures are held out, what goes with which; and reading ahead."""

from __future__ import annotations

import threading
from contextlib import closing

import pytest
import torch

from lora_ops.errors import TrainingError
from lora_ops.train.ahead import ahead
from lora_ops.train.gathering import each_its_own, held_out, masked, of_folder
from lora_ops.train.telling import text

NAMES = [f"{number}.png" for number in range(40)]


@pytest.mark.parametrize(
    ("count", "share", "wanted"), [(40, 0.1, 4), (40, 0.0, 0), (5, 0.01, 1), (1, 0.5, 0), (0, 0.5, 0)]
)
def test_a_share_is_held_out_one_at_least_never_all(count, share, wanted):
    found = held_out(NAMES[:count], share)
    assert len(found) == wanted and found <= set(NAMES[:count])
    assert found == held_out(reversed(NAMES[:count]), share)


def test_more_pictures_hold_out_the_same_ones_unless_a_new_one_comes_before_them():
    few, many = held_out(NAMES[:20], 0.2), held_out(NAMES, 0.1)
    assert few and many & set(NAMES[:20]) <= few


def test_one_value_is_for_all_and_another_number_is_refused():
    assert each_its_own(None, 2, "captions") == [None, None]
    assert each_its_own(["a"], 2, "captions") == ["a", "a"]
    assert each_its_own(["a", "b"], 2, "captions") == ["a", "b"]
    with pytest.raises(TrainingError, match="3 pictures and 2 captions"):
        each_its_own(["a", "b"], 3, "captions")


def test_what_is_outside_of_a_mask_counts_a_little():
    (found,) = masked([torch.tensor([0.0, 0.5, 1.0])], 0.2)
    assert found.tolist() == pytest.approx([0.2, 0.6, 1.0])


def test_an_empty_folder_says_what_is_in_it_instead(tmp_path):
    with pytest.raises(TrainingError, match="holds no picture. Put pictures"):
        of_folder(tmp_path)
    (tmp_path / "film.mp4").write_bytes(b"")
    with pytest.raises(TrainingError, match=r"holds no picture. It holds film\.mp4"):
        of_folder(tmp_path)


def test_reading_ahead_keeps_the_order_and_no_more_than_was_asked_for_is_begun():
    begun, go = [], threading.Event()

    def read(number):
        begun.append(number)
        go.wait()
        return number * number

    with closing(ahead(read, iter(range(100)), 3)) as found:
        go.set()
        assert [next(found) for _ in range(5)] == [0, 1, 4, 9, 16]
    assert len(begun) <= 5 + 3


def test_an_error_while_reading_ahead_comes_in_its_turn():
    found = ahead(lambda number: 6 // number, [3, 2, 0, 1], 2)
    assert [next(found), next(found)] == [2, 3]
    with pytest.raises(ZeroDivisionError):
        next(found)


def test_a_report_of_many_names_stays_short():
    report = {
        "source": "a\nb",
        "pictures": 900,
        "held_out": 0,
        "regularisation": 0,
        "epoch": 900,
        "resolutions": [512],
        "auto": False,
        "buckets": [[f"{n}×{n}", n] for n in range(30)],
        "captions": {"written": 0, "without": [f"{n}.png" for n in range(900)], "trigger": ""},
        "masks": 0,
        "controls": 0,
        "mirrored": False,
        "dropout": 0.0,
        "kept": {"latents": [0, 900], "texts": [0, 1]},
        "small": [f"{n}.png" for n in range(900)],
        "cropped": [],
        "left_out": [[f"{n}.mp4", "no picture"] for n in range(70)],
        "notes": [],
    }
    lines = text(report).splitlines()
    assert len(lines) < 16 and all(len(line) < 200 for line in lines)
    assert lines[0].startswith("a\\nb: 900 pictures") and lines[-1] == " and 62 more"
    assert any("used as they are: all" in line for line in lines)
