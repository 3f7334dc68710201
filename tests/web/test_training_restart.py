"""A run of Train LoRA whose server is killed: the open pages find the server that comes after it, and go on."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from harness.server import Server, link
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
def mortal(server) -> Iterator[Server]:
    """The server, with the small world's model. It lives after the test, too."""
    link(host.MODELS / host.MODEL, server.base / "models" / host.MODEL)
    yield server
    if not server.answers():
        server.start()


def test_a_killed_server_is_come_back_to_and_the_run_gone_on_with(browser, mortal):
    first = browser.current_window_handle
    classic, nodes2 = both = [Tab(browser, mortal, nodes2=renderer == "nodes2") for renderer in RENDERERS]
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
        mortal.kill()
        kept = read(mortal.base / "output" / "lora_ops" / "killed").step
        assert kept >= 3 and kept % 3 == 0
        mortal.start()
        note = "The server ended while it ran. Queue the node again to go on."
        known = {"state": "Stopped", "step": f"{kept}/100000 steps", "points": [kept, kept, 0], "note": note}
        for tab in both:  # which hear that there is a server again
            tab.shows(**known, buttons=OFF)
        nodes2.run(f"{STEPS}.value = given[0];", kept + 12)
        nodes2.start()
        for tab in both:
            tab.shows(state="Done", step=f"{kept + 12}/{kept + 12} steps", resumed=1, buttons=OFF)
    finally:
        for window in browser.window_handles:
            if window != first:
                browser.switch_to.window(window)
                browser.close()
        browser.switch_to.window(first)
