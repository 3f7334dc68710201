"""A real ComfyUI inside the test process."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch

from harness import inside
from harness.server import MOUNT


@pytest.fixture(scope="session")
def pack(comfy_path) -> ModuleType:
    """The pack as the host mounts it, with the host importable."""
    return inside.mount(comfy_path)


@pytest.fixture(scope="session")
def ours(pack):
    """The pack's modules by name, as the host has them."""
    return lambda name: importlib.import_module(f"{MOUNT}.{name}")


@pytest.fixture(scope="module")
def models(pack):
    """A small random model of each family, in this process; what a file of tests leaves loaded is its own."""
    return {family: inside.model(family) for family in inside.FAMILIES}


@pytest.fixture
def model(models, request):
    """The model of the family that a test is parametrized with."""
    return models[request.param]


@pytest.fixture(scope="session")
def apply(ours):
    """apply(model, (tensors, strength), …): our patch of these LoRA files on a clone, in one stack."""
    files, lora, stack = ours("lora_ops.files"), ours("lora_ops.lora"), ours("lora_ops.stack")
    landing, patching = ours("lora_ops.landing"), ours("nodes.host.patching")

    parsed = {}  # as the pack's cache has it: the same file is the same Lora

    def lora_of(tensors):
        if id(tensors) not in parsed:
            parsed[id(tensors)] = tensors, lora.from_file(files.TensorFile("test", tensors))
        return parsed[id(tensors)][1]

    def put(model, *loras, mode="patch"):
        entries = [stack.Entry(lora_of(tensors), {"model": strength, "clip": strength}) for tensors, strength in loras]
        landed = landing.land(entries, patching.targets(model, None))
        landing.require_coverage(landed, 1.0)
        return patching.applied(landed, mode, model, None).model

    return put


@pytest.fixture
def loras(ours, tmp_path, monkeypatch):
    """A models/loras folder of our own: style/ink, a/twin and b/twin, whose tensors differ."""
    import folder_paths

    folder = tmp_path / "loras"
    files = ours("lora_ops.files")
    for number, name in enumerate(("style/ink", "a/twin", "b/twin"), 1):
        path = folder / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            "lora_unet_middle_block_1_proj_in.lora_up.weight": torch.full((128, 2), float(number)),
            "lora_unet_middle_block_1_proj_in.lora_down.weight": torch.ones(2, 128, 1, 1),
        }
        files.write(path, tensors, {"modelspec.trigger_phrase": name}, overwrite=False)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(folder)], {".safetensors"}))
    folder_paths.filename_list_cache.pop("loras", None)
    yield folder
    folder_paths.filename_list_cache.pop("loras", None)


@pytest.fixture(scope="session")
def samples(ours):
    """samples(model, number, seed): the tensors of one of the sample LoRAs for a model."""
    made, patching = ours("lora_ops.samples"), ours("nodes.host.patching")

    def tensors(model, number: int = 0, seed: int = 0):
        found = made.tensors(made.SAMPLES[number], patching.targets(model, None))
        generator = torch.Generator().manual_seed(seed)
        noise = {key: torch.randn(t.shape, generator=generator) * 0.02 * seed for key, t in found.items()}
        return {key: t if key.endswith(".alpha") else t + noise[key] for key, t in found.items()}

    return tensors
