"""A real ComfyUI: inside the test process (`pack`), and as a server of its own (`server`)."""

from __future__ import annotations

import importlib
import json
from types import ModuleType

import pytest
import torch

from harness import comfy, demo, inside, small
from harness.comfy import PACK
from harness.server import MOUNT, Server
from harness.workflow import to_prompt


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/host/" in item.path.as_posix():
            item.add_marker(pytest.mark.host)


@pytest.fixture(scope="session")
def comfy_path():
    """The folder of the ComfyUI at hand; without one the tests that need it are skipped, and run.py says so."""
    path = comfy.find()
    if path is None:
        pytest.skip("ComfyUI not found: set COMFYUI_PATH")
    return path


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


@pytest.fixture(scope="session")
def small_files(comfy_path):
    """A folder of small random models that the host's own loaders take for SD1.5 and FLUX."""
    return small.cached(comfy_path, *small.FILES)


@pytest.fixture(scope="session")
def server(comfy_path, small_files, tmp_path_factory):
    """A running server with the small models and the sample LoRAs. It writes no workflow into pictures, so that equal
    pictures are equal files."""
    base = tmp_path_factory.mktemp("comfy")
    demo.write_samples(small_files, base / "models" / "loras")
    demo.write_world(comfy_path, base / "models")
    with Server(comfy_path, base, models=small_files, arguments=("--disable-metadata",)) as running:
        yield running


@pytest.fixture(scope="session")
def example(server):
    """An example workflow as the prompt that the front end would post, at 64 by 64 pixels and two steps."""
    info = server.object_info()

    def prompt(name: str) -> dict:
        workflow = json.loads((PACK / "example_workflows" / f"{name}.json").read_text("utf-8"))
        found = demo.tried(to_prompt(workflow, info), server.base, side=64, steps=4)
        for node in found.values():
            if node["class_type"] == "KSampler":
                node["inputs"]["steps"] = 2
        return found

    return prompt
