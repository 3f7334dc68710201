"""The rows of a LoRA Stack, as hands use them, and that saved workflows and prompts hold what the rows show."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import small
from lora_ops.files import write
from tests.web.page import Page

MODULE = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
WASH, OIL, HALF = "rows/wash.safetensors", "rows/oil.safetensors", "rows/half.safetensors"
STACK = ".lora_ops_stack"
PICKER = ".lora_ops_picker"
NODE = "window.comfyAPI.app.app.graph.nodes.find((node) => node.type === 'LoraOpsStack')"
VALUE = f"{NODE}.widgets[0].value"
GRAPH = f"""
    const stack = LiteGraph.createNode("LoraOpsStack");
    stack.pos = [300, 100];
    app.graph.add(stack);
    {VALUE} = given[0];
    Object.assign(app.canvas.ds, {{scale: 1, offset: [0, 0]}});
    app.graph.setDirtyCanvas(true, true);
    for (let frame = 0; frame < 4; frame++) await new Promise(requestAnimationFrame); // the host resizes while it draws
"""
FRAME = "await new Promise(requestAnimationFrame);"
ROUTE = """
    const {api} = window.comfyAPI.api, ask = api.fetchApi.bind(api);
    window.asked = [];
    window.waiting ??= 0; // what an earlier test asked may still be under way
    api.fetchApi = async (path, ...rest) => {
        window.waiting++;
        try {
            if (!path.startsWith("/lora_ops/lora?")) return await ask(path, ...rest);
            window.asked.push(path);
            return given[0] ? Response.json(given[0]) : new Response("", {status: 404});
        } finally {
            window.waiting--;
        }
    };
"""
FACTORS = {"up": (320, 2), "down": (2, 320)}
# Undoing is over once the host takes what is drawn for its latest state; a key before that would be an edit to undo.
AT_REST = """
    const {app} = window.comfyAPI.app, {changeTracker} = app.extensionManager.workflow.activeWorkflow;
    const nodes = (state) => JSON.stringify(JSON.parse(JSON.stringify(state.nodes)));
    return !changeTracker._restoringState && nodes(changeTracker.activeState) === nodes(app.graph.serialize());
