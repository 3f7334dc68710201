"""A training run on its node, as hands and eyes have it: live, in two tabs, reloaded, cancelled, and gone on with after
the server that began it is gone."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from harness.server import MOUNT, Server
from lora_ops.train.history import History
from lora_ops.train.loop import Progress
from tests.web.conftest import RENDERERS
from tests.web.page import PATIENCE, READY, Page

HISTORY = f"/extensions/{MOUNT}/history.js"
PANEL = ".lora_ops_training"
SAMPLE = ".lora_ops_sample"
GRAPH = """
    const node = LiteGraph.createNode("LoraOpsStandIn");
    app.graph.add(node);
    node.widgets[0].value = given[0];
    node.widgets[1].value = 100;
    node.pos = [350, 90];
    return {...app.graph.serialize(), id: given[1]};
"""
LOAD = """
    await app.loadGraphData(given[0], true);
    Object.assign(app.canvas.ds, {scale: 0.9, offset: [0, 40]});
    app.graph.setDirtyCanvas(true, true);
"""
# What a panel shows, as people read it.
SHOWN = f"""
    const panel = document.querySelector("{PANEL}");
    if (!panel?.offsetHeight) return null;
    const all = (selector) => [...panel.querySelectorAll(selector)];
    const lines = (selector) => panel.querySelector(selector)?.getAttribute("d").match(/[ML]/g)?.length ?? 0;
    return {{
        state: panel.querySelector(".state").textContent,
        step: panel.querySelector(".steps")?.textContent,
        points: [lines("path.raw"), lines("path.smoothed"), lines("path.validation")],
        saves: all("polygon.save").map((each) => Number(each.dataset.step)),
        best: all("polygon.best").map((each) => Number(each.dataset.step)),
        resumed: all(".resumed").length,
        samples: all(".column").map((each) => Number(each.dataset.step)),
        drawn: all(".column img").filter((each) => each.complete && each.naturalWidth).length,
        note: panel.querySelector(".note").textContent,
        buttons: all("[data-want]").filter((each) => !each.disabled).map((each) => each.dataset.want),
        fits: panel.scrollHeight <= panel.clientHeight && all(".curve")[0].clientHeight >= 149,
    }};
"""
SHOWS = f"const shown = (() => {{{SHOWN}}})(); return Object.entries(given[0]).every(([name, value]) => \
JSON.stringify(shown?.[name]) === JSON.stringify(value)) && shown;"
LARGE = f"const image = document.querySelector('{SAMPLE} img'); return image?.naturalWidth === 64 && image.alt;"
HEARD = """
    window.comfyAPI.api.api.addEventListener("lora_ops.train", ({detail}) => {window.heard = detail.state;});
"""
PURE = """
    const {duration, loss, merged, range, size, speed, thinned, ticks, upTo} = await import(given[0]);
    const none = {validations: [], samples: [], resumed: []};
    const RUN = {run: "a", began: 1, at: 5, points: [[1, 9], [2, 8]], saves: [[1, false], [2, false]], ...none};
    const news = (what) => ({run: "a", began: 1, at: 6, points: [], saves: [], ...none, ...what});
