"""`python -m tests.lora_ops.train.killed FOLDER KILLS RUN…`: runs that are killed -9 again and again, and go on.

A RUN is optimizer,accumulate,checkpointing. A run kills itself at one of its calls of functions, drawn by lot, among
them those that write its state, which it does after each step. Processes fork from one that has imported everything.
Fails where what a run learns differs in a bit from what one learns that nobody kills.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import torch

from lora_ops import files
from lora_ops.train import state
from lora_ops.train.optimizers import Descent
from tests.lora_ops.train.small import PLAN, Small


def carry_out(folder: Path, optimizer: str, accumulate: int, checkpointing: bool, last: int) -> None:
    """Go on from the folder's state, if it has one, and write what was learned and how many calls that took."""
    plan = replace(PLAN, steps=5, accumulate=accumulate, save_every=1, dropout=0.1, ema=0.9)
    path, calls = folder / "state.safetensors", 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call"
        if calls == last:
            os.kill(os.getpid(), signal.SIGKILL)

    small = Small(replace(plan, descent=replace(plan.descent, optimizer=optimizer)), checkpointing=checkpointing)
    sys.setprofile(count)
    if path.exists():
        state.restore(path, small.run)
    small.train(save=lambda run, best: state.save(path, run))
    sys.setprofile(None)
    files.write(folder / "learned.safetensors", small.result(), overwrite=True)
    (folder / "calls").write_text(str(calls))


def survived(folder: Path, *run, last: int = 0) -> bool:
    """Whether a process that does this gets to its end."""
    folder.mkdir(exist_ok=True)
    child = os.fork()
    if not child:
        code = 1
        try:
            carry_out(folder, *run, last)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    return code == 0


def kill(folder: Path, kills: int, *run) -> None:
    assert survived(folder / "whole", *run)
    calls, truth = int((folder / "whole" / "calls").read_text()), learned(folder / "whole")
    chance, killed, again = random.Random(0), 0, 0
    while killed < kills or not (folder / str(again) / "learned.safetensors").exists():
        there = folder / str(again)
        if survived(there, *run, last=chance.randrange(1, calls) if killed < kills else 0):
            assert learned(there) == truth
            again += killed < kills
        else:
            killed += 1
    print(*run, f"{killed} kills, {again + 1} runs", flush=True)


def learned(folder: Path) -> bytes:
    return (folder / "learned.safetensors").read_bytes()


def main(folder: str, kills: str, *runs: str) -> None:
    torch.set_num_threads(1)
    for told in runs:
        optimizer, accumulate, checkpointing = told.split(",")
        Small(replace(PLAN, descent=Descent(optimizer)))  # the first optimizer imports much
        here = Path(folder, optimizer)
        here.mkdir()
        kill(here, int(kills), optimizer, int(accumulate), bool(int(checkpointing)))


if __name__ == "__main__":
    main(*sys.argv[1:])
