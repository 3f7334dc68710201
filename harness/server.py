"""A real ComfyUI server in a folder of its own, without network and without a browser."""

from __future__ import annotations

import json as jsonlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

from harness.comfy import PACK

MOUNT = "lora_ops_pack"
FOLDERS = (
    *(f"models/{kind}" for kind in ("checkpoints", "loras", "diffusion_models", "text_encoders", "vae")),
    "input",
    "output",
    "custom_nodes",
    "user",
)
NOTHING: Mapping[str, Any] = MappingProxyType({})
# Two servers on the same cores take turns; with OpenMP's spinning threads each of them is 15 times slower.
PATIENT = {"OMP_WAIT_POLICY": "passive"}
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}

# Runs main.py until this process is gone, however it went: a killed one closes the pipe that is the child's stdin.
LEASH = """
import os, runpy, sys, threading
def wait(): os.read(0, 1); os._exit(1)  # sys.stdin's own lock would abort an exiting interpreter
threading.Thread(target=wait, daemon=True).start()
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class ServerError(Exception):
    """The server did not start, died, or did not answer in time; the message ends with its last log lines."""


class WorkflowError(Exception):
    """The server refused a prompt or a node failed.

    node_errors is what validation said (node id -> errors, empty when it passed). If a node failed, node_id,
    node_type, exception_type and traceback say which and how, and message is the exception's own.
    """

    def __init__(self, message: str, node_errors: Mapping[str, Any] = NOTHING, failure: Mapping[str, Any] = NOTHING):
        super().__init__(message)
        self.message = message
        self.node_errors = dict(node_errors)
        self.node_id: str | None = failure.get("node_id")
        self.node_type: str | None = failure.get("node_type")
        self.exception_type: str | None = failure.get("exception_type")
        self.traceback = "".join(failure.get("traceback", ()))


class Server:
    """`with Server(comfy) as server:` starts one and never leaves it running.

    base is its --base-directory; without one, a temporary folder that goes with the server. models are linked in
    from another folder, never written to. cuda lets the host choose its device instead of --cpu. pack is the folder
    mounted as the custom node; None for a bare ComfyUI. arguments are appended to main.py's. own: it works in
    ComfyUI's own folders, with its models and custom nodes, and says what it says in this terminal; base holds no more
    than what keeps it apart from a ComfyUI that is running there.
    """

    def __init__(
        self,
        comfy: Path,
        base: Path | None = None,
        *,
        models: Path | None = None,
        python: str = sys.executable,
        cuda: bool = False,
        pack: Path | None = PACK,
        arguments: tuple[str, ...] = (),
        own: bool = False,
    ):
        self.comfy = comfy
        self.base = (base or Path(tempfile.mkdtemp(prefix="lora-ops-"))).absolute()
        self._temporary, self._own = base is None, own
        self._python = python
        self._pack = pack
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""
        for folder in FOLDERS if not own else ("user", "custom_nodes"):
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        # The host's default attention takes twice as long on a CPU.
        device = () if cuda else ("--cpu", "--use-pytorch-cross-attention")
        self._arguments = (*device, *self._folders(), *arguments)
        if models:
            for file in models.rglob("*.safetensors"):
                link(file, self.base / "models" / file.relative_to(models))
        if pack:
            link(pack, self.base / "custom_nodes" / MOUNT)

    def __enter__(self) -> Server:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, timeout: float = 300) -> None:
        """Returns when the server answers. One that is started again has its old address, which pages know.

        Raises ServerError if it does not within timeout seconds, if it dies, or if it could not import the pack.
        """
        if not self.url:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        port = self.url.rpartition(":")[2]
        command = [
            *(self._python, "-u", "-c", LEASH, str(self.comfy / "main.py")),
            *("--listen", "127.0.0.1", "--port", port),
            # Not the one in ComfyUI's own folder: two servers would fight for its lock.
            *("--database-url", f"sqlite:///{(self.base / 'user' / 'comfyui.db').as_posix()}"),
            *("--disable-auto-launch", "--disable-api-nodes"),
            *self._arguments,
        ]
        with nullcontext() if self._own else self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self.comfy,
                env={**os.environ, **PATIENT, **OFFLINE},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                # A Ctrl+C in the terminal is the parent's alone: it interrupts the run, which then keeps what it has.
                start_new_session=self._own and sys.platform != "win32",
                creationflags=subprocess.CREATE_NEW_PROCESS_GROUP if self._own and sys.platform == "win32" else 0,
            )
        deadline = time.monotonic() + timeout
        while not self.answers():
            self._check_alive()
            if time.monotonic() > deadline:
                raise ServerError(f"ComfyUI did not answer within {timeout:.0f} s.\n{self._tail()}")
            time.sleep(0.1)
        if self._pack and re.search(rf"IMPORT FAILED\S*: .*{MOUNT}", self.log()):
            raise ServerError(f"ComfyUI could not import the pack.\n{self._tail()}")

    def stop(self) -> None:
        """Ends the server, politely first. The log stays readable in base, unless base was temporary."""
        if self._process:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            if self._process.stdin:
                self._process.stdin.close()
            self._process = None
        if self._temporary:
            shutil.rmtree(self.base, ignore_errors=True)

    def kill(self) -> None:
        """Ends it at once, whatever it is doing. It can be started again."""
        if self._process:
            self._process.kill()
            self._process.wait()

    def post(self, prompt: Mapping[str, Any], timeout: float = 600) -> dict[str, Any]:
        """Runs an API prompt to its end and returns its entry in /history.

        Raises WorkflowError if validation refuses any part of it or a node fails; ServerError after timeout seconds,
        the run interrupted.
        """
        return self.finished(self.queue(prompt), timeout)

    def queue(self, prompt: Mapping[str, Any]) -> str:
        """Asks for an API prompt to be run; returns its id. Raises WorkflowError if validation refuses any of it."""
        try:
            answer = self.json("/prompt", {"prompt": prompt, "client_id": uuid.uuid4().hex})
        except urllib.error.HTTPError as error:
            answer = jsonlib.loads(error.read())
        if answer.get("node_errors") or answer.get("error"):
            raise _refusal(answer)
        return answer["prompt_id"]

    def finished(self, name: str, timeout: float = 600) -> dict[str, Any]:
        """Waits for the prompt of this id, as post does."""
        deadline = time.monotonic() + timeout
        while not (entry := self.json(f"/history/{name}").get(name)):
            self._check_alive()
            if time.monotonic() > deadline:
                self.request("/interrupt", {})
                raise ServerError(f"The prompt did not finish within {timeout:.0f} s.\n{self._tail()}")
            time.sleep(0.05)
        for event, data in entry["status"]["messages"]:
            if event == "execution_error":
                raise WorkflowError(data["exception_message"].strip(), failure=data)
            if event == "execution_interrupted":
                raise WorkflowError("The run was interrupted.", failure=data)
        return entry

    def _folders(self) -> tuple[str, ...]:
        if not self._own:
            return "--base-directory", str(self.base)
        config = self.base / "extra_model_paths.yaml"  # JSON is YAML
        config.write_text(jsonlib.dumps({MOUNT: {"custom_nodes": str(self.base / "custom_nodes")}}), encoding="utf-8")
        return "--extra-model-paths-config", str(config)

    def object_info(self) -> dict[str, Any]:
        return self.json("/object_info")

    def images(self, entry: Mapping[str, Any]) -> list[bytes]:
        """The files of every picture a history entry names, in the order of its nodes."""
        shown = (image for output in entry["outputs"].values() for image in output.get("images", ()))
        return [self.get(f"/view?{urllib.parse.urlencode(image)}") for image in shown]

    def get(self, path: str) -> bytes:
        return self.request(path)

    def json(self, path: str, body: Any = None) -> Any:
        """What GET path, or POST path with a JSON body, answers."""
        return jsonlib.loads(self.request(path, body))

    def request(self, path: str, body: Any = None, timeout: float = 60) -> bytes:
        """GET, or POST if there is a JSON body. Raises urllib.error.HTTPError for a status of 400 or more."""
        data = None if body is None else jsonlib.dumps(body).encode()
        asked = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"} if data else {})
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy cannot reach this machine
        with direct.open(asked, timeout=timeout) as answer:
            return answer.read()

    def log(self) -> str:
        """All the server has printed, without colours."""
        if not self._log.exists():
            return ""
        text = self._log.read_text(encoding="utf-8", errors="replace")
        return re.sub(r"\x1b\[[\d;]*m", "", text)

    @property
    def _log(self) -> Path:
        return self.base / "server.log"

    def _tail(self, lines: int = 25) -> str:
        return "\n".join(self.log().splitlines()[-lines:])

    def answers(self) -> bool:
        try:
            self.request("/system_stats", timeout=5)
        except OSError:
            return False
        return True

    def _check_alive(self) -> None:
        if self._process is None or self._process.poll() is not None:
            code = self._process.returncode if self._process else "stopped"
            raise ServerError(f"ComfyUI is gone (exit code {code}).\n{self._tail()}")


def link(source: Path, target: Path) -> None:
    """Make target stand for source: a symbolic link; where those are not allowed, a junction, hard link or copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        return
    try:
        target.symlink_to(source.absolute(), target_is_directory=source.is_dir())
    except OSError:  # Windows without developer mode
        if source.is_dir():
            subprocess.run(["cmd", "/c", "mklink", "/J", str(target), str(source)], check=True, capture_output=True)
        else:
            try:
                target.hardlink_to(source)
            except OSError:  # another drive
                shutil.copyfile(source, target)


def _refusal(answer: Mapping[str, Any]) -> WorkflowError:
    error = answer.get("error") or {}
    lines = [error if isinstance(error, str) else error.get("message", "Some outputs failed validation")]
    for node, found in answer.get("node_errors", {}).items():
        for each in found["errors"]:
            lines.append(f"{found['class_type']} ({node}): {each['message']}: {each['details']}")
    return WorkflowError("\n".join(lines), answer.get("node_errors", NOTHING))
