"""A training run on its node, as hands and eyes have it: live, in a second tab, cancelled, and after a restart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from harness import comfy
from harness.server import Server
from tests.web.conftest import RENDERERS, with_stand_in
from tests.web.page import Page

PANEL = ".lora_ops_training"
SAMPLE = ".lora_ops_sample"
GRAPH = """
    const node = LiteGraph.createNode("LoraOpsStandIn");
    app.graph.add(node);
    node.widgets[0].value = "ink";
    node.widgets[1].value = 100;
    node.pos = [350, 90];
    return app.graph.serialize();
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
LARGE = f"const image = document.querySelector('{SAMPLE} img'); return image?.naturalWidth === 256 && image.alt;"
ON: list[str] = ["sample", "save", "finish"]
OFF: list[str] = []


class Tab(Page):
    """A window of its own with a workflow in it."""

    def __init__(self, driver: Any, server: Server, *, nodes2: bool):
        self.workflow: dict[str, Any] = {}
        driver.switch_to.new_window("window")
        self._window = driver.current_window_handle
        super().__init__(driver, server, nodes2=nodes2)

    def run(self, script: str, *given: Any) -> Any:
        self.driver.switch_to.window(self._window)
        return super().run(script, *given)

    def wait(self, script: str, *given: Any) -> Any:
        self.driver.switch_to.window(self._window)
        return super().wait(script, *given)

    def shows(self, **expected: Any) -> dict[str, Any]:
        """What the panel shows, once it shows this."""
        from selenium.common.exceptions import TimeoutException

        try:
            return self.wait(SHOWS, expected)
        except TimeoutException as error:
            raise AssertionError(f"{expected} is never shown: {self.run(SHOWN)}") from error

    def press(self, selector: str) -> None:
        self.wait("return document.querySelector(given[0])", f"{PANEL} {selector}").click()

    def keys(self, *keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def start(self) -> None:
        """Queues the workflow and does not wait for it."""
        self.run("await app.queuePrompt(0, 1);")


def opened(browser: Any, server: Server, renderer: str, workflow: dict[str, Any] | None = None) -> Tab:
    """A tab with this workflow, or a new one."""
    tab = Tab(browser, server, nodes2=renderer == "nodes2")
    tab.clear()
    tab.workflow = workflow or tab.run(GRAPH)
    tab.run(LOAD, tab.workflow)
    return tab


@pytest.fixture
def windows(browser) -> Iterator[None]:
    """What a test opens is closed."""
    first = browser.current_window_handle
    yield
    for window in browser.window_handles:
        if window != first:
            browser.switch_to.window(window)
            browser.close()
    browser.switch_to.window(first)


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """What the first server leaves on the disk when it dies in the middle of a run, for the second one."""
    return {"base": tmp_path_factory.mktemp("restarted")}


def allow(server: Server, step: int) -> None:
    server.request(f"/lora_ops_stand_in/{step}", {})


def test_a_run_is_seen_live_and_in_a_second_tab_and_can_be_told_what_to_do(browser, server, windows, left):
    classic = opened(browser, server, "classic")
    left["workflow"] = classic.workflow
    allow(server, 45)
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
    classic.shows(**seen)

    nodes2 = opened(browser, server, "nodes2", classic.workflow)  # as after a reload
    nodes2.shows(**seen)
    shutil.copytree(server.base / "output" / "lora_ops", left["base"] / "output" / "lora_ops")

    nodes2.press("[data-want=sample]")
    both = [nodes2, classic]
    for tab in both:
        tab.shows(samples=[20, 40, 45], drawn=6, note="Sampled at step 45", buttons=ON)
    classic.press("[data-want=save]")
    for tab in both:
        tab.shows(saves=[20, 40, 45], note="Saved ink-000045.safetensors", buttons=ON)

    for tab in both:  # by keyboard: the values of the last step, and a sample, large, and the one before it
        tab.run(f"document.querySelector('{PANEL} .curve').focus();")
        tab.keys("\ue010")  # End
        tab.wait(f"return document.querySelector('{PANEL} .spoken').textContent.startsWith('step 45 · saved, loss 0.')")
        tab.run(f"document.querySelector('{PANEL} .column:last-child button').focus();")
        tab.keys("\ue007")  # Enter
        large = (
            "const image = document.querySelector(given[0] + ' img'); return image?.naturalWidth === 256 && image.alt"
        )
        assert tab.wait(large, SAMPLE) == "Sample: Step 45 · picture 1 of 2"
        tab.keys("\ue012", "\ue015")  # left, down
        tab.wait(f"return document.querySelector('{SAMPLE} .caption').textContent === 'Step 40 · picture 2 of 2'")
        tab.keys("\ue00c")  # Escape
        tab.wait(f"return !document.querySelector('{SAMPLE}') && document.activeElement.closest('.column')")

    saved = nodes2.run("return {workflow: app.graph.serialize(), prompt: (await app.graphToPrompt()).output};")
    assert saved["workflow"]["nodes"][0]["widgets_values"] == ["ink", 100]
    assert saved["prompt"]["1"]["inputs"] == {"name": "ink", "steps": 100} and "Training" not in json.dumps(saved)

    server.request("/interrupt", {})
    for tab in both:
        note = "Cancelled at step 45. Queue the node again to go on from there."
        tab.shows(state="Cancelled", note=note, buttons=OFF, points=[45, 45, 2], fits=True)
        assert [each for each in tab.console() if "lora_ops" in each] == []


def test_after_a_restart_a_run_is_shown_as_it_was_gone_on_with_and_finished_early(browser, windows, left):
    with with_stand_in(Server(comfy.find(), left["base"])) as server:
        both = [opened(browser, server, renderer, left["workflow"]) for renderer in RENDERERS]
        for tab in both:
            stopped = "Stopped: the server ended while it ran"
            tab.shows(state=stopped, step="40/100 steps", points=[40, 40, 2], samples=[20, 40], drawn=4, buttons=OFF)
        allow(server, 50)
        both[1].start()
        for tab in both:
            tab.shows(state="Training", step="50/100 steps", points=[50, 50, 2], resumed=1, saves=[20, 40], buttons=ON)
        both[0].press("[data-want=finish]")
        for tab in both:
            note = "Finished early at step 50: ink.safetensors is in output/lora_ops."
            tab.shows(state="Finished early", note=note, buttons=OFF, step="50/100 steps", fits=True)