"""
SPOKEN = "step 40 · saved · best, loss 0.0250, smoothed 0.0275, validation 0.0250"
END, ENTER, LEFT, RIGHT, ESCAPE = "\ue010", "\ue007", "\ue012", "\ue014", "\ue00c"
ON: list[str] = ["sample", "save", "finish"]
OFF: list[str] = []


class Tab(Page):
    """A window of its own."""

    def __init__(self, driver: Any, server: Server, *, nodes2: bool):
        driver.switch_to.new_window("window")
        self._window = driver.current_window_handle
        super().__init__(driver, server, nodes2=nodes2)

    def run(self, script: str, *given: Any) -> Any:
        self.driver.switch_to.window(self._window)
        return super().run(script, *given)

    def wait(self, script: str, *given: Any) -> Any:
        self.driver.switch_to.window(self._window)
        return super().wait(script, *given)

    def new(self, name: str, workflow: str) -> dict[str, Any]:
        """A workflow of this id with a node that stands for training."""
        self.clear()
        return self.run(GRAPH, name, workflow)

    def load(self, workflow: dict[str, Any]) -> None:
        self.run(LOAD, workflow)

    def reload(self) -> None:
        self.driver.switch_to.window(self._window)
        self.driver.refresh()
        self.wait(READY)
        self.clear()

    def start(self) -> None:
        """Queues the workflow and does not wait for it."""
        self.run("await app.queuePrompt(0, 1);")

    def shows(self, **expected: Any) -> None:
        """Waits until the panel shows this."""
        from selenium.common.exceptions import TimeoutException

        try:
            self.wait(SHOWS, expected)
        except TimeoutException as error:
            raise AssertionError(f"{expected} is never shown: {self.run(SHOWN)}") from error

    def press(self, selector: str) -> None:
        self.wait("return document.querySelector(given[0])", f"{PANEL} {selector}").click()

    def focus(self, selector: str) -> None:
        self.run("document.querySelector(given[0]).focus();", f"{PANEL} {selector}")

    def type(self, key: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(key).perform()


@pytest.fixture(scope="module")
def tabs(browser, server) -> Iterator[dict[str, Tab]]:
    """One in each renderer, at the same time."""
    first = browser.current_window_handle
    yield {renderer: Tab(browser, server, nodes2=renderer == "nodes2") for renderer in RENDERERS}
    for window in browser.window_handles:
        if window != first:
            browser.switch_to.window(window)
            browser.close()
    browser.switch_to.window(first)


@pytest.fixture
def allow(server) -> Iterator[Any]:
    """allow(step) lets runs go as far as this step. None goes on after the test."""
    yield lambda step: server.request(f"/lora_ops_stand_in/{step}", {})
    deadline = time.monotonic() + PATIENCE
    while server.json("/queue")["queue_running"]:
        assert time.monotonic() < deadline, "a run cannot be interrupted"
        server.request("/interrupt", {})
        time.sleep(0.05)


@pytest.fixture
def gone(server) -> str:
    """The id of a workflow in which a server that is gone had done 40 of 100 steps of the run `gone`."""
    workflow, folder = str(uuid.uuid4()), server.base / "output" / "lora_ops" / "gone"
    (folder / "samples").mkdir(parents=True)
    (folder / "state").write_text("40")
    history = History("gone", 100, "1", workflow, 1.5)
    for step in range(1, 41):
        looked = step % 20 == 0
        validation = 1 / step if looked else None
        history.stepped(Progress(step, 100, 1 / step, 1.1 / step, 1e-4, 0.5, validation, looked), 5)
        if looked:
            history.saved(step, f"gone-{step:06}.safetensors", True)
            history.sampled(step, 1, step)
            Image.new("RGB", (64, 64), (step, 0, 0)).save(folder / "samples" / f"{step:06}_0.png")
    history.write(folder)
    return workflow


def test_a_run_is_seen_live_in_every_tab_and_does_what_it_is_told(server, tabs, allow):
    classic, nodes2 = both = list(tabs.values())
    workflow = classic.new("ink", str(uuid.uuid4()))
    classic.load(workflow)
    nodes2.clear()
    nodes2.load(workflow)
    allow(45)
    classic.start()
    seen = {
        "state": "Training",
        "step": "45/100 steps",
        "points": [45, 45, 2],
        "saves": [20, 40],
        "best": [40],
        "samples": [20, 40],
        "drawn": 4,
        "buttons": ON,
        "fits": True,
    }
    for tab in both:
        tab.shows(**seen)
    nodes2.reload()
    nodes2.load(workflow)
    nodes2.shows(**seen)
    nodes2.run(f"document.querySelector('{PANEL}').dataset.gone = true;")
    nodes2.load(workflow)  # under the same id: Nodes 2.0 would go on showing the element of the node that is gone
    nodes2.wait(f"return document.querySelector('{PANEL}') && !document.querySelector('{PANEL}[data-gone]')")
    nodes2.press("[data-want=sample]")
    for tab in both:
        tab.shows(samples=[20, 40, 45], drawn=6, note="Sampled at step 45", buttons=ON)
    classic.press("[data-want=save]")
    for tab in both:
        tab.shows(saves=[20, 40, 45], note="Saved ink-000045.safetensors", buttons=ON)
    server.request("/interrupt", {})
    for tab in both:
        note = "Cancelled at step 45. Queue the node again to go on from there."
        tab.shows(state="Cancelled", note=note, buttons=OFF, points=[45, 45, 2], fits=True)
        assert [each for each in tab.console() if MOUNT in each] == []


def test_what_a_server_that_is_gone_began_is_shown_gone_on_with_and_finished_early(tabs, allow, gone):
    classic, nodes2 = both = list(tabs.values())
    workflow = classic.new("gone", gone)
    for tab in both:
        tab.clear()
        tab.load(workflow)
        note = "The server ended while it ran. Queue the node again to go on."
        tab.shows(state="Stopped", note=note, step="40/100 steps", points=[40, 40, 2], drawn=2, buttons=OFF)
    for tab in both:  # by keyboard: the values of the last step, and a sample, large, and the one before it
        tab.focus(".curve")
        tab.type(END)
        tab.wait(f"return document.querySelector('{PANEL} .spoken').textContent === given[0]", SPOKEN)
        tab.focus(".column:last-child button")
        tab.type(ENTER)
        assert tab.wait(LARGE) == "Sample: Step 40"
        for key, step in ((LEFT, 20), (RIGHT, 40)):
            tab.type(key)
            tab.wait(f"return document.querySelector('{SAMPLE} .caption').textContent === given[0]", f"Step {step}")
        tab.type(ESCAPE)
        tab.wait(f"return !document.querySelector('{SAMPLE}') && document.activeElement.closest('.column')")
    saved = nodes2.run("return {workflow: app.graph.serialize(), prompt: (await app.graphToPrompt()).output};")
    assert saved["workflow"]["nodes"][0]["widgets_values"] == ["gone", 100]
    assert saved["prompt"]["1"]["inputs"] == {"name": "gone", "steps": 100} and "Stopped" not in json.dumps(saved)
    allow(50)
    nodes2.start()
    for tab in both:
        tab.shows(state="Training", step="50/100 steps", points=[50, 50, 2], resumed=1, saves=[20, 40], buttons=ON)
    nodes2.new("other", str(uuid.uuid4()))  # which has a node of the same id
    nodes2.run(HEARD)
    classic.press("[data-want=finish]")
    note = "Finished early at step 50: gone.safetensors is in output/lora_ops."
    classic.shows(state="Finished early", note=note, buttons=OFF, step="50/100 steps", fits=True)
    nodes2.wait("return window.heard === 'finished'")
    assert nodes2.run(SHOWN) is None
    nodes2.load(workflow)
    nodes2.shows(state="Finished early", note=note, buttons=OFF, step="50/100 steps", fits=True)


@pytest.mark.parametrize(
    ("call", "found"),
    [
        ("duration(725.4)", "12:05"),
        ("duration(3725)", "1:02:05"),
        ("speed(1.94)", "1.9 it/s"),
        ("speed(0.24)", "4.2 s/it"),
        ("loss(0.0814)", "0.0814"),
        ("loss(0.00042)", "4.2e-4"),
        ("loss(null)", "–"),
        ("size(11.2e9)", "11.2 GB"),
        ("ticks(0, 0.9, 4)", [0, 0.2, 0.4, 0.6, 0.8]),
        ("ticks(0.04, 2, 4, true)", [0.05, 0.1, 0.2, 0.5, 1, 2]),
        ("ticks(0.0011, 0.0019, 4, true)", [0.0012, 0.0014, 0.0016, 0.0018]),
        ("upTo([[1], [3], [5]], 4)", [3]),
        ("upTo([[3]], 2) ?? null", None),
        ("thinned([[1, 0], [2, 9], [3, 0], [4, -9], [5, 0], [6, 0]], 4)", [[1, 0], [2, 9], [4, -9], [6, 0]]),
        ("range({points: [[1, 5, 2], [2, null, 3]], validations: [[2, 1]]}, false)", [0.76, 5.24]),
        ("merged(RUN, news({since: 2, points: [[3, 7]], saves: [[3]]})).points", [[1, 9], [2, 8], [3, 7]]),
        ("merged(RUN, news({since: 1, points: [[2, 5]]})).points", [[1, 9], [2, 5]]),
        ("merged(RUN, news({since: 2, saves: [[2, true]]})).saves", [[1, False], [2, True]]),
        ("merged(RUN, news({since: 1})).saves", []),
        ("merged(RUN, news({since: 3}))", None),
        ("merged(null, news({since: 1}))", None),
        ("merged(RUN, news({since: 0, points: [[1, 1]]})).points", [[1, 1]]),
        ("merged(RUN, news({since: 1, began: 2}))", None),
        ("merged(RUN, news({since: 1, run: 'b'}))", None),
        ("merged(RUN, news({since: 0, at: 1})) === RUN", True),
    ],
)
def test_what_is_known_of_a_run_and_how_it_is_told(tabs, call, found):
    assert tabs["classic"].run(PURE + f"return {call};", HISTORY) == found


INTO = """
    app.canvas.setGraph(app.rootGraph.nodes.find((node) => node.subgraph).subgraph);
    Object.assign(app.canvas.ds, {scale: 0.9, offset: [0, 40]});
    app.canvas.setDirty(true, true);
