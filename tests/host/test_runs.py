"""Runs of training as pages hear of them: by events while they run, and over a real server's routes afterwards."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

import pytest
from PIL import Image

from lora_ops.train.history import History
from lora_ops.train.loop import Progress

WORKFLOW = "5b8e6d16-edba-493f-a054-f044423b7232"


class Host:
    """The host's server as far as a run needs it, with a clock of its own."""

    def __init__(self) -> None:
        self.loop = self
        self.events: list[dict[str, Any]] = []
        self.now = 100.0
        self._due: list[tuple[float, Any]] = []

    def send_sync(self, event, data):
        assert event == "lora_ops.train"
        self.events.append(json.loads(json.dumps(data, allow_nan=False)))

    def call_soon_threadsafe(self, call, *given):
        call(*given)

    def call_later(self, seconds, call):
        self._due.append((self.now + seconds, call))

    def wait(self, seconds: float) -> None:
        self.now += seconds
        due = [call for at, call in self._due if at <= self.now]
        self._due = [each for each in self._due if each[0] > self.now]
        for call in due:
            call()


@pytest.fixture
def runs(ours, monkeypatch, tmp_path):
    import folder_paths

    module = ours("nodes.host.runs")
    monkeypatch.setattr(module.caches, "runs", type(module.caches.runs)())
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    return module


@pytest.fixture
def host(runs, monkeypatch) -> Host:
    found = Host()
    monkeypatch.setattr(runs.PromptServer, "instance", found, raising=False)
    monkeypatch.setattr(runs.time, "monotonic", lambda: found.now)
    return found


@pytest.fixture
def run(runs, host):
    return runs.begin("5:3", "ink", 100, runs.root() / "ink", WORKFLOW)


def done(step: int, *, steps: int = 100) -> Progress:
    validation = 1 / step if step % 10 == 0 else None
    return Progress(step, steps, step / 7, step / 8, 1e-4, 0.5, validation, validation is not None)


def go(run, host, first: int, final: int, seconds: float = 0.1) -> None:
    for step in range(first, final + 1):
        host.wait(seconds)
        run.stepped(done(step), 11_000_000)


def heard(events) -> dict[str, Any]:
    """What a page knows that has heard these events, by the page's own rule."""
    known: dict[str, Any] = {"points": [], "validations": [], "saves": [], "samples": [], "resumed": []}
    for news in events:
        since = news["since"]
        assert since <= (known["points"][-1][0] if known["points"] else 0), "a page misses something"
        points = [each for each in known["points"] if each[0] <= since] + news["points"]
        marks = {
            name: [each for each in known[name] if (each[0] if isinstance(each, list) else each) < since] + news[name]
            for name in ("validations", "saves", "samples", "resumed")
        }
        known = {**news, **marks, "points": points, "since": 0}
    return known


def whole(run) -> dict[str, Any]:
    return json.loads(json.dumps(run.told(0)))


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert {**one, "at": 0} == {**other, "at": 0}


def test_a_page_that_hears_everything_knows_what_one_that_asks_is_told(run, host):
    go(run, host, 1, 25)
    run.saved(20, run.folder / "ink-000020.safetensors", True)
    run.doing("sampling")
    run.sampled(25, [Image.new("RGB", (8, 8))] * 2)
    go(run, host, 26, 33, seconds=1)
    run.stepped(done(34), 11_000_000)
    host.wait(1)
    same(heard(host.events), whole(run))
    go(run, host, 21, 30)  # from the state of step 20, in one sitting
    run.saved(25, run.folder / "ink-000025.safetensors", False)  # of a sitting that was cancelled before its first step
    same(heard(host.events), whole(run))
    run.ended("cancelled", "kept")
    same(heard(host.events), whole(run))
    assert run.summary()["state"] == "cancelled" and run.summary()["step"] == 25


def test_pages_hear_of_steps_four_times_a_second_and_of_the_last_one(run, host):
    host.events.clear()
    go(run, host, 1, 100, seconds=0.01)
    assert len(host.events) <= 5
    host.wait(0.25)
    assert len(host.events) <= 6 and host.events[-1]["step"] == 100
    host.wait(10)
    assert host.events[-1]["step"] == 100 and len(host.events) <= 6


def test_what_is_asked_for_is_heard_once_and_shown_until_it_is_done(run):
    assert run.ask("sample") and run.ask("sample") and run.ask("finish")
    assert run.summary()["asked"] == ["sample", "finish"]
    assert run.wanted() == {"sample", "finish"} and run.wanted() == set()
    assert run.ask("sample") and run.wanted() == set()  # it is being done
    run.sampled(0, [])
    assert run.summary()["asked"] == ["finish"]
    assert run.ask("sample") and run.wanted() == {"sample"}
    run.stepped(done(1), 0)  # it could not be done
    assert run.summary()["asked"] == ["finish"]
    run.ended("finished", "")
    assert run.summary()["asked"] == [] and not run.ask("save") and run.wanted() == set()


def test_after_a_restart_a_run_is_found_and_gone_on_with(run, runs, host):
    go(run, host, 1, 10)
    run.sampled(10, [Image.new("RGB", (8, 8))])
    go(run, host, 11, 19)
    run.saved(20, run.folder / "ink-000020.safetensors", False)  # the engine saves a step before it tells of it
    go(run, host, 20, 23)
    before = whole(run)
    runs.caches.runs.clear()  # and what came after the last save is lost
    (found,) = runs.listed()
    assert (found["run"], found["state"], found["step"]) == (run.id, "stopped", 20)
    again = runs.begin("5:3", "ink", 120, run.folder, WORKFLOW)
    assert again.id == run.id and runs.find(run.id) is again
    go(again, host, 21, 30)
    told = whole(again)
    assert told["points"][:23] == before["points"] and told["resumed"] == [20] and told["steps"] == 120
    assert [each[0] for each in told["samples"]] == [10]


