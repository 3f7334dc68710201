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


def test_an_unchanged_file_is_read_once_and_a_changed_one_again(ours, loras, monkeypatch):
    caches = ours("nodes.host.caches")
    reads = []
    read = caches.read_file
    monkeypatch.setattr(caches, "read_file", lambda path: (reads.append(path), read(path))[1])
    name, path = os.path.join("style", "ink.safetensors"), str(loras / "style" / "ink.safetensors")
    first = caches.load(name, path)
    assert caches.load(name, path) is first and len(reads) == 1
    stack = ours("nodes.stacking").LoraOpsStack
    before = stack.fingerprint_inputs(stack="<lora:ink:1>")
    assert stack.fingerprint_inputs(stack="<lora:ink:1>") == before
    shutil.copy(loras / "a" / "twin.safetensors", loras / "style" / "ink.safetensors")
    assert stack.fingerprint_inputs(stack="<lora:ink:1>") != before
    module = "lora_unet_middle_block_1_proj_in"
    assert caches.load(name, path).lora.modules[module].up[0, 0] == 2 and len(reads) == 2


def test_a_changed_configuration_of_pefts_is_read_again(ours, loras):
    caches, names = ours("nodes.host.caches"), ours("nodes.host.names")
    path, config = loras / "adapter_model.safetensors", loras / "adapter_config.json"
    shutil.copy(loras / "style" / "ink.safetensors", path)
    told = []
    for text in (None, '{"r": 2, "lora_alpha": 4}', '{"r": 2, "lora_alpha": 16}'):
        if text:
            config.write_text(text)
        (adapter,) = caches.load(path.name, str(path)).lora.modules.values()
        state = names.state(str(path))
        told.append((adapter.scale, state, caches.report_of(path.name, str(path), state).data["alpha"]))
    config.unlink()
    assert [scale for scale, _, _ in told] == [1, 2, 8]
    assert len({state for _, state, _ in told}) == 3 and names.state(str(path)) == told[0][1]
    config.write_text("{}")  # beside a file of another name it says nothing
    assert "adapter_config" not in names.state(str(loras / "style" / "ink.safetensors"))


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
    for name in ("a/twin.safetensors", "b/twin.safetensors", "style/ink.safetensors"):
        caches.load(name, str(loras / name))
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


@pytest.mark.parametrize("spelling", ["alpha", "lora_alpha"])
@pytest.mark.parametrize("alpha", [2.0, 0.1, 1 / 3 * 1.1])
def test_a_lora_model_has_one_alpha_that_says_the_scale_to_the_bit(ours, spelling, alpha):
    sockets, files, lora = ours("nodes.sockets"), ours("lora_ops.files"), ours("lora_ops.lora")
    tensors = {"m.lora_up.weight": torch.ones(4, 3), "m.lora_down.weight": torch.ones(3, 4)}
    tensors[f"m.{spelling}"] = torch.tensor(alpha, dtype=torch.float64)
    file = files.TensorFile("x", tensors)
    wire = dict(sockets.LoraModel(file, lora.from_file(file)))
    assert sorted(wire) == ["m.alpha", "m.lora_down.weight", "m.lora_up.weight"]
    assert wire["m.alpha"].dtype == (torch.float32 if alpha == 2 else torch.float64)
    assert sockets.lora_of(wire).modules["m"].scale == alpha / 3


@pytest.mark.parametrize(
    ("wire", "words"),
    [
        ({"m.lora_up.weight": torch.tensor([[float("nan")]])}, "NaN"),
        ({"m.alpha": 2.0}, "not a dense tensor"),
        ({1: torch.ones(1)}, "the key 1, which is no name"),
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
        "LoraOpsPatches": (["model", "clip"], [("STRING", "report")]),
        "LoraOpsUnload": (["model", "clip", "which"], [("MODEL", "MODEL"), ("CLIP", "CLIP")]),
        "LoraOpsMerge": (
            ["model", "clip", "lora", "lora_stack", "strength_model", "strength_clip", "min_coverage"],
            [("MODEL", "MODEL"), ("CLIP", "CLIP"), ("STRING", "receipt")],
        ),
        "LoraOpsScale": (["lora", "strength", "blocks", "model"], [("LORA_MODEL", "lora")]),
        "LoraOpsSaveCheckpoint": (
            [
                *("model", "clip", "vae", "filename_prefix", "layout"),
                *("dtype_model", "dtype_clip", "dtype_vae", "destination", "if_exists", "max_shard_size"),
            ],
            [("STRING", "path"), ("STRING", "receipt")],
        ),
        "LoraOpsSaveLora": (
            [
                *("lora", "filename_prefix", "layout", "dtype", "trigger_words"),
                *("destination", "if_exists", "model", "clip"),
            ],
            [("STRING", "path")],
        ),
        "LoraOpsMergeFiles": (
            [
                *("base", "stack", "dtype", "filename_prefix"),
                *("destination", "if_exists", "lora_stack", "min_coverage"),
            ],
            [("STRING", "path"), ("STRING", "receipt")],
        ),
        "LoraOpsDataset": (
            [
                *("folder", "images", "captions", "masks", "latents", "conditioning", "vae", "clip", "resolution"),
                *("trigger_word", "repeats", "mirror", "mask_from", "unmasked_weight", "tag_orders", "keep_tags"),
                *("caption_dropout", "regularisation", "regularisation_weight", "validation", "aspect_buckets"),
                *("bucket_step", "enlarge", "cache"),
                *("control_folder", "control_images", "control_latents", "control_seen"),
            ],
            [("LORA_DATASET", "dataset"), ("IMAGE", "preview"), ("STRING", "report")],
        ),
        "LoraOpsTrain": (
            [
                *("model", "dataset", "clip", "vae", "sample_positive", "sample_negative"),
                *("preset", "name", "steps", "batch", "accumulation", "learning_rate", "rank", "alpha"),
                *("targets", "adapter", "optimizer", "objective", "text_encoder"),
                *("sample_prompts", "sample_every", "save_every", "resume", "seed"),
                *(
                    "schedule",
                    "loss",
                    "timesteps",
                    "sample_width",
                    "sample_height",
                    "sample_steps",
                    "sample_cfg",
                    "sample_sampler",
                ),
                *("sample_scheduler", "sample_seed", "precision", "checkpointing", "ema", "dropout"),
                *("clip_norm", "noise_offset", "guidance", "masked", "validate_every", "dry_run"),
                *("preservation", "offload", "compile"),
            ],
            [
                ("LORA_MODEL", "lora"),
                ("MODEL", "MODEL"),
                ("LOSS_MAP", "loss_map"),
                ("IMAGE", "samples"),
                ("STRING", "report"),
            ],
        ),
        "LoraOpsLossPlot": (["loss_map", "width", "height", "log_scale"], [("IMAGE", "plot")]),
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
