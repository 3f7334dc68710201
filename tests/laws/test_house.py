"""The house: who may import whom, and what importing must not do."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOST = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "execution", "folder_paths", "server", "nodes"}

# Each room may import itself and the rooms before it.
ORDER = (
    "errors",
    "files",
    "algebra",
    "inplace",
    "adapters",
    "alpha",
    "lora",
    "families",
    "dialects",
    "select",
    "stack",
    "landing",
    "recipe",
    "survival",
    "scaling",
    "live",
    "layouts",
    "receipt",
    "words",
    "checkpoints",
    "merge",
    "train",
    "report",
    "samples",
    "cli",
    "__main__",
)


def imported(path: Path) -> set[str]:
    """Absolute names of the modules a file imports; relative ones as the pack's own dotted names."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = [*base, *([node.module] if node.module else [])]
            found |= {".".join([*module, alias.name]) for alias in node.names}
    return found


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def room(name: str) -> str:
    return name.split(".")[1]


@pytest.mark.parametrize("path", sources("lora_ops"), ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_import_only_rooms_before_them(path):
    own = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    here = room(own) if own != "lora_ops.__init__" else "errors"
    for name in imported(path):
        assert name.split(".")[0] not in HOST, f"{own} imports the host: {name}"
        if name.startswith("lora_ops."):
            there = room(name)
            assert there in ORDER, f"{there} has no place in ORDER"
            assert ORDER.index(there) <= ORDER.index(here), f"{own} imports {name}, which comes after it"


@pytest.mark.parametrize("path", sources("nodes"), ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_door_imports_the_host(path):
    if "host" in path.parts:
        return
    outside = {name for name in imported(path) if name.split(".")[0] in HOST - {"nodes"}}
    assert not outside, f"{path.name} imports {outside}; go through nodes/host"


def test_siblings_of_a_registry_do_not_import_each_other():
    for path in sources("lora_ops/adapters"):
        if path.stem not in ("__init__", "base"):
            siblings = {name for name in imported(path) if name.startswith("lora_ops.adapters.")}
            allowed = {"base", "lora"} - {path.stem}  # GLoRA has a LoRA beside it
            assert {name.split(".")[2] for name in siblings} <= allowed, siblings


def test_nothing_prints_but_the_command_line():
    for path in [*sources("lora_ops", "nodes"), ROOT / "__init__.py"]:
        calls = (node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call))
        prints = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
        assert not prints or path.name in ("cli.py", "samples.py"), f"{path} prints at {prints}"


def test_importing_the_command_line_loads_no_heavy_package():
    code = "import sys, lora_ops.cli; print(*{'peft', 'transformers', 'comfy', 'safetensors'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_importing_the_pack_runs_nothing():
    """The host imports every pack's __init__; ours must not even import torch there."""
    code = (
        "import sys, importlib.util as u; before = set(sys.modules);"
        "spec = u.spec_from_file_location('pack', '__init__.py', submodule_search_locations=['.']);"
        "module = u.module_from_spec(spec); sys.modules['pack'] = module; spec.loader.exec_module(module);"
        "print(*{'torch', 'peft', 'pack.nodes', 'pack.lora_ops'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
