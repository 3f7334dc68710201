"""The main job through a real server: workflows in, pictures and receipts out."""

from __future__ import annotations

import copy
import json
import threading

import pytest
import torch
from safetensors.torch import save

from harness.server import WorkflowError
from lora_ops.files import read, tensor_hash, write

STACK = "lora_stack_sd15"
FLUX = "lora_apply_flux"


def node_of(prompt: dict, kind: str) -> dict:
    return next(node for node in prompt.values() if node["class_type"] == kind)


def picture(server, prompt) -> bytes:
    (found,) = server.images(server.post(prompt))
    return found


def receipts(entry) -> list[dict]:
    return [json.loads(output["lora_ops"][0]) for output in entry["outputs"].values() if "lora_ops" in output]


def stacked(prompt: dict, text: str, seed: int = 42) -> dict:
    changed = copy.deepcopy(prompt)
    node_of(changed, "LoraOpsStack")["inputs"]["stack"] = text
    node_of(changed, "KSampler")["inputs"]["seed"] = seed
    return changed


def without_loras(prompt: dict, kind: str) -> dict:
    """The same workflow with our node taken out: its model and CLIP go straight through."""
    changed = copy.deepcopy(prompt)
    name = next(name for name, node in changed.items() if node["class_type"] == kind)
    inputs = changed.pop(name)["inputs"]
    for node in changed.values():
        for key, value in node["inputs"].items():
            if isinstance(value, list) and value[0] == name:
                node["inputs"][key] = inputs[("model", "clip")[value[1]]]
    return {name: node for name, node in changed.items() if node["class_type"] != "LoraOpsLoad"}


@pytest.fixture(scope="module")
def sd15(example):
    return example(STACK)


@pytest.fixture(scope="module")
def flux(example):
    return example(FLUX)


@pytest.mark.parametrize(("name", "kind"), [(STACK, "LoraOpsStack"), (FLUX, "LoraOpsApply")])
def test_an_example_workflow_makes_a_picture_that_the_loras_change(server, example, name, kind):
    prompt = example(name)
    entry = server.post(prompt)
    (with_loras,) = server.images(entry)
    assert with_loras.startswith(b"\x89PNG")
    assert with_loras != picture(server, without_loras(prompt, kind))
    applied = [receipt for receipt in receipts(entry) if "rows" in receipt]
    assert applied and all(row["coverage"] == 1.0 for receipt in applied for row in receipt["rows"])


def test_strength_zero_is_the_same_file_as_no_lora(server, sd15, flux):
    base = picture(server, without_loras(sd15, "LoraOpsStack"))
    assert picture(server, stacked(sd15, "<lora:ink_kohya:0>\n<lora:ink_diffusers:0:0>")) == base
    assert picture(server, stacked(sd15, "")) == base
    off = '{"version":1,"rows":[{"lora":"ink_kohya","on":false}]}'
    assert picture(server, stacked(sd15, off)) == base
    zero = copy.deepcopy(flux)
    node_of(zero, "LoraOpsApply")["inputs"].update(strength_model=0.0, strength_clip=0.0)
    assert picture(server, zero) == picture(server, without_loras(flux, "LoraOpsApply"))


def test_the_same_lora_in_four_dialects_is_the_same_picture(server, sd15):
    names = ("ink_kohya", "ink_comfy", "ink_diffusers", "ink_peft")
    pictures = {picture(server, stacked(sd15, f"<lora:{name}:0.8>")) for name in names}
    assert len(pictures) == 1


def test_our_picture_is_the_hosts_own_at_scale_one(server, sd15):
    """alpha / rank is a half in this file and a power of two rounds nothing: the same file to the last bit."""
    mine = picture(server, stacked(sd15, "<lora:ink_kohya:1>"))
    theirs = copy.deepcopy(sd15)
    node = node_of(theirs, "LoraOpsStack")
    node["class_type"] = "LoraLoader"
    inputs = node["inputs"]
    node["inputs"] = {"model": inputs["model"], "clip": inputs["clip"], "lora_name": "ink_kohya.safetensors"}
    node["inputs"] |= {"strength_model": 1.0, "strength_clip": 1.0}
    assert picture(server, theirs) == mine


