"""Sitting: a course carried out in its folder, from the start or from where it stopped, until it ends or is stopped."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
from comfy.cli_args import args
from PIL import Image
from torch import Tensor

from ...lora_ops.errors import TrainingError, shown
from ...lora_ops.families import UNKNOWN
from ...lora_ops.files import TensorFile
from ...lora_ops.landing import land, require_coverage
from ...lora_ops.layouts import LAYOUTS, Layout, write
from ...lora_ops.lora import Lora, from_file, read_file
from ...lora_ops.stack import Entry
from ...lora_ops.train.compiling import INDUCTOR
from ...lora_ops.train.figures import figures
from ...lora_ops.train.history import read
from ...lora_ops.train.keeping import Folder
from ...lora_ops.train.loop import Progress
from ...lora_ops.train.memory import Estimate, out_of_memory
from ...lora_ops.train.recipes import differences
from . import caches, live, names, patching, runs
from .course import Course
from .previews import pictures_of, tensor_of
from .progress import Steps, show
from .training import Finish, Session

RECIPE = "lora_ops.training"  # in a LoRA's metadata
KOHYA, COMFY, LYCORIS = ({each.name: each for each in LAYOUTS}[name] for name in ("kohya", "comfy", "lycoris"))


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a run gave: its file, what that holds, the MODEL with it, its losses and its last samples, if it has any."""

    file: TensorFile
    lora: Lora
    model: Any
    loss_map: Mapping[str, Any]
    samples: Tensor | None
    data: Mapping[str, Any]


