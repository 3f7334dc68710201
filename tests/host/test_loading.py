"""Files by name, their cache and the wires, on the host inside this process."""

from __future__ import annotations

import asyncio
import copy
import os
import shutil
import subprocess
import sys

import pytest
import torch

from harness.comfy import PACK


@pytest.fixture
def loras(ours, tmp_path, monkeypatch):
    """A models/loras folder of our own: style/ink, a/twin and b/twin."""
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


@pytest.mark.parametrize(
    "name",
    ["style/ink.safetensors", r"style\ink.safetensors", "style/ink", "ink", "ink.safetensors", "old/place/ink"],
)
def test_a_lora_is_found_under_every_name_that_means_it(ours, loras, name):
    assert ours("nodes.host.names").resolve(name) == os.path.join("style", "ink.safetensors")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("twin", "2 folders"),
        ("style/inc", "Did you mean style/ink.safetensors"),
        ("nowhere", "is not in models/loras"),
        ("../../etc/passwd", "is not in models/loras"),
        ("/etc/passwd", "is not in models/loras"),
        ("x\0y", "is not in models/loras"),
    ],
)
def test_a_name_that_means_no_lora_or_several_is_an_error_that_helps(ours, loras, name, words):
    with pytest.raises(ours("lora_ops.errors").FileError, match=words):
        ours("nodes.host.names").path_of(name)
    assert words.split()[0] in ours("nodes.loading").LoraOpsLoad.validate_inputs(lora_name=name)


def test_an_unchanged_file_is_read_once_and_a_changed_one_again(ours, loras, monkeypatch):
    caches = ours("nodes.host.caches")
    reads = []
    read = caches.read_file
    monkeypatch.setattr(caches, "read_file", lambda path: (reads.append(path), read(path))[1])
    first = caches.load("ink")
    assert caches.load("style/ink.safetensors") is first and len(reads) == 1
    stack = ours("nodes.stacking").LoraOpsStack
    before = stack.fingerprint_inputs(stack="<lora:ink:1>")
    assert stack.fingerprint_inputs(stack="<lora:ink:1>") == before
    shutil.copy(loras / "a" / "twin.safetensors", loras / "style" / "ink.safetensors")
    assert stack.fingerprint_inputs(stack="<lora:ink:1>") != before
    module = "lora_unet_middle_block_1_proj_in"
    assert caches.load("ink").lora.modules[module].up[0, 0] == 2 and len(reads) == 2


def test_a_wired_name_is_fingerprinted_by_all_files(ours, loras):
    load, stack = ours("nodes.loading").LoraOpsLoad, ours("nodes.stacking").LoraOpsStack
    before = [load.fingerprint_inputs(lora_name=None), stack.fingerprint_inputs(stack="", lora_stack=None)]
    shutil.copy(loras / "a" / "twin.safetensors", loras / "b" / "twin.safetensors")
    after = [load.fingerprint_inputs(lora_name=None), stack.fingerprint_inputs(stack="", lora_stack=None)]
    assert before[0] != after[0] and before[1] != after[1]


def test_the_cache_keeps_within_its_budget(ours, loras, monkeypatch):
    caches = ours("nodes.host.caches")
    caches._files.clear()
    monkeypatch.setattr(caches, "BUDGET", 1)
    for name in ("a/twin", "b/twin", "ink"):
        caches.load(name)
    assert len(caches._files) == 1


def test_core_reads_our_lora_model_at_our_scale(ours):
    """alpha 0 means "rank" to its writers and "nothing" to the host; on the wire it is spelled out."""
    sockets, files, lora = ours("nodes.sockets"), ours("lora_ops.files"), ours("lora_ops.lora")
    file = files.TensorFile(
        "x",
        {"m.lora_up.weight": torch.ones(4, 2), "m.lora_down.weight": torch.ones(2, 4), "m.alpha": torch.tensor(0.0)},
    )
    wire = sockets.LoraModel(file, lora.from_file(file))
    assert wire["m.alpha"] == 2 and file.tensors["m.alpha"] == 0
    assert sockets.lora_of(wire).modules["m"].scale == 1
    assert sockets.lora_of(dict(wire)).modules["m"].scale == 1


