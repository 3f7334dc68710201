"""Saving, killed at any moment: each way by which the nodes write leaves the whole file or none."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tqdm import tqdm

from harness import inside, small
from lora_ops.files import read_header, write
from lora_ops.files.writing import TEMPORARY
from lora_ops.samples import write_samples

KILLS = int(os.environ.get("LORA_OPS_KILLS", "3"))  # of each way; a release deserves 300 in all
CHECKPOINT = {
    "destination": "output",
    **dict.fromkeys(("dtype_model", "dtype_clip", "dtype_vae"), "keep"),
}
WAYS = {
    "full checkpoint": ("LoraOpsSaveCheckpoint", CHECKPOINT),
    "diffusion model": ("LoraOpsSaveCheckpoint", CHECKPOINT),
    "sharded diffusers folder": ("LoraOpsSaveCheckpoint", {**CHECKPOINT, "max_shard_size": 0.001}),
    "kohya": ("LoraOpsSaveLora", {"dtype": "keep", "trigger_words": "", "destination": "output"}),
    "peft": ("LoraOpsSaveLora", {"dtype": "fp16", "trigger_words": "", "destination": "output"}),
    "": ("LoraOpsMergeFiles", {"dtype": "keep", "min_coverage": 1.0, "destination": "output"}),
}


@pytest.fixture(scope="module")
def wires(ours, samples, apply, small_files, pack):
    """A MODEL with a LoRA, a VAE, and the LoRA."""
    import comfy.sd
    import comfy.utils

    model = inside.model("flux", torch.float16)
    tensors = samples(model, 0, seed=1)
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(small_files / small.FILES["flux"][2])))
    return {"model": apply(model, (tensors, 0.7)), "vae": vae, "lora": tensors}


@pytest.fixture
def save(ours, wires, small_files, tmp_path, monkeypatch, pack):
    """save(layout, name): what the node does when it is run, as the next number of a name of the output folder."""
    import folder_paths

    nodes, loras, base = ours("nodes.saving"), tmp_path / "loras", small_files / small.FILES["flux"][0]
    loras.mkdir()
    write_samples({key: entry.shape for key, entry in read_header(base).entries.items()}, loras)
    for kind, folder in (("loras", loras), ("diffusion_models", small_files / "diffusion_models")):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(folder)], {".safetensors"}))
        folder_paths.filename_list_cache.pop(kind, None)
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "out"))
    hidden = SimpleNamespace(hidden=SimpleNamespace(unique_id="1", prompt={}, extra_pnginfo={}))

    def run(layout, name):
        node, inputs = WAYS[layout]
        inputs = {**inputs, "filename_prefix": name, "if_exists": "number"}
        if node == "LoraOpsSaveCheckpoint":
            inputs |= {"layout": layout, "model": wires["model"], "vae": wires["vae"]}
        elif node == "LoraOpsSaveLora":
            inputs |= {"layout": layout, "model": wires["model"], "lora": wires["lora"]}
        else:
            inputs |= {"base": small.FILES["flux"][0], "stack": "<lora:ink_kohya:0.5>"}
        return Path(getattr(nodes, node).execute.__func__(hidden, **inputs).args[0])

    yield run
    for kind in ("loras", "diffusion_models"):
        folder_paths.filename_list_cache.pop(kind, None)


def contents(path: Path) -> dict[str, bytes]:
    """The files at a path, without what depends on the time: the header of a safetensors file."""
    found = {}
    for file in sorted(each for each in (path.rglob("*") if path.is_dir() else [path]) if each.is_file()):
        data = file.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little") if file.suffix == ".safetensors" else 0
        found[file.name if path.is_dir() else ""] = data[start:]
    return found


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
@pytest.mark.parametrize("layout", WAYS)
def test_a_kill_at_any_moment_leaves_the_whole_file_or_none(layout, save, tmp_path):
    folder, rng = tmp_path / "out", random.Random(layout)
    started = time.monotonic()
    wanted = contents(save(layout, "whole"))
    once, orphans, finished = time.monotonic() - started, 0, 0
    for kill in range(KILLS):
        child = os.fork()
        if not child:
            try:
                torch.set_num_threads(1)  # its threads stayed with the parent
                tqdm.set_lock(threading.RLock())  # the children would share one, which a killed one may hold for ever
                while True:
                    save(layout, f"{kill}/x")
            finally:
                os._exit(1)
        place = folder / str(kill)
        while not (place.exists() and any(place.iterdir())):
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "the child ended by itself"
            time.sleep(0.001)
        time.sleep(rng.random() * 2 * once)
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "the child ended by itself"
        for path in place.iterdir():
            if path.name.endswith(TEMPORARY):
                orphans += 1
                os.utime(path, (0, 0))
            else:
                assert contents(path) == wanted, path.name
                finished += 1
        write(place / "next.safetensors", {}, overwrite=False)  # whoever writes there next sweeps
        assert not list(place.glob(f".*{TEMPORARY}"))
    assert KILLS < 20 or (orphans > KILLS / 10 and finished), "too few kills met a save at work"
