"""A LoRA file that is replaced, rewritten, cut or deleted while it is loaded or in use: the server lives and says which
file it was, and what is there now is what is used."""

from __future__ import annotations

import copy
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.server import WorkflowError
from lora_ops.files import read, write
from tests.server.test_nodes import STACK, node_of

TIMES = int(os.environ.get("LORA_OPS_CHANGES", "2"))  # of each; a release deserves a hundred
TICK = 0.02  # seconds: some clocks of files stand still that long


def replace(path: Path, content: bytes) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_bytes(content)
    os.replace(fresh, path)


def rewrite(path: Path, content: bytes) -> None:
    """In place: for a moment it is empty, then half there."""
    path.write_bytes(content)


def cut(path: Path, content: bytes) -> None:
    os.truncate(path, len(content) // 2)


def cut_to_nothing(path: Path, content: bytes) -> None:
    os.truncate(path, 0)


def delete(path: Path, content: bytes) -> None:
    path.unlink()


@pytest.fixture(scope="module")
def contents(server):
    """Two LoRAs in files of the same size, of different scales."""
    file = read(server.base / "models" / "loras" / "ink_kohya.safetensors")
    found = []
    for factor in (1, 4):
        tensors = {key: tensor * factor if key.endswith(".alpha") else tensor for key, tensor in file.tensors.items()}
        write(server.base / "some.safetensors", tensors, file.metadata, overwrite=True)
        found.append((server.base / "some.safetensors").read_bytes())
    assert len(found[0]) == len(found[1])
    return found


@pytest.fixture(scope="module")
def prompt(example):
    """A LoRA on a model, and its receipt; nothing is sampled."""
    found = example(STACK)
    node = node_of(found, "LoraOpsStack")
    node["inputs"] |= {"stack": "<lora:changing:1:0>"}
    loader = node["inputs"]["model"][0]
    return {loader: found[loader], "90": {**node, "inputs": {**node["inputs"], "clip": [loader, 1]}}} | {
        "91": {"class_type": "PreviewAny", "inputs": {"source": ["90", 4]}}
    }


def scale(server, prompt) -> float:
    """The scale of the LoRA that was used."""
    (row,) = json.loads(server.post(prompt)["outputs"]["91"]["text"][0])["rows"]
    assert row["coverage"] == 1
    (found,) = row["scale"]
    return float(found)


class Posted(threading.Thread):
    """A prompt under way: what it gives or its error."""

    def __init__(self, task: Callable[[], object]) -> None:
        super().__init__()
        self.task, self.outcome = task, None
        self.start()

    def run(self) -> None:
        try:
            self.outcome = self.task()
        except WorkflowError as error:
            self.outcome = error


def require_told(error: WorkflowError) -> None:
    assert "changing" in str(error) and str(error).rstrip().endswith(".")
    assert error.node_errors or (error.exception_type or "").rpartition(".")[2] in ("FileError", "TargetError")


@pytest.mark.parametrize("in_use", [False, True], ids=["loaded", "in use"])
@pytest.mark.parametrize("change", [replace, rewrite, cut, cut_to_nothing, delete])
def test_the_server_lives_and_uses_what_is_there(server, prompt, contents, change, in_use):
    path = server.base / "models" / "loras" / "changing.safetensors"
    replace(path, contents[0])
    scales = [scale(server, prompt)]
    scales.append(4 * scales[0])
    for number in range(TIMES):
        before, after = number % 2, 1 - number % 2
        replace(path, contents[before])
        time.sleep(TICK)
        assert scale(server, prompt) == scales[before]
        if in_use:
            other = copy.deepcopy(prompt)  # a prompt of its own, so that the host runs it
            other["90"]["inputs"]["stack"] = f"<lora:changing:{number + 2}:0>"
            replace(path, contents[before])  # and a file that has to be read
            busy = Posted(lambda other=other: scale(server, other))
            time.sleep(0.001 * (number % 50))
            change(path, contents[after])
            busy.join()
            if isinstance(busy.outcome, WorkflowError):
                require_told(busy.outcome)
            else:
                assert busy.outcome in scales
        else:
            change(path, contents[after])
        time.sleep(TICK)
        if change in (replace, rewrite):
            assert scale(server, prompt) == scales[after]
        else:
            with pytest.raises(WorkflowError) as caught:
                server.post(prompt)
            require_told(caught.value)
            replace(path, contents[after])
            time.sleep(TICK)
            assert scale(server, prompt) == scales[after]
    path.unlink()