def test_cores_loader_takes_our_lora_and_we_take_a_stack_of_rows(server, flux):
    mine = copy.deepcopy(flux)
    node_of(mine, "LoraOpsApply")["inputs"].update(strength_model=1.0)
    core = copy.deepcopy(mine)
    node = node_of(core, "LoraOpsApply")
    clip = node["inputs"]["clip"]
    name = next(name for name, each in core.items() if each is node)
    core[name] = {
        "class_type": "LoraModelLoader",
        "inputs": {
            "model": node["inputs"]["model"],
            "lora": node["inputs"]["lora"],
            "strength_model": 1.0,
            "bypass": False,
        },
    }
    for each in core.values():
        if each["inputs"].get("clip") == [name, 1]:
            each["inputs"]["clip"] = clip
    assert picture(server, mine) == picture(server, core)


def test_a_chain_of_stacks_through_lora_stack_is_one_stack(server, sd15):
    whole = server.post(stacked(sd15, "<lora:ink_kohya:0.8:0.6>\n<lora:ink_peft:0.5>"))
    chain = stacked(sd15, "<lora:ink_peft:0.5>")
    chain["90"] = {
        "class_type": "LoraOpsStack",
        "inputs": {"stack": "<lora:ink_kohya:0.8:0.6>", "min_coverage": 0.9, "mode": "patch"},
    }
    node_of({k: v for k, v in chain.items() if k != "90"}, "LoraOpsStack")["inputs"]["lora_stack"] = ["90", 2]
    entry = server.post(chain)
    assert server.images(entry) == server.images(whole)
    rows = [row["lora"] for receipt in receipts(entry) for row in receipt["rows"] if receipt["connected"]]
    assert rows == ["ink_kohya.safetensors", "ink_peft.safetensors"]


def test_trigger_words_come_out_of_load_stack_and_their_own_node(server, sd15):
    prompt = {
        "1": {"class_type": "LoraOpsLoad", "inputs": {"lora_name": r"flux\ink_kohya.safetensors"}},
        "2": {"class_type": "LoraOpsTriggerWords", "inputs": {"lora": ["1", 0]}},
        "3": {"class_type": "PreviewAny", "inputs": {"source": ["2", 0]}},
        "4": {"class_type": "PreviewAny", "inputs": {"source": ["1", 2]}},
    }
    outputs = server.post(prompt)["outputs"]
    assert outputs["3"]["text"] == ["ink wash"]
    assert json.loads(outputs["4"]["text"][0])["family"] == "flux"


@pytest.fixture(scope="module")
def wash(server):
    """ink_kohya without its metadata, as style/wash."""
    loras = server.base / "models" / "loras"
    (loras / "style").mkdir()
    write(loras / "style" / "wash.safetensors", read(loras / "ink_kohya.safetensors").tensors, overwrite=False)
    return loras / "style" / "wash.safetensors"


def row_of(entry) -> dict:
    (receipt,) = receipts(entry)
    (row,) = receipt["rows"]
    return row


def test_a_workflow_from_windows_runs_and_the_receipt_says_what_was_found(server, sd15, wash):
    name = r"Style\Wash.SAFETENSORS"
    entry = server.post(stacked(sd15, f"<lora:{name}:1>"))
    assert server.images(entry) == [picture(server, stacked(sd15, "<lora:ink_kohya:1>"))]
    assert (row_of(entry)["lora"], row_of(entry)["asked"]) == ("style/wash.safetensors", name)
    loaded = {"1": {"class_type": "LoraOpsLoad", "inputs": {"lora_name": name}}}
    loaded["2"] = {"class_type": "PreviewAny", "inputs": {"source": ["1", 2]}}
    told = json.loads(server.post(loaded)["outputs"]["2"]["text"][0])
    assert (told["lora"], told["asked"]) == ("style/wash.safetensors", name)
    stack = {"1": {"class_type": "LoraOpsStack", "inputs": {"stack": f"<lora:{name}:1>", "min_coverage": 0.9}}}
    stack["1"]["inputs"]["mode"] = "auto"
    stack["2"] = {"class_type": "PreviewAny", "inputs": {"source": ["1", 2]}}
    assert "style/wash.safetensors" in server.post(stack)["outputs"]["2"]["text"][0]


