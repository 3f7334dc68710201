"""A real ComfyUI: where it is, and as a server of its own."""

from __future__ import annotations

import json

import pytest

from harness import comfy, demo, small
from harness.checks import ON_HOST
from harness.comfy import PACK
from harness.server import Server
from harness.workflow import to_prompt


def pytest_collection_modifyitems(items):
    for item in items:
        if item.nodeid.startswith(ON_HOST):
            item.add_marker(pytest.mark.host)


@pytest.fixture(scope="session")
def comfy_path():
    """The folder of the ComfyUI at hand; without one the tests that need it are skipped, and run.py says so."""
    path = comfy.find()
    if path is None:
        pytest.skip("ComfyUI not found: set COMFYUI_PATH")
    return path


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