def test_a_long_run_is_thinned_for_the_page_and_whole_on_disk_and_on_the_wire(run, runs, host):
    for step in range(1, 10_001):
        run.stepped(done(step, steps=10_000), 0)
    run.ended("done", "")
    told = run.told(0)
    assert len(told["points"]) <= runs.POINTS and told["points"][-1][0] == 10_000
    assert run.loss_map()["steps"] == list(range(1, 10_001))
    runs.caches.runs.clear()
    assert runs.find(run.id).loss_map() == run.loss_map()


def test_training_goes_on_where_its_history_cannot_be_written(run, host):
    (run.folder / "history.json").mkdir()
    (run.folder / "samples").write_text("in the way")
    go(run, host, 1, 3)
    run.sampled(3, [Image.new("RGB", (8, 8))])
    assert "not kept on disk" in host.events[-1]["trouble"] and host.events[-1]["samples"] == []
    run.ended("done", "kept")
    assert "not kept on disk" in host.events[-1]["trouble"] and host.events[-1]["state"] == "done"
    assert str(run.folder) not in json.dumps(host.events)


def test_a_history_that_cannot_be_read_hides_no_other(run, runs, host):
    run.ended("cancelled", "")
    for name, content in {"empty": "", "list": "[]", "old": '{"version": 0}'}.items():
        (runs.root() / name).mkdir()
        (runs.root() / name / "history.json").write_text(content)
    runs.caches.runs.clear()
    assert [each["run"] for each in runs.listed()] == [run.id]
    begun = runs.begin("1", "list", 10, runs.root() / "list", None)
    go(begun, host, 1, 2)
    assert begun.told(0)["step"] == 2


def test_the_workflow_is_known_from_what_the_page_queues(runs):
    assert runs.workflow_of({"workflow": {"id": WORKFLOW, "nodes": []}}) == WORKFLOW
    assert runs.workflow_of(None) is runs.workflow_of({}) is runs.workflow_of({"workflow": None}) is None


# over a real server


@pytest.fixture(scope="module")
def there(server):
    """A run that lies in the server's output folder, and its id as the server gives it."""
    folder = server.base / "output" / "lora_ops" / "there"
    (folder / "samples").mkdir(parents=True)
    history = History("there", 100, "3", WORKFLOW, 1.5)
    for step in range(1, 31):
        history.stepped(done(step), 5)
    history.sampled(30, 1, 1234)
    history.write(folder)
    Image.new("RGB", (600, 300), (10, 20, 30)).save(folder / "samples" / "000030_0.png")
    (folder / "secret.png").write_bytes(b"secret")
    (run,) = [run for run in server.json("/lora_ops/train?node=3")["runs"] if run["name"] == "there"]
    return run["run"]


def posted(server, path: str, body: bytes = b"{}", **headers: str) -> tuple[int, dict[str, Any]]:
    headers = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(urllib.request.Request(server.url + path, body, headers)) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        text = error.read()
        return error.code, json.loads(text) if text.startswith(b"{") else {}


def status(server, path: str) -> int:
    try:
        server.get(path)
    except urllib.error.HTTPError as error:
        return error.code
    return 200


def test_runs_are_listed_by_node_and_workflow(server, there):
    listed = server.json(f"/lora_ops/train?node=3&workflow={WORKFLOW}")["runs"]
    assert [run["run"] for run in listed] == [there] and listed[0]["state"] == "stopped"
    assert server.json("/lora_ops/train?node=4")["runs"] == []
    assert str(server.base) not in json.dumps(listed)


def test_a_run_is_told_from_a_step_on(server, there):
    told = server.json(f"/lora_ops/train/{there}")
    assert [each[0] for each in told["points"]] == list(range(1, 31))
    later = server.json(f"/lora_ops/train/{there}?since=20")
    assert later["points"] == told["points"][20:] and [each[0] for each in later["validations"]] == [20, 30]


def test_samples_come_whole_and_small(server, there):
    path = f"/lora_ops/train/{there}/sample/30/0"
    assert server.get(path).startswith(b"\x89PNG")
    assert server.get(f"{path}?small&at=1").startswith(b"RIFF")
    assert status(server, f"/lora_ops/train/{there}/sample/30/1") == 404


@pytest.mark.parametrize(
    "path",
    [
        "0" * 16,
        "..%2fthere",
        "there",
        "{run}?since=-1",
        "{run}?since=x",
        "{run}/sample/30/..%2f..%2fsecret.png",
        "{run}/sample/x/0",
        "{run}/sample/1/secret",
    ],
)
def test_nothing_but_ids_and_numbers_leads_anywhere(server, there, path):
    assert status(server, "/lora_ops/train/" + path.format(run=there)) in (400, 404)


@pytest.mark.parametrize("want", ["sample", "save", "finish"])
def test_asking_takes_json_of_this_site_and_a_run_that_runs(server, there, want):
    path = f"/lora_ops/train/{there}/{want}"
    assert posted(server, path) == (409, {"error": "The run has ended."})
    assert posted(server, f"/lora_ops/train/{'0' * 16}/{want}")[0] == 404
    assert posted(server, path, Content_Type="text/plain")[0] == 415
    assert posted(server, path, Content_Type="application/x-www-form-urlencoded")[0] == 415
    for body in (b"", b"[]", b"{", b"[" * 1024, b'{"step": 1}', b"\xff", b"{" + b" " * 5000 + b"}"):
        assert posted(server, path, body)[0] == 400
    assert posted(server, path, Origin="http://elsewhere.example")[0] == 403
    assert posted(server, path, Sec_Fetch_Site="cross-site")[0] == 403
    assert status(server, path) in (404, 405)
