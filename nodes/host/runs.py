"""Runs of training, told to the pages that watch while they run: losses, samples, saves, and what pages ask of them.

The history of each lies in its folder, below the output folder's lora_ops, and is found there again after a restart of
the host. What goes to a page is numbers, texts and our own ids: a path neither leaves nor comes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

import folder_paths
from PIL import Image
from server import PromptServer

from ...lora_ops.errors import FileError
from ...lora_ops.files import identity
from ...lora_ops.train.history import FILE, Ending, History, read, thinned
from ...lora_ops.train.loop import Progress
from . import caches

EVENT = "lora_ops.train"
EVERY = 0.25  # seconds between two events of steps
POINTS = 2000  # of the raw loss that a page gets at most
WANTS = ("sample", "save", "finish")
ENDINGS = ("done", "finished", "cancelled", "failed")
SAMPLES = "samples"  # the folder of a run's pictures


def root() -> Path:
    """Where runs have their folders."""
    return Path(folder_paths.get_output_directory()) / "lora_ops"


def workflow_of(extra_pnginfo: Any) -> str | None:
    """The id of the workflow that the page queued, from a node's hidden input of this name."""
    found = extra_pnginfo.get("workflow") if isinstance(extra_pnginfo, Mapping) else None
    found = found.get("id") if isinstance(found, Mapping) else None
    return str(found) if found else None


