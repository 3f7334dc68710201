"""The receipt on a node, in a real browser: what it shows, and that no workflow knows of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from harness import small
from harness.server import MOUNT
from lora_ops import samples
from lora_ops.dialects import target_map
from lora_ops.families import recognise
from lora_ops.files import TensorFile, write
from lora_ops.landing import land
from lora_ops.lora import from_file
from lora_ops.receipt import receipt
from lora_ops.stack import PARTS, Entry

HOSTILE = "<img src=x onerror=window.hacked=1>"
MODULE = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
FILE = "ink.safetensors"
FLUX = "lora_unet_double_blocks_0_img_attn_qkv"
GRAPH = """
    const add = (type, x) => {
        const node = LiteGraph.createNode(type);
        node.pos = [x, 100];
        app.graph.add(node);
        return node;
    };
    const stack = add("LoraOpsStack", 100), load = add("LoraOpsLoad", 600), preview = add("PreviewAny", 1100);
    stack.widgets[0].value = "<lora:ink:0.8:0.6>";
    load.widgets[0].value = "ink.safetensors";
    stack.connect(4, add("PreviewAny", 1100), 0);
    load.connect(2, preview, 0);
"""
MISFIT = """
    const model = LiteGraph.createNode("CheckpointLoaderSimple");
    model.pos = [-400, 100];
    model.widgets[0].value = given[0];
    app.graph.add(model);
    const fed = app.graph.nodes.find((node) => node.type === "LoraOpsStack");
    model.connect(0, fed, fed.inputs.findIndex((input) => input.name === "model"));
    fed.widgets[0].value = "<lora:flux:1>";
"""
FITS = """
    app.graph.remove(app.graph.nodes.find((node) => node.type === "CheckpointLoaderSimple"));
    app.graph.nodes.find((node) => node.type === "LoraOpsStack").widgets[0].value = "<lora:ink:0.8:0.6>";
"""
SAVED = "return {workflow: app.graph.serialize(), prompt: (await app.graphToPrompt()).output};"
SCRIPT = f"/extensions/{MOUNT}/receipt.js"
RECEIPT = ".lora_ops_receipt"
TEXTS = f"""
    return [...document.querySelectorAll("{RECEIPT} .lines")]
        .map((lines) => [...lines.children].map((line) => line.textContent).join("\\n")).sort();
"""
FAILED = f"""
    return [...document.querySelectorAll("{RECEIPT}:not(.expired)")].find((found) =>
        found.clientHeight && found.textContent.includes("made for FLUX.1"));
"""
EXPIRED = f"""
    return [...document.querySelectorAll("{RECEIPT}")].map((found) => found.classList.contains("expired"));