"""
CLICK = f"document.querySelector(`{PANEL} [data-want=${{given[0]}}]`).click();"


def test_a_run_in_a_subgraph_is_seen_there_and_does_what_it_is_told(tabs, allow):
    """The last of all: the host goes back to an open subgraph whatever is loaded next."""
    classic, nodes2 = both = list(tabs.values())
    flat = classic.new("inner", str(uuid.uuid4()))
    classic.load(flat)
    workflow = classic.run("app.graph.convertToSubgraph(new Set(app.graph.nodes)); return app.rootGraph.serialize();")
    nodes2.clear()
    nodes2.load(workflow)
    allow(25)
    classic.start()
    for tab in both:
        tab.run(INTO)
    nodes2.reload()  # which opens the subgraph again or not, as the host likes
    nodes2.load(workflow)
    nodes2.run(INTO)
    for tab in both:
        tab.shows(state="Training", step="25/100 steps", points=[25, 25, 1], saves=[20], samples=[20], buttons=ON)
    classic.run(CLICK, "sample")
    for tab in both:
        tab.shows(samples=[20, 25], note="Sampled at step 25")
    nodes2.run(CLICK, "finish")
    for tab in both:
        tab.shows(state="Finished early", buttons=OFF, step="25/100 steps")
        assert [each for each in tab.console() if MOUNT in each] == []
        tab.run("app.canvas.setGraph(app.rootGraph);")