def begin(node_id: Any, name: str, steps: int, folder: Path, workflow: str | None) -> Run:
    """A run in this folder, which is made; one that was there before is gone on with. Pages hear of it at once.

    node_id is the host's unique_id of the node.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        history = read(folder)
        history.name, history.steps, history.node, history.workflow = name, steps, str(node_id), workflow
        history.began, history.ending = time.time(), None
    except FileNotFoundError:
        history = History(name, steps, str(node_id), workflow, time.time())
    except (OSError, ValueError) as error:
        logging.warning("LoRA Ops: the history in %s is begun anew: %s", folder, error)
        history = History(name, steps, str(node_id), workflow, time.time())
    run = Run(history, folder, running=True)
    caches.keep_run(run)
    run.doing("preparing")
    return run


def listed() -> list[dict[str, Any]]:
    """What there is to say of all runs, those of this process and those that are on disk, the newest first."""
    found = {run.id: run.summary() for run in list(caches.runs.values())}
    for folder in _folders():
        if _id(folder) not in found:
            with suppress(OSError):  # it is gone by now
                if told := caches.history_of(folder, identity(folder / FILE)):
                    found[_id(folder)] = {"run": _id(folder), **told}
    return sorted(found.values(), key=lambda run: run["began"], reverse=True)


def find(run: str) -> Run | None:
    """The run of this id."""
    if run in caches.runs:
        return caches.runs[run]
    try:
        folder = folder_of(run)
        return None if folder is None else Run(read(folder), folder, running=False)
    except (OSError, ValueError):
        return None


def folder_of(run: str) -> Path | None:
    """Where the run of this id has its files."""
    if run in caches.runs:
        return caches.runs[run].folder
    return next((folder for folder in _folders() if _id(folder) == run), None)


def sample(folder: Path, step: int, number: int) -> Path:
    """Where a picture of a run is kept."""
    return folder / SAMPLES / f"{step:06}_{number}.png"


def _folders() -> Iterator[Path]:
    for folder, inner, names in os.walk(root()):
        if FILE in names:
            inner[:] = [name for name in inner if name != SAMPLES]
            yield Path(folder)


def _id(folder: Path) -> str:
    return hashlib.sha256(str(folder.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:16]


class Run:
    """One training run. The node's thread tells it how it goes and asks what is wanted; the pages' thread the reverse.

    Nothing that goes wrong with the history stops the training; the page is told.
    """

    def __init__(self, history: History, folder: Path, *, running: bool) -> None:
        self.history, self.folder, self.id = history, folder, _id(folder)
        self.running = running
        self.trouble = ""  # why the history is not on disk
        self.note = ""  # what was done last
        self._doing = ""
        self._asked: dict[str, bool] = {}  # what a page wants -> whether the node has heard it
        self._went_on = history.step > 0  # whether the next step says from where
        self._told = history.step  # the last step that the pages have heard of
        self._at = -EVERY
        self._due = False  # whether the pages will be told soon
        self._lock = Lock()

    def doing(self, what: str) -> None:
        """What takes time now instead of a step: "preparing", "sampling", … Until the next step, or ""."""
        with self._lock:
            self._doing = what
        self._tell()

    def stepped(self, progress: Progress, memory: int) -> None:
        with self._lock:
            before = self.history.step
            self.history.stepped(progress, memory)
            if self._went_on and progress.step > 1:
                self.history.went_on(progress.step - 1)
            self._went_on = False
            if progress.step <= before:
                self._told = min(self._told, progress.step - 1)
            if self.history.saves and self.history.saves[-1].step == progress.step:
                self._keep()  # it was saved before it was told
            self._doing = ""
            self._asked = {want: heard for want, heard in self._asked.items() if not heard or want == "finish"}
            soon = self._at + EVERY - time.monotonic()
        if soon <= 0:
            self._tell()
        elif not self._due and (server := getattr(PromptServer, "instance", None)):
            self._due = True  # or a page would wait for these steps until the next one is done
            server.loop.call_soon_threadsafe(server.loop.call_later, soon, self._tell)

    def saved(self, step: int, path: Path, best: bool) -> None:
        """A file of this step is in path."""
        with self._lock:
            self.history.saved(step, path.name, best)
            self.note = f"Saved {path.name}"
            self._asked.pop("save", None)
            self._keep()
        self._tell()

    def sampled(self, step: int, images: Sequence[Image.Image]) -> None:
        """Keeps the pictures of this step."""
        try:
            (self.folder / SAMPLES).mkdir(exist_ok=True)
            for number, image in enumerate(images):
                image.save(self.sample(step, number), compress_level=4)
        except OSError as error:
            self._troubled(error.strerror or str(error))
            return self._tell()
        with self._lock:
            self.history.sampled(step, len(images), int(time.time() * 1000))
            self.note = f"Sampled at step {step}"
            self._asked.pop("sample", None)
            self._keep()
        self._tell()

    def ended(self, how: str, message: str) -> None:
        """how is one of ENDINGS; the message says what the user has now."""
        assert how in ENDINGS
        with self._lock:
            self.running, self._doing, self.note, self._asked = False, "", "", {}
            self.history.ending = Ending(how, message, time.time())
            self._keep()
        self._tell()

    def wanted(self) -> set[str]:
        """What pages have asked for since the last call, of WANTS."""
        with self._lock:
            found = {want for want, heard in self._asked.items() if not heard}
            self._asked = dict.fromkeys(self._asked, True)
        return found

    def ask(self, want: str) -> bool:
        """False where nothing runs that could do it. What is asked for twice before it is done is done once."""
        with self._lock:
            if not self.running:
                return False
            self._asked.setdefault(want, False)
        self._tell()
        return True

    def loss_map(self) -> dict[str, Any]:
        with self._lock:
            return self.history.loss_map()

    def sample(self, step: int, number: int) -> Path:
        return sample(self.folder, step, number)

    def summary(self) -> dict[str, Any]:
        """What a page shows of it in words."""
        with self._lock:
            return self._summary()

    def _summary(self) -> dict[str, Any]:
        told, running = self.history.told(), self.running
        steps = max(0, self.history.steps - self.history.step)
        return {
            **told,
            "run": self.id,
            "at": time.time(),
            "state": "running" if running else told["state"],
            "left": steps / told["speed"] if told["speed"] and running else None,
            "doing": self._doing,
            "asked": [want for want in WANTS if want in self._asked],
            "note": self.note,
            "trouble": self.trouble,
        }

    def told(self, since: int = 0) -> dict[str, Any]:
        """The summary, with the points after this step and the marks from it on."""
        with self._lock:
            return self._told_since(since)

    def _told_since(self, since: int) -> dict[str, Any]:
        history = self.history
        steps, losses, smoothed = (history.columns[name] for name in ("step", "loss", "smoothed"))
        first = bisect_right(steps, since)
        points = [first + place for place in thinned(losses[first:], POINTS)]
        validations = [each for each in history.validations if each.step >= since]
        validations = [validations[place] for place in thinned([each.loss for each in validations], POINTS)]
        return {
            **self._summary(),
            "since": since,
            "points": [(steps[place], losses[place], smoothed[place]) for place in points],
            "validations": validations,
            "saves": [(each.step, each.best) for each in history.saves if each.step >= since],
            "samples": [each for each in history.samples if each.step >= since],
            "resumed": [each for each in history.resumed if each >= since],
        }

    def _tell(self) -> None:
        """Tells the pages what they have not heard yet."""
        with self._lock:
            news = self._told_since(min(self._told, self.history.step))
            self._told, self._at, self._due = self.history.step, time.monotonic(), False
        server = getattr(PromptServer, "instance", None)
        if server is not None:
            server.send_sync(EVENT, news)

    def _keep(self) -> None:
        try:
            self.history.write(self.folder)
            self.trouble = ""
        except FileError as error:
            self._troubled(error.what)

    def _troubled(self, why: str) -> None:
        self.trouble = f"The run's history is not kept on disk: {why}"
        logging.warning("LoRA Ops: %s (%s)", self.trouble, self.folder)
