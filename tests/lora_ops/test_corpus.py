"""The corpus of bad and good files: each bad one is an error or stands in the receipt, each good one lands."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from lora_ops import files
from lora_ops.errors import FileError
from lora_ops.landing import land, merged
from lora_ops.lora import Lora, read_lora
from lora_ops.receipt import receipt
from lora_ops.stack import Entry
from tests.lora_ops import corpus
from tests.lora_ops.test_reading import REFUSED, by_name, placed

MODULES = (*corpus.SEMANTIC, *corpus.MISFITS)
BAD = (*REFUSED, *MODULES, *corpus.NO_LORA)


def test_every_row_has_a_name_of_its_own_and_there_are_rows_enough():
    assert len({case.name for case in BAD}) == len(BAD) >= 250
    assert len({case.name for case in corpus.GOOD}) == len(corpus.GOOD) >= 120


def landed(lora: Lora):
    """What a LoRA does to the corpus's model, and what the receipt says of it."""
    landing = land([Entry(lora, {"model": 1.0})], corpus.MODEL)
    told = receipt(landing, 0.0)
    (row,) = told.data["rows"]
    return landing, row, told.text


@by_name(MODULES)
def test_a_bad_module_is_in_the_receipt_with_its_file_the_reason_and_what_to_do(case, tmp_path):
    path = placed(tmp_path, case.make())
    lora = read_lora(path)
    landing, row, text = landed(lora)
    assert case.module not in landing.rows[0].landed
    [refusal] = [refusal for refusal in landing.rows[0].refused if refusal.module == case.module]
    assert case.phrase in refusal.reason and refusal.remedy.endswith(".")
    group, *_ = [
        group for group in row["refused"] if refusal.remedy == group["remedy"] and case.phrase in group["reason"]
    ]
    assert group["first"] and group["reason"] in text and group["remedy"] in text
    assert row["lora"] == lora.name == path and "!" in text


@by_name(corpus.NO_LORA)
def test_a_file_without_a_lora_is_refused(case, tmp_path):
    path = placed(tmp_path, case.make())
    with pytest.raises(FileError, match=case.phrase) as caught:
        read_lora(path)
    assert caught.value.file == path and caught.value.remedy.endswith(".")


@by_name(corpus.LORAS)
def test_a_good_lora_lands_whole_and_changes_the_model_by_finite_numbers(case, tmp_path):
    lora = read_lora(placed(tmp_path, case.make()))
    landing, row, text = landed(lora)
    assert row["coverage"] == 1.0 and not row["refused"] and "!" not in text
    for (_, key), pieces in landing.pieces.items():
        assert merged(torch.ones(corpus.shape_of(key)), pieces).isfinite().all()


@by_name((*MODULES, *corpus.NO_LORA))
def test_a_module_that_does_not_fit_is_refused_within_50_ms(case, tmp_path):
    path = placed(tmp_path, case.make())

    def once() -> float:
        start = time.thread_time()  # of this thread alone: nothing here waits, and other tests may be running
        with suppress(FileError):
            landed(read_lora(path))
        return time.thread_time() - start

    assert min(once() for _ in range(3)) < 0.05  # the first may have to make the maps of published models


def peak_of(task: Callable[[], object]) -> int:
    """Bytes that a task takes more than the process had, whoever allocates them: the kernel counts. What earlier tests
    have left free in the process goes back first: taken again, it would not be seen."""

    def kept(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) << 10

    with suppress(AttributeError):  # glibc's alone
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
    before = kept("VmRSS")
    task()
    return kept("VmHWM") - before


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own figures are Linux's")
@by_name(BAD)
def test_a_bad_file_costs_no_more_memory_than_its_size_and_32_mb(case, tmp_path):
    content = case.make()
    path = placed(tmp_path, content)

    def use() -> None:
        with suppress(FileError):
            landed(read_lora(path))

    assert peak_of(use) <= len(content) + 32 * corpus.MIB


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own figures are Linux's")
def test_the_kernel_sees_what_python_and_torch_take():
    for task in (lambda: bytearray(64 * corpus.MIB).count(1), lambda: torch.ones(16 * corpus.MIB).sum()):
        assert peak_of(task) >= 60 * corpus.MIB


def test_a_fault_in_the_values_is_found_at_reading_speed(tmp_path):
    whole = {f"unet.{n}.lora_up.weight": torch.ones(1 << 20) for n in range(8)}

    def seconds(tensors: dict[str, torch.Tensor]) -> float:
        path = placed(tmp_path, corpus.saved(tensors)())
        found = []
        for _ in range(3):
            start = time.thread_time()
            with suppress(FileError):
                files.read(path)
            found.append(time.thread_time() - start)
        return min(found)

    last = torch.ones(1 << 20)
    last[-1] = torch.nan
    # twice, for what else the machine does: the fault is in the last of all values
    assert seconds(whole | {"unet.7.lora_up.weight": last}) < 2 * seconds(whole) + 0.02
