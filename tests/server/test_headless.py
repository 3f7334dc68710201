"""`python run.py train RECIPE` on a real ComfyUI: it trains as the graph did, and a Ctrl+C keeps what was learned."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from harness.comfy import PACK
from harness.workflow import defaults

PATIENCE = 180  # seconds, for machines whose few cores are busy


@pytest.fixture
def recipe(server, tmp_path):
    info = server.object_info()
    folder = server.base / "input" / "headless"
    folder.mkdir()
    Image.new("RGB", (64, 64), "red").save(folder / "red.png")
    checkpoint = {"ckpt_name": "v1-5-pruned-emaonly-fp16.safetensors"}
    data = {"folder": "headless", "resolution": "64", "vae": ["1", 2], "clip": ["1", 1], "trigger_word": "red"}
    train = {"model": ["1", 0], "dataset": ["2", 0], "name": "headless", "sample_every": 0, "rank": 4, "alpha": 4.0}
    prompt = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": checkpoint},
        "2": {"class_type": "LoraOpsDataset", "inputs": defaults("LoraOpsDataset", info) | data},
        "3": {"class_type": "LoraOpsTrain", "inputs": defaults("LoraOpsTrain", info) | train},
    }
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"version": 1, "node": "3", "prompt": prompt}))
    return path


def hears_ctrl_c():
    """What a shell starts in the background does not, nor what that starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.skipif(sys.platform == "win32", reason="a test there cannot send a Ctrl+C to another process")
def test_a_recipe_trains_without_a_page_until_ctrl_c_which_keeps_what_was_learned(comfy_path, server, recipe, tmp_path):
    command = [sys.executable, "-m", "harness.headless", "--comfy", str(comfy_path), str(recipe), "steps=100000"]
    folder = server.base / "output" / "lora_ops" / "headless"
    with (tmp_path / "said").open("wb") as said:
        running = subprocess.Popen(
            [*command, "--base-directory", str(server.base)],
            cwd=PACK,
            stdout=said,
            stderr=subprocess.STDOUT,
            preexec_fn=hears_ctrl_c,
        )
    try:
        deadline = time.monotonic() + PATIENCE
        while b"loss" not in (tmp_path / "said").read_bytes():
            assert running.poll() is None and time.monotonic() < deadline, (tmp_path / "said").read_text()
            time.sleep(0.1)
        os.kill(running.pid, signal.SIGINT)
        status = running.wait(PATIENCE)
    finally:
        running.kill()  # and its server goes with it
    told = (tmp_path / "said").read_text()
    assert status == 1 and "what was learned so far is kept" in told and "interrupted" in told, told
    assert (folder / "state.safetensors").exists() and len(list(folder.glob("headless-0*.safetensors"))) == 1