@pytest.mark.parametrize(
    ("wire", "words"),
    [
        ({"m.lora_up.weight": torch.tensor([[float("nan")]])}, "NaN"),
        ({"m.alpha": 2.0}, "not a dense tensor"),
        ({"m.alpha": torch.eye(2).to_sparse()}, "not a dense tensor"),
        (None, "not a dict"),
        ("ink.safetensors", "not a dict"),
    ],
)
def test_a_foreign_lora_model_that_is_none_is_refused(ours, wire, words):
    with pytest.raises(ours("lora_ops.errors").FileError, match=words):
        ours("nodes.sockets").lora_of(wire)


def test_a_lora_model_that_another_node_edited_is_read_again(ours):
    sockets, files, lora = ours("nodes.sockets"), ours("lora_ops.files"), ours("lora_ops.lora")
    file = files.TensorFile("x", {"m.lora_up.weight": torch.ones(4, 2), "m.lora_down.weight": torch.ones(2, 4)})
    wire = sockets.LoraModel(file, lora.from_file(file))
    for edited in (copy.copy(wire), copy.deepcopy(wire)):
        edited["m.lora_up.weight"] = edited["m.lora_up.weight"] * 0
        assert sockets.lora_of(edited).modules["m"].idle
    assert not sockets.lora_of(wire).modules["m"].idle


@pytest.mark.parametrize("wire", [5, "a", [("a", 1.0)], [("a", "1", 1.0)], [("a", float("nan"), 1.0)], [(1, 1.0, 1.0)]])
def test_a_foreign_lora_stack_is_checked(ours, wire):
    with pytest.raises(ours("lora_ops.errors").StackError):
        ours("nodes.sockets").rows_of(wire)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_strength_that_is_no_number_is_refused(ours, value):
    """The host lets NaN through its range check."""
    with pytest.raises(ours("lora_ops.errors").StackError, match="strength_model"):
        ours("nodes.patching").LoraOpsApply.execute(None, {}, value, 1.0, 0.9, "patch")


def test_node_ids_inputs_and_outputs_are_frozen(pack):
    """Workflows store values by position: this table may only grow at the end of a list."""
    extension = asyncio.run(pack.comfy_entrypoint())
    found = {}
    for node in asyncio.run(extension.get_node_list()):
        schema = node.define_schema()
        found[schema.node_id] = (
            [entry.id for entry in schema.inputs],
            [(entry.io_type, entry.display_name) for entry in schema.outputs],
        )
        assert all(entry.tooltip for entry in (*schema.inputs, *schema.outputs)), schema.node_id
    assert found == {
        "LoraOpsLoad": (
            ["lora_name"],
            [("LORA_MODEL", "lora"), ("STRING", "trigger_words"), ("STRING", "info")],
        ),
        "LoraOpsApply": (
            ["model", "clip", "lora", "strength_model", "strength_clip", "min_coverage", "mode"],
            [("MODEL", "MODEL"), ("CLIP", "CLIP"), ("STRING", "receipt")],
        ),
        "LoraOpsStack": (
            ["stack", "model", "clip", "lora_stack", "min_coverage", "mode"],
            [
                ("MODEL", "MODEL"),
                ("CLIP", "CLIP"),
                ("LORA_STACK", "LORA_STACK"),
                ("STRING", "trigger_words"),
                ("STRING", "receipt"),
            ],
        ),
        "LoraOpsTriggerWords": (["lora", "lora_stack"], [("STRING", "trigger_words")]),
    }


def test_loading_the_nodes_imports_no_peft(comfy_path):
    code = (
        "import asyncio, importlib.util as u, sys;"
        f"sys.path.insert(0, {str(comfy_path)!r});"
        "import comfy.cli_args; comfy.cli_args.args.cpu = True;"
        f"root = {str(PACK)!r};"
        "spec = u.spec_from_file_location('pack', root + '/__init__.py', submodule_search_locations=[root]);"
        "pack = u.module_from_spec(spec); sys.modules['pack'] = pack; spec.loader.exec_module(pack);"
        "asyncio.run(pack.comfy_entrypoint());"
        "assert 'pack.nodes.stacking' in sys.modules;"
        "print('peft' in sys.modules, 'safetensors' in {name for name in sys.modules if 'lora_ops' in name})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=comfy_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False False"