"""


@pytest.fixture
def lora(server) -> Path:
    """A LoRA of one module, whose author writes markup into its metadata."""
    path = server.base / "models/loras" / FILE
    factors = {f"{MODULE}.lora_up.weight": (320, 2), f"{MODULE}.lora_down.weight": (2, 320)}
    metadata = {"modelspec.trigger_phrase": HOSTILE}
    write(path, {name: torch.ones(shape) for name, shape in factors.items()}, metadata, overwrite=True)
    return path


@pytest.fixture
def misfit(server) -> str:
    """A checkpoint that the LoRA `flux`, written here, is not for."""
    path = server.base / "models/loras/flux.safetensors"
    factors = {f"{FLUX}.lora_up.weight": (9216, 2), f"{FLUX}.lora_down.weight": (2, 3072)}
    write(path, {name: torch.ones(shape) for name, shape in factors.items()}, overwrite=True)
    return Path(small.FILES["sd15"][0]).name


@pytest.fixture
def ran(lora, page):
    """The page after a run of two of our nodes, which show their receipts."""
    page.run(GRAPH)
    assert page.queue() == "execution_success"
    page.wait(f"return document.querySelectorAll('{RECEIPT} .lines > div').length > 2")
    return page


def allow_clipboard(page):
    permissions = ["clipboardReadWrite", "clipboardSanitizedWrite"]
    page.driver.execute_cdp_cmd("Browser.grantPermissions", {"permissions": permissions, "origin": page.server.url})


def test_a_node_shows_what_its_run_told(ran):
    outputs = ran.run("return Object.values(app.nodeOutputs)")
    assert ran.run(TEXTS) == sorted(found["text"][0] for found in outputs if "lora_ops" in found)


def test_markup_in_a_file_is_shown_as_text(ran):
    assert any(HOSTILE in text for text in ran.run(TEXTS))
    assert ran.run(f"return document.querySelectorAll('{RECEIPT} img').length") == 0
    assert ran.run("return window.hacked ?? null") is None


def test_a_receipt_is_wholly_in_sight_and_the_last_of_its_node(ran):
    ran.wait(f"""
        return [...document.querySelectorAll("{RECEIPT}")].every((found) =>
            found.clientHeight > 0 && found.scrollHeight <= found.clientHeight);
    """)
    last = ran.run("return app.graph.nodes.map((node) => [node.type, node.widgets.at(-1).name]);")
    assert {name for kind, name in last if kind.startswith("LoraOps")} == {"lora_ops_receipt"}


def test_neither_workflow_nor_prompt_knows_of_a_receipt(ran):
    saved = ran.run(SAVED)
    assert "receipt" not in json.dumps(saved["prompt"]) and "made for" not in json.dumps(saved)
    values = {node["type"]: node["widgets_values"] for node in saved["workflow"]["nodes"]}
    assert values["LoraOpsLoad"] == [FILE]
    assert len(values["LoraOpsStack"]) == 3 and values["LoraOpsStack"][0] == "<lora:ink:0.8:0.6>"


def test_a_workflow_saved_with_receipts_loads_as_it_was(ran):
    before = ran.run(SAVED)
    ran.run("await app.loadGraphData(given[0], true);", before["workflow"])
    after = ran.run(SAVED)
    assert [node["widgets_values"] for node in after["workflow"]["nodes"]] == [
        node["widgets_values"] for node in before["workflow"]["nodes"]
    ]
    assert after["prompt"] == before["prompt"]


def test_a_saved_height_leaves_no_room_for_a_receipt(lora, page):
    if page.run("return LiteGraph.vueNodesMode"):
        pytest.skip("Nodes 2.0 measures its nodes itself")
    page.run(GRAPH)
    heights = "app.canvas.draw(true, true); return app.graph.serialize().nodes.map((node) => node.size[1]);"
    before = page.run(heights)
    assert page.queue() == "execution_success"
    page.wait(f"return [...document.querySelectorAll('{RECEIPT}')].filter((found) => found.clientHeight).length === 2")
    assert page.run("app.canvas.draw(true, true); return app.graph.nodes.map((node) => node.size[1]);") > before
    assert page.run(heights) == before


def test_a_run_that_changes_nothing_tells_again(ran):
    assert ran.queue() == "execution_success"
    ran.wait(f"return document.querySelectorAll('{RECEIPT}:not(.expired)').length == 2")


def test_after_a_run_that_failed_a_receipt_says_that_it_is_of_an_earlier_one(ran, lora):
    lora.write_bytes(b"no safetensors")
    assert ran.queue() == "execution_error"
    assert sorted(ran.run(EXPIRED)) == [False, True]  # the one that failed says why
    ran.wait(f"return getComputedStyle(document.querySelector('{RECEIPT}.expired .age')).visibility === 'visible'")


def test_a_node_that_fails_says_why_until_it_tells_again(ran, misfit):
    told = ran.run(TEXTS)
    ran.run(MISFIT, misfit)
    assert ran.queue() == "execution_error"
    failed = ran.wait(FAILED)
    lines = failed.find_elements("css selector", ".lines > div")
    assert {line.get_attribute("class") for line in lines} == {"bad"}
    assert len(ran.run(TEXTS)) == len(told)  # in the receipt's place
    allow_clipboard(ran)
    failed.find_element("css selector", "button").click()
    ran.wait(f"return [...document.querySelectorAll('{RECEIPT} button')].some((b) => b.textContent === 'copied')")
    copied = json.loads(ran.run("return await navigator.clipboard.readText()"))
    assert copied == {"error": "lora_ops.TargetError", "message": "\n".join(line.text for line in lines)}
    ran.run(FITS)
    assert ran.queue() == "execution_success"
    ran.wait(f"return document.querySelectorAll('{RECEIPT}:not(.expired)').length == 2")
    assert ran.run(TEXTS) == told


def test_in_a_subgraph_a_node_that_fails_says_why_too(lora, misfit, page):
    page.run(GRAPH + MISFIT + "app.graph.convertToSubgraph(new Set([stack]));", misfit)
    assert page.queue() == "execution_error"
    page.run("app.canvas.setGraph(app.graph.nodes.find((node) => node.subgraph).subgraph);")
    page.wait(FAILED)


def test_in_a_subgraph_a_node_shows_its_receipt_too(lora, page):
    page.run(GRAPH + "app.graph.convertToSubgraph(new Set([load]));")
    assert page.queue() == "execution_success"
    page.run("app.canvas.setGraph(app.graph.nodes.find((node) => node.subgraph).subgraph);")
    page.wait(f"""
        return [...document.querySelectorAll("{RECEIPT} .lines")].some((lines) =>
            lines.offsetHeight && lines.textContent.startsWith("{FILE}"));
    """)


def test_after_a_look_at_another_workflow_receipts_are_back_as_of_an_earlier_run(ran):
    before = ran.run(TEXTS)
    ran.run("""
        const {workflow, command} = app.extensionManager, first = workflow.activeWorkflow;
        await command.execute("Comfy.NewBlankWorkflow");
        window.first = first;
    """)
    ran.wait(f"return document.querySelectorAll('{RECEIPT}').length === 0")
    ran.run("await app.loadGraphData(JSON.parse(JSON.stringify(window.first.activeState)), true, true, window.first);")
    ran.wait(f"return document.querySelectorAll('{RECEIPT}').length === 2")
    assert (ran.run(TEXTS), ran.run(EXPIRED)) == (before, [True, True])


def test_after_an_undo_the_next_run_is_shown(ran):
    ran.run("""
        const tracker = app.extensionManager.workflow.activeWorkflow.changeTracker;
        tracker.captureCanvasState();
        app.graph.nodes.find((node) => node.type === "LoraOpsStack").widgets[0].value = "<lora:ink:0.5>";
        tracker.captureCanvasState();
        await tracker.undo();
    """)
    ran.wait(f"return [...document.querySelectorAll('{RECEIPT}')].every((found) => found.matches('.expired'))")
    assert ran.run("return app.graph.nodes.map((node) => node.widgets[0].value)")[0] == "<lora:ink:0.8:0.6>"
    ran.run("app.graph.nodes.find((node) => node.type === 'LoraOpsStack').widgets[0].value = '<lora:ink:0.4>';")
    assert ran.queue() == "execution_success"
    ran.wait(f"return document.querySelectorAll('{RECEIPT}:not(.expired)').length === 2")


def test_the_button_copies_the_receipt_as_json(ran):
    allow_clipboard(ran)
    ran.driver.find_element("css selector", f"{RECEIPT} button").click()
    ran.wait(f"return document.querySelector('{RECEIPT} button').textContent === 'copied'")
    outputs = ran.run("return Object.values(app.nodeOutputs).map((found) => found.lora_ops?.[0])")
    assert ran.run("return await navigator.clipboard.readText()") in outputs


def test_a_line_is_tinted_for_what_it_says(page):
    checkpoint = {key: tensor.shape for key, tensor in samples.small_checkpoint().items()}
    targets = target_map(recognise(checkpoint), checkpoint)
    good = samples.tensors(samples.SAMPLES[0], targets)
    other = {key.replace("unet_mid", "unet_other"): tensor for key, tensor in good.items()}
    idle = {key: tensor * (".lora_up" not in key) for key, tensor in good.items()}
    files = {"good": good, "other": other, "idle": idle}
    stack = [Entry(from_file(TensorFile(*file)), dict.fromkeys(PARTS, 1.0)) for file in files.items()]
    lines = receipt(land(stack, targets), 0.0).text.splitlines()
    tones = page.run("return given[0].map((await import(given[1])).tone);", lines, SCRIPT)
    told = {tone: [line for line, found in zip(lines, tones, strict=True) if found == tone] for tone in set(tones)}
    assert told[""] == lines[:1]
    assert [line.split()[1] for line in told["good"]] == ["good", "idle"]
    assert [line.split()[1] for line in told["bad"]] == ["other"]
    refused, energy, zero = sorted(told["warning"], key=lambda line: "refused" not in line)
    assert ("refused" in refused, "energy" in energy, "all zero" in zero) == (True, True, True)


def test_the_console_has_nothing_to_say_of_us(ran):
    assert [line for line in ran.console() if "lora_ops" in line] == []