def test_a_row_finds_its_file_by_its_tensors_and_says_if_they_are_others(server, sd15, wash):
    def text(name: str, sha256: str) -> str:
        return json.dumps({"version": 1, "rows": [{"lora": name, "sha256": sha256}]})

    (wash.parent.parent / "ink_kohya.safetensors").rename(wash.parent / "ink_kohya.away")  # the same tensors
    try:
        entry = server.post(stacked(sd15, text("drawing", tensor_hash(wash))))
    finally:
        (wash.parent / "ink_kohya.away").rename(wash.parent.parent / "ink_kohya.safetensors")
    row = row_of(entry)
    assert (row["lora"], row["asked"], row["other_tensors"]) == ("style/wash.safetensors", "drawing", False)
    assert server.images(entry) == [picture(server, stacked(sd15, "<lora:ink_kohya:1>"))]
    row = row_of(server.post(stacked(sd15, text("style/wash", "0" * 64))))
    assert (row["lora"], row["asked"], row["other_tensors"]) == ("style/wash.safetensors", None, True)
    with pytest.raises(WorkflowError, match="No file there has the tensors of the row. Did you mean style/wash"):
        server.post(stacked(sd15, text("style/wish", "0" * 64)))


def test_trigger_words_come_from_the_file_beside_a_lora_as_it_is_now(server, sd15, wash):
    prompt = {
        "1": {"class_type": "LoraOpsLoad", "inputs": {"lora_name": "wash"}},
        "2": {"class_type": "LoraOpsTriggerWords", "inputs": {"lora": ["1", 0]}},
        "3": {"class_type": "PreviewAny", "inputs": {"source": ["2", 0]}},
    }
    wash.with_suffix(".txt").write_text("ink wash")
    outputs = server.post(prompt)["outputs"]
    assert outputs["3"]["text"] == ["ink wash"]
    assert outputs["2"]["text"] == ["style/wash.safetensors: ink wash (from wash.txt)"]
    wash.with_suffix(".json").write_text('{"activation text": "zwx"}')
    assert server.post(prompt)["outputs"]["2"]["text"] == ["style/wash.safetensors: zwx (from wash.json)"]
    wash.with_suffix(".json").write_text("{broken")
    outputs = server.post(stacked(sd15, "<lora:wash:1>"))["outputs"]
    (text,) = (output["text"][0] for output in outputs.values() if "lora_ops" in output)
    assert text.endswith("wash.json is no JSON object.")
    wash.with_suffix(".json").unlink()
    wash.with_suffix(".txt").unlink()


def test_nothing_changed_runs_nothing_and_a_changed_strength_only_the_stack(server, sd15):
    def cached(entry) -> set[str]:
        return {
            name for kind, data in entry["status"]["messages"] if kind == "execution_cached" for name in data["nodes"]
        }

    prompt = stacked(sd15, "<lora:ink_kohya:0.9>", seed=7)
    server.post(prompt)
    assert cached(server.post(prompt)) == set(prompt)
    again = cached(server.post(stacked(sd15, "<lora:ink_kohya:0.7>", seed=7)))
    loader = next(name for name, node in prompt.items() if node["class_type"] == "CheckpointLoaderSimple")
    assert loader in again and len(again) < len(prompt)


def test_a_changed_file_is_noticed(server, sd15):
    loras = server.base / "models" / "loras"
    source, changing = loras / "ink_kohya.safetensors", loras / "changing.safetensors"
    found = read(source)
    write(changing, found.tensors, found.metadata, overwrite=True)
    prompt = stacked(sd15, "<lora:changing:1>")
    first = picture(server, prompt)
    twice = {k: t * 2 if k.endswith("up.weight") else t for k, t in found.tensors.items()}
    write(changing, twice, found.metadata, overwrite=True)
    second = picture(server, prompt)
    assert second != first
    assert second == picture(server, stacked(sd15, "<lora:ink_kohya:2>"))
    write(changing, found.tensors, found.metadata, overwrite=True)
    assert picture(server, prompt) == first


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<lora:flux/ink_kohya:1>", ("made for FLUX.1; the model is Stable Diffusion 1.5", "ink_kohya.safetensors")),
        ("<lora:ink_kohia:1>", ("Did you mean ink_kohya.safetensors",)),
        ("<lora:x/ink_kohya:1>", ("means 2 files", "flux/ink_kohya.safetensors", "ink_kohya.safetensors")),
        ("<lora:ink_kohya:much>", ("finite number",)),
        ('{"version":1,"rows":[{"lora":"ink_kohya","block":"x"}]}', ("does not know: block",)),
        ('{"version":1,"rows":[{"lora":"ink_kohya","blocks":"x"}]}', ("'x' has no finite number", "role:mlp=0.5")),
    ],
)
def test_what_cannot_be_right_stops_with_words_that_help(server, sd15, text, words):
    with pytest.raises(WorkflowError) as caught:
        server.post(stacked(sd15, text))
    for each in words:
        assert each in str(caught.value)