class Sitting:
    def __init__(self, course: Course, folder: Folder, node_id: Any, recipe: Mapping[str, Any]) -> None:
        self.course, self.folder, self.node_id, self.recipe = course, folder, node_id, recipe
        self.settings, self.name = course.settings, folder.path.name
        self.began = time.time()
        self.notes: list[str] = []
        self.samples: Tensor | None = None
        self.memory: dict[str, int] = {}

    def outcome(self, workflow: str | None) -> Outcome:
        """Carry it out. Raises the host's interrupt when the user cancels, and what learn raises; what was learned
        until then is in the folder."""
        settings, course = self.settings, self.course
        if settings.resume["key"] == "none" and (aside := self.folder.set_aside()):
            self.notes.append(f"the earlier run is in {aside.name}")
        self.from_step = self.step = self.folder.step()
        self.kept = self._was_finished()
        if self.step and (changed := differences(self.folder.told() or self.recipe, self.recipe)):
            self._changed(", ".join(changed))
        self.run = runs.begin(self.node_id, self.name, settings.steps, self.folder.path, workflow)
        try:
            self.folder.tell(self.recipe)
            with Steps(self.node_id, self.name, self.step, settings.steps, self._speed) as self.shown:
                lora = course.model.learn(
                    course.plan,
                    course.items,
                    name=self.name,
                    lora=self._start(),
                    held_out=course.held_out,
                    path=self.folder.state,
                    checkpointing=settings.checkpointing,
                    offload=settings.offload,
                    compiler=INDUCTOR if settings.compile else "",
                    foreseen=self._foreseen,
                    stepped=self._stepped,
                    stopped=self._stopped,
                )
            self._write(self.folder.result, lora)
            found = self._outcome()
        except BaseException as error:
            self._ended_early(error)
            raise
        how = "done" if self.step >= settings.steps else "finished"
        self.run.ended(how, self.where(self.folder.result))
        show(self.node_id, f"step {self.step}/{settings.steps} · {how}")
        return found

    def where(self, path: Path) -> str:
        """As a person finds it: from the host's output folder on."""
        return path.relative_to(runs.root().parent.parent).as_posix()

    def _was_finished(self) -> bool:
        """Whether somebody ended it before these very steps were done: then it stays as it is."""
        try:
            before = read(self.folder.path)
        except (OSError, ValueError):
            return False
        return bool(before.ending and before.ending.how == "finished" and before.steps == self.settings.steps)

    def _changed(self, what: str) -> None:
        """Raises TrainingError where there is no step left that could learn otherwise."""
        if self.kept or self.step >= self.settings.steps:
            told = f"The run '{shown(self.name)}' is done, at step {self.step}. These have changed since: {what}."
            remedy = "Raise steps to go on with it, choose another name, or set resume to none."
            raise TrainingError(told, file=self.folder.path, remedy=remedy)
        self.notes.append(f"changed from step {self.step} on: {what}")

    def _speed(self) -> float | None:
        return self.run.history.speed

    def _start(self) -> Lora | None:
        if self.settings.resume["key"] != "lora":
            return None
        meant = names.find(self.settings.resume["file"])
        return caches.load(meant.name, meant.path).lora

    def _foreseen(self, needed: Estimate, free: int) -> None:
        self.memory = {"activations": needed.activations, "parameters": needed.parameters, "free": free}
        if self.kept:
            self.notes.append("it was finished by hand and stays so: change steps to go on")
            raise Finish
        if self.step > self.settings.steps:
            self.notes.append(f"it has {self.step} steps already, more than are asked for")

    def _stepped(self, done: Progress, session: Session) -> None:
        self.step = done.step
        self.run.stepped(done, done.memory)
        self.shown(done)
        wanted = self.run.wanted()
        last = "finish" in wanted or done.step == done.steps
        if done.best:
            self._save(self.folder.best, session.lora(self.name), best=True)
        if "save" in wanted or (_due(self.settings.save_every, done.step) and not last):
            session.save()
            self._save(self.folder.lora(done.step), session.lora(self.name))
        if last or "sample" in wanted or _due(self.settings.sample_every, done.step):
            self._sample(session, asked="sample" in wanted)
        if "finish" in wanted:
            session.save()
            raise Finish

    def _sample(self, session: Session, *, asked: bool) -> None:
        previews = self.course.previews
        if previews is None or not (asked or self.settings.sample_every):
            return
        self.run.doing("sampling")
        show(self.node_id, f"step {self.step}/{self.settings.steps} · drawing samples")
        try:
            self.samples = session.sample(lambda model: previews.draw(model, session.clip))
        except Exception as error:
            if not out_of_memory(error):
                raise
            self.notes.append(f"no samples at step {self.step}: memory ran out")
            logging.warning("LoRA Ops: %s has %s", self.name, self.notes[-1])
        else:
            self.run.sampled(self.step, pictures_of(self.samples))
        self.run.doing("")

    def _stopped(self, session: Session) -> None:
        self._save(self.folder.lora(self.step), session.lora(self.name))

    def _ended_early(self, error: BaseException) -> None:
        cancelled = isinstance(error, comfy.model_management.InterruptProcessingException)
        message = "Cancelled" if cancelled else str(error)
        if self.step:
            message += f" at step {self.step}: the state and the LoRA so far are in {self.where(self.folder.path)}. "
            message += "Queue the node again to go on."
        logging.warning("LoRA Ops: %s: %s", self.name, message)
        self.run.ended("cancelled" if cancelled else "failed", message)
        show(self.node_id, message)

    def _save(self, path: Path, lora: Lora, *, best: bool = False) -> None:
        self._write(path, lora)
        self.run.saved(self.step, path, best)

    def _write(self, path: Path, lora: Lora) -> None:
        course = self.course
        told = figures(self.name, course.plan, course.wires.dataset, self.step, self.began, time.time())
        if not args.disable_metadata:
            told[RECIPE] = json.dumps(self.recipe, ensure_ascii=False)
        shapes = patching.shapes(course.wires.model, course.clip)
        write(path, lora, _layout(course), course.family, shapes=shapes, metadata=told, overwrite=True)

    def _outcome(self) -> Outcome:
        file = read_file(str(self.folder.result))
        lora, model, clip = from_file(file), self.course.wires.model, self.course.clip
        landing = land([Entry(lora, {"model": 1.0, "clip": 1.0})], patching.targets(model, clip))
        require_coverage(landing, 1.0)
        # After a live DoRA, which must not see it, it runs live, too: as it was trained.
        looked_at = live.turned(model) or (clip is not None and live.turned(clip.patcher))
        model = patching.applied(landing, "live" if looked_at else "auto", model, clip).model
        if clip is not None:
            self.notes.append("what CLIP learned is in the LoRA: Apply LoRA puts it on")
        self.run.saved(self.step, self.folder.result, best=False)
        return Outcome(file, lora, model, self.run.loss_map(), self._last_samples(), self._data(file))

    def _last_samples(self) -> Tensor | None:
        """Those of an earlier sitting where there are none of this one."""
        there = self.run.history.samples
        if self.samples is not None or not there:
            return self.samples
        try:
            pictures = [Image.open(self.run.sample(there[-1].step, n)) for n in range(there[-1].pictures)]
            return tensor_of([each.convert("RGB") for each in pictures])
        except OSError:
            return None

    def _data(self, file: TensorFile) -> dict[str, Any]:
        course, history = self.course, self.run.history
        losses, smoothed, seconds = (history.columns[name] for name in ("loss", "smoothed", "seconds"))
        return {
            "version": 1,
            "name": self.name,
            "path": str(self.folder.result),
            "folder": self.where(self.folder.path),
            "step": self.step,
            "steps": self.settings.steps,
            "from_step": self.from_step,
            "seconds": sum(seconds[-(self.step - self.from_step) :]) if self.step > self.from_step else 0.0,
            "loss": losses[-1] if losses else None,
            "smoothed": smoothed[-1] if smoothed else None,
            "best": history.best,
            "family": course.family.name,
            "preset": course.chosen.title,
            "places": len(course.places),
            "parameters": sum(each.numel() for key, each in file.tensors.items() if not key.endswith(".alpha")),
            "memory": {**self.memory, "in_use": history.memory},
            "samples": [
                self.where(self.run.sample(each.step, n)) for each in history.samples for n in range(each.pictures)
            ],
            "dataset": dict(course.wires.dataset.report),
            "notes": self.notes,
        }


def _layout(course: Course) -> Layout:
    """The one that most programs read; where parts of fused weights have more than a LoRA, which cannot be fused, the
    one that has names for parts."""
    if course.plan.algebra != "lora" and any(place.target.band for place in course.places):
        return LYCORIS
    return COMFY if course.family is UNKNOWN else KOHYA


def _due(every: int, step: int) -> bool:
    return bool(every) and step % every == 0
