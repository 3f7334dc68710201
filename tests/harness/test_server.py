"""The server is started in its own folder, asked, understood when it refuses, and never left running.

A main.py of a few lines stands in for ComfyUI here; tests/host runs the real one.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from harness import server as harness_server
from harness.server import Server, ServerError, WorkflowError, link

ROOT = Path(harness_server.__file__).parents[1]
STAND_IN = """
    import json, os, sys
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from pathlib import Path

    options = dict(zip(sys.argv, sys.argv[1:]))
    print("\\x1b[32mstarting\\x1b[0m with", *sys.argv[1:], flush=True)
    Path("pid").write_text(str(os.getpid()))
    if Path("broken").exists():
        raise SystemExit("No module named 'torchsde'")
    if Path("bad-pack").exists():
        print("   0.0 seconds (IMPORT FAILED): /base/custom_nodes/lora_ops_pack", flush=True)

    class Handler(BaseHTTPRequestHandler):
        def answer(self, told, status=200):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(told if isinstance(told, bytes) else json.dumps(told).encode())

        def do_GET(self):
            name = self.path.rpartition("/")[2]
            if self.path.startswith("/history/"):
                entry = {"outputs": OUTPUTS, "status": {"messages": MESSAGES.get(name, [])}}
                self.answer({} if name == "slow" else {name: entry})
            else:
                self.answer(self.path.encode() if "view" in self.path else {"path": self.path})

        def do_POST(self):
            print("POST", self.path, flush=True)
            prompt = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            told = ANSWERS.get(prompt.get("prompt"), {"prompt_id": prompt.get("prompt"), "node_errors": {}})
            self.answer(told, 400 if "error" in told else 200)

    wrong = {"3": {"class_type": "KSampler", "errors": [{"message": "Value too small", "details": "steps"}]}}
    ANSWERS = {
        "refused": {"error": {"message": "Prompt outputs failed validation"}, "node_errors": wrong},
        "partly refused": {"prompt_id": "x", "node_errors": wrong},
    }
    failure = {"node_id": "5", "node_type": "LoraLoader", "exception_type": "TargetError",
               "exception_message": "no target\\n", "traceback": ["line 1\\n", "line 2"]}
    MESSAGES = {"fails": [["execution_start", {}], ["execution_error", failure]],
                "stopped": [["execution_interrupted", {"node_id": "5"}]]}
    OUTPUTS = {"7": {"images": [{"filename": "a b.png", "subfolder": "", "type": "output"}]}, "8": {"text": ["hello"]}}
    HTTPServer(("127.0.0.1", int(options["--port"])), Handler).serve_forever()
"""


@pytest.fixture
def comfy(tmp_path) -> Path:
    folder = tmp_path / "ComfyUI"
    folder.mkdir()
    (folder / "main.py").write_text(textwrap.dedent(STAND_IN), encoding="utf-8")
    return folder


def test_a_server_runs_in_its_own_folder_and_goes_with_it(comfy):
    with Server(comfy) as server:
        assert {"models", "input", "output", "custom_nodes", "user"} <= {path.name for path in server.base.iterdir()}
        assert (server.base / "custom_nodes" / "lora_ops_pack" / "lora_ops").is_dir()
        log = server.log()
        assert f"--base-directory {server.base}" in log and "--cpu" in log
        assert "starting with" in log, "colours are left out"
        base = server.base
    assert not base.exists()


def test_cuda_leaves_the_device_to_the_host_and_a_given_folder_stays(comfy, tmp_path):
    with Server(comfy, tmp_path / "base", cuda=True, pack=None, arguments=("--lowvram",)) as server:
        assert list((server.base / "custom_nodes").iterdir()) == []
    assert "--cpu" not in server.log() and "--lowvram" in server.log()


def test_two_servers_at_once_answer_for_themselves(comfy):
    with Server(comfy) as one, Server(comfy) as other:
        assert one.json("/one") == {"path": "/one"}
        assert other.json("/other") == {"path": "/other"}
        assert one.base != other.base


@pytest.mark.parametrize(
    ("flag", "said"), [("broken", "exit code 1.*No module named 'torchsde'"), ("bad-pack", "could not import the pack")]
)
def test_a_server_that_does_not_come_up_says_why_at_once(comfy, flag, said):
    (comfy / flag).touch()
    started = time.monotonic()
    with pytest.raises(ServerError, match=f"(?s){said}"), Server(comfy):
        pass
    assert time.monotonic() - started < 30


def test_a_refused_prompt_names_node_and_reason(comfy):
    with Server(comfy) as server:
        for prompt in ("refused", "partly refused"):
            with pytest.raises(WorkflowError, match=r"KSampler \(3\): Value too small: steps") as raised:
                server.post(prompt)
            assert list(raised.value.node_errors) == ["3"]
            assert raised.value.node_type is None


def test_a_failed_node_tells_its_exception(comfy):
    with Server(comfy) as server:
        with pytest.raises(WorkflowError) as raised:
            server.post("fails")
        error = raised.value
        assert (error.message, error.node_id, error.node_type) == ("no target", "5", "LoraLoader")
        assert (error.exception_type, error.traceback, error.node_errors) == ("TargetError", "line 1\nline 2", {})
        with pytest.raises(WorkflowError, match="interrupted"):
            server.post("stopped")


def test_a_prompt_that_takes_too_long_is_given_up(comfy):
    with Server(comfy) as server:
        with pytest.raises(ServerError, match="did not finish within 1 s"):
            server.post("slow", timeout=1)
        assert "POST /interrupt" in server.log()


def test_pictures_are_fetched_as_the_history_names_them(comfy):
    with Server(comfy) as server:
        entry = server.post("fine")
        assert server.images(entry) == [b"/view?filename=a+b.png&subfolder=&type=output"]


def test_models_are_linked_and_not_written_to(comfy, tmp_path):
    lora = tmp_path / "models" / "loras" / "style" / "ink.safetensors"
    lora.parent.mkdir(parents=True)
    lora.write_bytes(b"ink")
    server = Server(comfy, models=tmp_path / "models")
    assert (server.base / "models" / "loras" / "style" / "ink.safetensors").read_bytes() == b"ink"
    server.stop()
    assert lora.read_bytes() == b"ink"


def test_where_links_are_not_allowed_files_are_still_there(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("a privilege is missing")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    (tmp_path / "ink").write_bytes(b"ink")
    link(tmp_path / "ink", tmp_path / "a" / "linked")
    monkeypatch.setattr(Path, "hardlink_to", refuse)
    link(tmp_path / "ink", tmp_path / "a" / "copied")
    assert [(tmp_path / "a" / name).read_bytes() for name in ("linked", "copied")] == [b"ink", b"ink"]


def test_a_killed_run_leaves_no_server_behind(comfy):
    code = f"""
        import time
        from pathlib import Path
        from harness.server import Server
        with Server(Path({str(comfy)!r}), Path({str(comfy.parent / "base")!r})) as server:
            print("up", server.url, flush=True)
            time.sleep(60)
    """
    run = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    url = run.stdout.readline().split()[1]
    run.kill()
    run.wait()
    run.stdout.close()
    orphan = Server(comfy, comfy.parent / "base", pack=None)
    orphan.url = url
    deadline = time.monotonic() + 10
    while orphan.answers() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not orphan.answers()
