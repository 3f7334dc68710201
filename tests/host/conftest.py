"""A real ComfyUI inside the test process: its folder first on the path, the pack mounted under one name."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest

from harness import comfy
from harness.comfy import PACK

MOUNT = "lora_ops_pack"


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
    """The pack as the host mounts it, with the host importable.

    ComfyUI's folder goes before the repository's: both have a top-level `nodes`, and here the host's is meant. The
    pack's modules are reached through the mount only; `import lora_ops` would make second copies of its classes.
    """
    sys.path.insert(0, str(comfy_path))
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    spec = importlib.util.spec_from_file_location(MOUNT, PACK / "__init__.py", submodule_search_locations=[str(PACK)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[MOUNT] = module
    spec.loader.exec_module(module)
    return module
