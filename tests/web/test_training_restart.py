"""A run of Train LoRA whose server is killed: the open pages find the server that comes after it, and go on."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import comfy
from harness.server import MOUNT, Server, link
from harness.world import host
from lora_ops.train.history import read
from tests.web.conftest import RENDERERS
from tests.web.test_training_widget import OFF, ON, SHOWN, Tab

GRAPH = """
    const make = (type, x, values) => {
        const node = LiteGraph.createNode(type);
        app.graph.add(node);
        for (const each of node.widgets ?? []) if (each.name in values) each.value = values[each.name];
        node.pos = [x, 60];
        return node;
    };
    const model = make("UNETLoader", 0, {unet_name: "small_world.safetensors"});
    const pictures = make("LoraOpsStandInPictures", 0, {});
    pictures.pos = [0, 250];
    const dataset = make("LoraOpsDataset", 300, {cache: false});
    const train = make("LoraOpsTrain", 780, {name: "killed", steps: 100000, save_every: 3, rank: 1, sample_every: 0});
    pictures.connect(0, dataset, "latents");
    pictures.connect(1, dataset, "conditioning");
    model.connect(0, train, "model");
    dataset.connect(0, train, "dataset");
    return {...app.graph.serialize(), id: given[0]};
"""
LOOK = "app.canvas.ds.scale = 0.6; app.canvas.ds.offset = [-100, 60]; app.graph.setDirtyCanvas(true, true);"
SAVED = f"const shown = (() => {{{SHOWN}}})(); return shown?.state === 'Training' && shown.saves.length;"
STEPS = "app.graph.nodes.find((each) => each.type === 'LoraOpsTrain').widgets.find((each) => each.name === 'steps')"


@pytest.fixture
def own() -> Iterator[Server]:
    """A server of its own, with the small world's model."""
    path = comfy.find()
    if path is None:
        pytest.skip("ComfyUI not found: set COMFYUI_PATH")
    running = Server(path)
    link(Path(__file__).with_name("stand_in.py"), running.base / "custom_nodes" / "stand_in.py")
    link(host.MODELS / host.MODEL, running.base / "models" / host.MODEL)
    with running:
        yield running


def test_a_killed_server_is_come_back_to_and_the_run_gone_on_with(browser, own):
    first = browser.current_window_handle
    classic, nodes2 = both = [Tab(browser, own, nodes2=renderer == "nodes2") for renderer in RENDERERS]
    try:
        classic.clear()
        workflow = classic.run(GRAPH, str(uuid.uuid4()))
        for tab in both:
            tab.clear()
            tab.load(workflow)
            tab.run(LOOK)
        classic.start()
        for tab in both:
            tab.wait(SAVED)
            assert tab.run(SHOWN)["buttons"] == ON
        own.kill()
        kept = read(own.base / "output" / "lora_ops" / "killed").step
        assert kept >= 3 and kept % 3 == 0
        own.start()
        known = {"state": "Stopped", "step": f"{kept}/100000 steps", "points": [kept, kept, 0], "buttons": OFF}
        for tab in both:  # by themselves
            tab.shows(**known, note="The server ended while it ran. Queue the node again to go on.")
        nodes2.reload()
        nodes2.load(workflow)
        nodes2.run(LOOK)
        nodes2.shows(**known)
        ends = kept + 12
        nodes2.run(f"{STEPS}.value = given[0];", ends)
        nodes2.start()
        for tab in both:
            tab.shows(state="Done", step=f"{ends}/{ends} steps", resumed=1, buttons=OFF)
        assert [each for each in nodes2.console() if MOUNT in each] == []
    finally:
        for window in browser.window_handles:
            if window != first:
                browser.switch_to.window(window)
                browser.close()
        browser.switch_to.window(first)