def test_a_lora_for_a_text_encoder_that_is_not_connected_names_the_missing_clip(server, sd15):
    loras = server.base / "models" / "loras"
    found = read(loras / "ink_kohya.safetensors").tensors
    write(loras / "te.safetensors", {k: t for k, t in found.items() if k.startswith("lora_te_")}, overwrite=True)
    prompt = stacked(sd15, "<lora:te:1>")
    node = node_of(prompt, "LoraOpsStack")
    name = next(name for name, each in prompt.items() if each is node)
    clip = node["inputs"].pop("clip")
    for each in prompt.values():
        if each["inputs"].get("clip") == [name, 1]:
            each["inputs"]["clip"] = clip
    with pytest.raises(WorkflowError, match="modules are for the CLIP, which is not connected"):
        server.post(prompt)


def test_without_a_model_the_output_says_what_to_connect(server, sd15):
    prompt = stacked(sd15, "<lora:ink_kohya:1>")
    node_of(prompt, "LoraOpsStack")["inputs"].pop("model")
    with pytest.raises(WorkflowError, match="Connect a MODEL"):
        server.post(prompt)


def test_a_bad_file_is_an_error_and_the_server_lives(server, sd15):
    bad = server.base / "models" / "loras" / "bad.safetensors"
    bad.write_bytes(b"\x80\x04\x95 not a LoRA")
    with pytest.raises(WorkflowError, match="is a Python pickle"):
        server.post(stacked(sd15, "<lora:bad:1>"))
    nan = {"lora_unet_middle_block_1_proj_in.lora_up.weight": torch.tensor([[float("nan")]])}
    bad.write_bytes(save(nan))
    with pytest.raises(WorkflowError, match="NaN"):
        server.post(stacked(sd15, "<lora:bad:1>"))
    bad.unlink()
    assert picture(server, stacked(sd15, "<lora:ink_kohya:1>"))


def test_a_file_truncated_and_replaced_while_in_use_kills_nothing(server, sd15):
    """The host maps files: there one truncation is a bus error."""
    loras = server.base / "models" / "loras"
    whole = (loras / "ink_kohya.safetensors").read_bytes()
    file = loras / "torn.safetensors"
    file.write_bytes(whole)
    stop = threading.Event()

    def tear():
        while not stop.is_set():
            with file.open("r+b") as handle:
                handle.truncate(len(whole) // 2)
            file.write_bytes(whole)

    thread = threading.Thread(target=tear)
    thread.start()
    outcomes = set()
    try:
        for seed in range(12):
            try:
                outcomes.add(picture(server, stacked(sd15, f"<lora:torn:{1 + seed % 2}>", seed=1))[:4])
            except WorkflowError as error:
                assert "torn" in str(error)
    finally:
        stop.set()
        thread.join()
    assert picture(server, stacked(sd15, "<lora:torn:1>", seed=1)) == picture(
        server, stacked(sd15, "<lora:ink_kohya:1>", seed=1)
    )


def test_the_servers_log_has_no_error_or_warning_of_ours_when_all_goes_well(server, example):
    before = len(server.log())
    server.post(stacked(example(STACK), "<lora:ink_kohya:0.61>", seed=61))  # which nothing else has asked for
    flux = example(FLUX)
    node_of(flux, "LoraOpsApply")["inputs"].update(strength_model=0.61)
    server.post(flux)
    log = server.log()
    started, _, _ = log.partition("got prompt")
    assert "custom_nodes/lora_ops_pack" in started.replace("\\", "/") and "got prompt" in log[before:]
    for line in (started + log[before:]).splitlines():
        ours = "lora_ops" in line.lower() or "lora key not loaded" in line.lower()
        assert not (ours and ("[WARNING]" in line or "[ERROR]" in line or "Traceback" in line)), line