"""
SAVED = "return {workflow: app.graph.serialize(), prompt: (await app.graphToPrompt()).output};"


class Stack:
    """A LoRA Stack node on a page that holds no other."""

    def __init__(self, page: Page, *rows: dict[str, Any] | str):
        self.page = page
        page.run(GRAPH, rows[0] if rows and isinstance(rows[0], str) else text(*rows))
        page.wait(f"return !window.waiting && document.querySelector('{STACK}')?.offsetHeight")
        page.run(FRAME)  # the server's answer draws the rows anew

    @property
    def value(self) -> str:
        return self.page.run(f"return {VALUE};")

    @property
    def rows(self) -> list[dict[str, Any]]:
        return json.loads(self.value)["rows"]

    @property
    def height(self) -> float:
        return self.page.run(f"return {NODE}.size[1];")

    def becomes(self, value: str) -> None:
        self.page.wait(f"return {VALUE} === given[0]", value)

    def part(self, name: str, row: int | None = None) -> Any:
        within = "" if row is None else f".row:nth-child({row + 1}) "
        return self.page.wait(f"return document.querySelector(`{STACK} {within}[data-part='{name}']`)")

    def press(self, name: str, row: int | None = None) -> None:
        self._while_redrawn(lambda: self.part(name, row).click())

    def drag(self, name: str, row: int, x: int, y: int, key: str | None = None) -> None:
        self._while_redrawn(lambda: self._drag(name, row, x, y, key))

    def _while_redrawn(self, act: Callable[[], None]) -> None:
        """An answer of the server draws the rows anew, perhaps between finding a part and pressing it."""
        from selenium.common.exceptions import StaleElementReferenceException

        for _ in range(10):
            try:
                return act()
            except StaleElementReferenceException:
                time.sleep(0.1)
        act()

    def _drag(self, name: str, row: int, x: int, y: int, key: str | None) -> None:
        hand = self.hand()
        hand.click_and_hold(self.part(name, row))
        if key:
            hand.key_down(key)
        for step in range(5):
            hand.move_by_offset(x * (step + 1) // 5 - x * step // 5, y * (step + 1) // 5 - y * step // 5)
        if key:
            hand.key_up(key)
        hand.release().perform()

    def type(self, *keys: str) -> None:
        self.hand().send_keys(*keys).perform()

    def pick(self, query: str, *keys: str) -> None:
        """Types into the open list, and the keys once it has answered."""
        self.type(query)
        self.page.wait(f"return document.querySelector('{PICKER} .option')")
        self.type(*keys)

    def chord(self, held: str, key: str) -> None:
        self.hand().key_down(held).send_keys(key).key_up(held).perform()

    def hand(self) -> Any:
        from selenium.webdriver.common.action_chains import ActionChains

        return ActionChains(self.page.driver, duration=20)


def row(lora: str, **fields: Any) -> dict[str, Any]:
    return {"lora": lora, "on": True, "strength": 1} | fields


def text(*rows: dict[str, Any]) -> str:
    return json.dumps({"version": 1, "rows": rows}, separators=(",", ":"), ensure_ascii=False) if rows else ""


@pytest.fixture(scope="module")
def keys():
    return pytest.importorskip("selenium.webdriver.common.keys").Keys


@pytest.fixture(scope="module", autouse=True)
def loras(server) -> None:
    """Two LoRAs of a module that the model has, and one of which it has half."""
    names = {WASH: [MODULE], OIL: [MODULE], HALF: [MODULE, MODULE.replace("attn1", "attn9")]}
    for name, modules in names.items():
        path = server.base / "models/loras" / name
        path.parent.mkdir(exist_ok=True)
        shapes = {f"{each}.lora_{way}.weight": size for each in modules for way, size in FACTORS.items()}
        write(path, {key: torch.full(size, 1e-3) for key, size in shapes.items()}, overwrite=True)


@pytest.fixture
def stack(page):
    """Makes the stack; the server tells nothing of its files."""
    page.run(ROUTE, None)
    return lambda *rows: Stack(page, *rows)


def test_a_text_stays_to_the_letter_until_a_row_is_edited(stack):
    given = "<lora:rows/wash:.80>\n<lora:oil:1:0.5>"
    it = stack(given)
    it.press("more", 0)
    assert it.value == given
    it.press("on", 1)
    assert it.value == text(row("rows/wash", strength=0.8), row("oil", on=False, clip=0.5))


def test_fields_that_have_no_place_in_a_row_are_kept(stack):
    kept = {"sha256": "ab", "schedule": [[0.2, 1], [0.9, 0.3]], "new": {"x": [1]}}
    it = stack(row(WASH, clip=0.5, **kept))
    it.press("on", 0)
    it.press("on", 0)
    it.press("link", 0)
    assert it.value == text(row(WASH, **kept))


def test_one_switch_turns_all_rows_on_and_off(stack):
    it = stack(row(WASH, on=False), row(OIL))
    seen = []
    for _ in range(2):
        seen.append((it.part("all").get_attribute("aria-checked"), [each["on"] for each in it.rows]))
        it.press("all")
    assert seen == [("mixed", [False, True]), ("true", [True, True])]
    assert [each["on"] for each in it.rows] == [False, False]


def test_a_strength_is_dragged_by_a_hundredth_a_pixel(stack, keys):
    it = stack(row(WASH), row(OIL, clip=0.5))
    it.drag("model", 0, 30, 0)
    it.drag("clip", 1, -60, 0)
    it.drag("model", 1, 10, 0, keys.SHIFT)
    assert it.rows == [row(WASH, strength=1.3), row(OIL, strength=1.01, clip=-0.1)]
    it.drag("model", 1, -20, 0, keys.CONTROL)
    assert it.rows[1]["strength"] == -0.99


def test_a_clip_strength_follows_until_it_is_set_and_again_once_it_is_emptied(stack, keys):
    it = stack(row(WASH, strength=0.5))
    it.drag("model", 0, 10, 0)
    assert (it.part("clip", 0).text, it.rows) == ("0.60", [row(WASH, strength=0.6)])
    it.press("link", 0)
    it.drag("model", 0, 10, 0)
    assert it.rows == [row(WASH, strength=0.7, clip=0.6)]
    it.hand().double_click(it.part("clip", 0)).send_keys(keys.DELETE, keys.ENTER).perform()
    assert (it.part("clip", 0).text, it.rows) == ("0.70", [row(WASH, strength=0.7)])


def test_a_number_is_typed_after_a_double_click_or_straight_away(stack, keys):
    it = stack(row(WASH), row(OIL))
    it.hand().double_click(it.part("model", 0)).send_keys("1,25", keys.ENTER).perform()
    it.type(keys.ARROW_UP, keys.ARROW_UP)
    it.hand().double_click(it.part("clip", 1)).send_keys("-0.3").click(it.part("on", 1)).perform()
    assert it.rows == [row(WASH, strength=1.27), row(OIL, on=False, clip=-0.3)]
    it.hand().double_click(it.part("model", 0)).send_keys("1,000", keys.ENTER, keys.ESCAPE).perform()
    it.type("2", keys.ESCAPE, ".5", keys.ENTER)
    assert it.rows[0]["strength"] == 0.5


def test_rows_are_reordered_by_their_handle_and_by_the_keyboard(stack, keys):
    it = stack(row(WASH), row(OIL), row(HALF))
    it.drag("handle", 0, 0, 55)
    assert [each["lora"] for each in it.rows] == [OIL, HALF, WASH]
    it.drag("handle", 2, 0, -26)
    assert [each["lora"] for each in it.rows] == [OIL, WASH, HALF]
    it.part("on", 1).send_keys(keys.ALT, keys.ARROW_UP, keys.ARROW_UP)
    assert [each["lora"] for each in it.rows] == [WASH, OIL, HALF]
    assert it.page.driver.switch_to.active_element == it.part("on", 0)


def test_a_row_is_added_by_searching_for_it(stack, keys):
    it = stack()
    it.press("add")
    it.type("ows/was", keys.ENTER)
    it.becomes(text(row(WASH)))  # an answer that comes later is waited for
    it.press("add")
    it.pick("rows ", keys.ARROW_DOWN, keys.ARROW_DOWN, keys.ARROW_UP, keys.ESCAPE)
    assert it.page.run(f"return document.querySelector('{PICKER}')") is None
    assert it.value == text(row(WASH)) and it.page.driver.switch_to.active_element == it.part("add")
    it.type(keys.ENTER)
    it.pick("rows ", keys.ARROW_DOWN)
    chosen = it.page.wait(f"return document.querySelector('{PICKER} [aria-selected=true]')").get_attribute("title")
    it.type(keys.ENTER)
    assert it.rows == [row(WASH), row(chosen)] and chosen == HALF  # shorter names first


def test_a_row_is_replaced_duplicated_and_removed(stack):
    it = stack(row(WASH, strength=0.5, sha256="of wash"), row(HALF))
    it.press("name", 0)
    it.type("oil")
    it.page.wait(f"return document.querySelectorAll('{PICKER} .option').length === 1")
    it.page.driver.find_element("css selector", f"{PICKER} .option").click()
    assert it.rows[0] == row(OIL, strength=0.5)
    it.press("more", 0)
    it.press("duplicate", 0)
    it.press("remove", 2)
    assert it.rows == [row(OIL, strength=0.5), row(OIL, strength=0.5)]


def test_blocks_start_and_end_are_edited_where_a_row_opens(stack, keys):
    it = stack(row(WASH))
    it.press("more", 0)
    it.part("blocks", 0).send_keys("mid=0.5", keys.ENTER)
    it.drag("start", 0, 25, 0)
    it.drag("end", 0, 300, 0)
    assert it.rows == [row(WASH, blocks="mid=0.5", start=0.25)]
    it.drag("start", 0, -100, 0)
    it.part("blocks", 0).send_keys(keys.CONTROL, "a", keys.DELETE)
    it.press("on", 0)
    assert it.rows == [row(WASH, on=False)]


def test_every_edit_is_one_step_back(stack, keys):
    it = stack(row(WASH), row(OIL))
    it.page.run("app.extensionManager.workflow.activeWorkflow.changeTracker.captureCanvasState();")
    values = [it.value]
    for edit in (
        lambda: it.press("on", 0),
        lambda: it.drag("model", 1, 20, 0),
        lambda: it.drag("handle", 0, 0, 26),
        lambda: it.press("remove", 1),
        lambda: (it.press("add"), it.pick("rows/half", keys.ENTER)),
    ):
        edit()
        it.page.wait(AT_REST)
        values.append(it.value)
    assert len(set(values)) == 6
    for value in reversed(values[:-1]):
        it.chord(keys.CONTROL, "z")
        it.becomes(value)
        it.page.wait(AT_REST)
    it.chord(keys.CONTROL, "y")
    it.becomes(values[1])
    it.page.wait(AT_REST)
    it.page.wait(f"return document.querySelector('{STACK} .row:first-child')?.classList.contains('off')")
    it.press("on", 0)
    assert it.value == values[0]  # what is shown is what is there


def test_pasted_tags_become_rows_and_other_text_does_not(stack, keys):
    it = stack(row(WASH))
    paste = """
        const data = new DataTransfer();
        data.setData("text/plain", given[0]);
        document.querySelector(given[1]).dispatchEvent(
            new ClipboardEvent("paste", {clipboardData: data, bubbles: true, cancelable: true}));
    """
    it.page.run(paste, "<lora:oil:0.5> <lora:half:1:0>", f"{STACK} .row")
    pasted = [row(WASH), row("oil", strength=0.5), row("half", clip=0)]
    assert it.rows == pasted
    it.press("add")
    it.page.run(paste, "<lora:wash:2>", f"{PICKER} input")
    assert it.rows == [*pasted, row("wash", strength=2)]


def test_the_text_is_edited_as_text_and_comes_back_as_rows(stack, keys):
    it = stack("<lora:wash:0.5>")
    it.press("text")
    area = it.part("area")
    assert area.get_attribute("value") == "<lora:wash:0.5>"
    area.send_keys(keys.CONTROL, keys.END)
    area.send_keys("\n<lora:oil")
    assert it.value == "<lora:wash:0.5>\n<lora:oil" and not it.part("text").is_enabled()
    area.send_keys(":2>")
    it.press("text")
    assert it.value == "<lora:wash:0.5>\n<lora:oil:2>"
    assert [it.part("model", at).text for at in (0, 1)] == ["0.50", "2.00"]


@pytest.mark.parametrize("given", ["half a <lora:wash", '{"version":1,"rows":[{"lora":"wash","strength":"1"}]}'])
def test_a_text_without_rows_is_shown_kept_and_can_be_mended(stack, keys, given):
    it = stack(given)
    assert it.part("area").get_attribute("value") == given == it.value
    problem = it.page.driver.find_element("css selector", f"{STACK} [role=alert]")
    assert problem.text
    before = it.page.run(SAVED)
    it.page.run("await app.loadGraphData(given[0], true);", before["workflow"])
    assert it.page.run(SAVED)["prompt"] == before["prompt"] and it.value == given
    it.part("area").send_keys(keys.CONTROL, "a", keys.NULL, "<lora:oil:0.5>")
    it.press("text")
    assert it.part("model", 0).text == "0.50"


def test_a_row_without_its_file_is_marked_and_offers_a_replacement(stack, keys):
    it = stack(row("gone/wash_v2.safetensors"), row("rows\\wash.safetensors"), row("wash"))
    marked = f"return document.querySelectorAll('{STACK} .missing').length"
    it.page.wait(f"{marked} === 1")
    assert "gone/" in it.part("name", 0).get_attribute("title")
    it.press("replace", 0)
    assert it.page.wait(f"return document.querySelectorAll('{PICKER} .option').length") > 0
    it.type("oil", keys.ENTER)
    assert it.rows == [row(OIL), row("rows\\wash.safetensors"), row("wash")]
    it.page.wait(f"{marked} === 0")


def test_a_row_without_its_name_is_found_once_by_its_hash(stack, page):
    page.run(ROUTE, {"resolved": OIL, "sha256": "ab", "family": "SD 1.5"})
    it = stack(row("gone", sha256="ab"), row("lost"))
    page.wait(f"return document.querySelector('{STACK} .name').title.includes('found as {OIL}')")
    it.press("on", 1)
    missing = page.driver.find_elements("css selector", f"{STACK} .missing .file")
    assert [each.text for each in missing] == ["lost"]
    assert page.run("return window.asked") == ["/lora_ops/lora?name=gone&sha256=ab"]


def test_a_row_whose_hash_the_server_does_not_know_is_missing(stack, page):
    stack(row("gone", sha256="ab"))
    page.wait(f"return document.querySelector('{STACK} .missing')")
    assert page.run("return window.asked") == ["/lora_ops/lora?name=gone&sha256=ab"]


def test_blocks_of_several_lines_are_edited_in_one(stack, keys):
    given = text(row(WASH, blocks="mid=0.5\nout=0"))
    it = stack(given)
    it.press("more", 0)
    assert (it.part("blocks", 0).get_attribute("value"), it.value) == ("mid=0.5, out=0", given)
    it.part("blocks", 0).send_keys(keys.END, ".5", keys.ENTER)
    assert it.rows == [row(WASH, blocks="mid=0.5, out=0.5")]


def test_a_picked_file_is_remembered_by_its_hash_and_told_of(stack, keys, page):
    page.run(ROUTE, {"sha256": "ab12", "family": "SD 1.5", "rank": {"4": 1}, "trigger_words": ["ink"]})
    it = stack()
    it.press("add")
    it.pick("rows/wash", keys.ENTER)
    it.becomes(text(row(WASH, sha256="ab12")))
    page.wait(f"return document.querySelector('{STACK} .name').title.includes('SD 1.5, rank 4')")
    assert "trigger words: ink" in it.part("name", 0).get_attribute("title")
    assert page.run("return window.asked") == ["/lora_ops/lora?name=rows%2Fwash.safetensors"]


def test_the_node_is_as_tall_as_its_rows(stack):
    it = stack(row(WASH))
    height = it.height
    it.press("more", 0)
    it.page.wait(f"return {NODE}.size[1] > given[0] + 40", height)
    it.press("more", 0)
    it.page.wait(f"return Math.abs({NODE}.size[1] - given[0]) < 15", height)  # the host's own margin comes once
    fits = f"""
        const rows = [...document.querySelectorAll("{STACK} .row, {STACK} .add")].at(-1).getBoundingClientRect();
        return rows.bottom <= document.querySelector("{STACK}").getBoundingClientRect().bottom + 1;
    """
    height = it.height
    it.page.run(f"{VALUE} = given[0];", text(*[row(WASH)] * 12))
    it.page.wait(f"return {NODE}.size[1] > given[0] + 200", height)
    assert it.page.run(fits)


def test_a_saved_workflow_and_an_exported_prompt_load_as_they_were(stack):
    it = stack(row(WASH, clip=0.5, sha256="ab"), row("gone", on=False, schedule=[[0.5, 1]]))
    before = it.page.run(SAVED)
    assert before["prompt"]["1"]["inputs"]["stack"] == it.value
    it.page.run("await app.loadGraphData(JSON.parse(given[0]), true);", json.dumps(before["workflow"]))
    after = it.page.run(SAVED)
    [old], [new] = before["workflow"]["nodes"], after["workflow"]["nodes"]
    assert (new["widgets_values"], after["prompt"]) == (old["widgets_values"], before["prompt"])
    it.page.run("await app.loadApiJson(given[0], 'exported');", before["prompt"])
    assert it.page.run(SAVED)["prompt"]["1"]["inputs"] == before["prompt"]["1"]["inputs"]
    assert it.page.wait(f"return document.querySelectorAll('{STACK} .row').length") == 2


def test_a_copied_node_has_rows_of_its_own(stack):
    it = stack(row(WASH))
    it.page.run(f"app.canvas.selectNode({NODE}); app.canvas.copyToClipboard(); app.canvas.pasteFromClipboard();")
    it.page.wait(f"return document.querySelectorAll('{STACK} .row').length === 2")
    first = it.value
    it.page.run("app.graph.nodes.at(-1).pos = [900, 100]; app.graph.setDirtyCanvas(true, true);")
    it.page.driver.find_elements("css selector", f"{STACK} [data-part=remove]")[1].click()
    values = it.page.run("return app.graph.nodes.map((node) => node.widgets[0].value);")
    assert values == [first, ""]


def test_a_connected_text_takes_the_place_of_the_rows(stack):
    it = stack(row(WASH))
    it.page.run(f"""
        const text = LiteGraph.createNode("PrimitiveString");
        app.graph.add(text);
        text.connect(0, {NODE}, {NODE}.inputs.findIndex((slot) => slot.name === "stack"));
    """)
    wired = f"return document.querySelector('{STACK}').inert"
    it.page.wait(wired)
    prompt = it.page.run(SAVED)["prompt"]
    assert [node["inputs"]["stack"][1] for node in prompt.values() if "stack" in node["inputs"]] == [0]
    it.page.run("await app.loadGraphData(app.graph.serialize(), true);")
    it.page.wait(wired)
    it.page.run(f"{NODE}.disconnectInput({NODE}.inputs.findIndex((slot) => slot.name === 'stack'));")
    it.page.wait(f"return !document.querySelector('{STACK}').inert")
    assert it.rows == [row(WASH)]


def test_after_a_run_each_row_shows_what_landed_of_it(stack):
    it = stack(row(HALF), row(WASH, on=False), row("wash"))
    it.page.run(
        f"""
        const add = (type) => {{
            const node = LiteGraph.createNode(type);
            node.pos = [-600, 400];
            app.graph.add(node);
            return node;
        }};
        const stack = {NODE}, model = add("CheckpointLoaderSimple"), before = add("LoraOpsStack");
        const into = (name) => stack.inputs.findIndex((slot) => slot.name === name);
        model.widgets[0].value = given[0];
        before.widgets[0].value = "<lora:wash:1>";
        stack.widgets[1].value = 0;
        model.connect(0, stack, into("model"));
        before.connect(2, stack, into("lora_stack"));
        stack.connect(4, add("PreviewAny"), 0);
        """,
        Path(small.FILES["sd15"][0]).name,
    )
    assert it.page.queue() == "execution_success"
    badges = f"""
        return [...document.querySelectorAll("{STACK}")].map((stack) =>
            [...stack.querySelectorAll(".row")].map((row) => row.querySelector(".badge")?.textContent ?? null)
        ).find((found) => found.length === 3 && found.some(Boolean));
    """
    assert it.page.wait(badges) == ["! 1/2", None, "✓ 1"]
    it.drag("handle", 0, 0, 55)
    assert it.page.wait(badges) == [None, "✓ 1", "! 1/2"]


def test_the_console_has_nothing_to_say_of_us(page):
    assert [line for line in page.console() if "lora_ops" in line] == []


def test_the_rows_move_to_the_other_renderer_and_back(stack):
    it = stack(row(WASH))
    nodes2 = it.page.run("return LiteGraph.vueNodesMode")
    for mode in (not nodes2, nodes2):
        it.page.run("await app.extensionManager.setting.set('Comfy.VueNodes.Enabled', given[0]);", mode)
        it.page.wait("return LiteGraph.vueNodesMode === given[0]", mode)
        it.page.wait(f"return document.querySelector('{STACK} .row')?.offsetHeight")
        it.press("on", 0)
        assert it.rows == [row(WASH, on=mode == nodes2)]


def test_in_a_subgraph_the_rows_stay_and_load_again(stack):
    """The last of all: the host goes back to an open subgraph whatever is loaded next."""
    it = stack(row(WASH, clip=0.5))
    value = it.value
    it.page.run(f"app.graph.convertToSubgraph(new Set([{NODE}]));")
    saved = it.page.run(SAVED)
    it.page.run("await app.loadGraphData(JSON.parse(given[0]), true);", json.dumps(saved["workflow"]))
    prompt = it.page.run(SAVED)["prompt"]
    assert prompt == saved["prompt"] and [node["inputs"]["stack"] for node in prompt.values()] == [value]
    it.page.run("app.canvas.setGraph(app.graph.nodes.find((node) => node.subgraph).subgraph);")
    it.page.wait(f"return document.querySelector('{STACK} .row')?.offsetHeight")
