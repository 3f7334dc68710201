"""Progress of long work, on the node and in the terminal: bytes, or a training's steps, and the time left; cancelled
when the user says so."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.utils
from server import PromptServer
from tqdm import tqdm

from ...lora_ops.train.loop import Progress
from ...lora_ops.train.outcomes import clock

BYTES = "GB"
EVERY = 0.3  # seconds between two texts on the node


class Meter:
    """Hears (bytes done, bytes in all), or of another unit. Raises the host's interrupt as soon as it is asked for."""

    def __init__(self, node_id: Any, what: str, unit: str = BYTES) -> None:
        self._node_id, self._what, self._unit = node_id, what, unit
        self._bar = comfy.utils.ProgressBar(1, node_id=node_id)
        self._line = tqdm(desc=what, unit="B" if unit == BYTES else f" {unit}", unit_scale=unit == BYTES, leave=True)
        self._start, self._shown = time.monotonic(), 0.0

    def __call__(self, done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._line.total = total
        self._line.update(done - self._line.n)
        self._bar.update_absolute(done, total)
        now = time.monotonic()
        if now - self._shown >= EVERY:
            self._shown = now
            left = (now - self._start) * (total - done) / max(done, 1)
            far = f"{done / 1e9:.2f} of {total / 1e9:.2f}" if self._unit == BYTES else f"{done} of {total}"
            show(self._node_id, f"{self._what}: {far} {self._unit}, {left:.0f} s left")

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._line.close()
        if self._shown and kind is None:  # else the node would go on showing what was left
            show(self._node_id, f"{self._what}: done in {time.monotonic() - self._start:.1f} s")


class Steps:
    """Hears of each step of a training."""

    def __init__(self, node_id: Any, name: str, first: int, steps: int, speed: Callable[[], float | None]) -> None:
        """first: the step that it goes on from; speed: steps a second, of late."""
        self._node_id, self._speed = node_id, speed
        self._bar = comfy.utils.ProgressBar(steps, node_id=node_id)
        self._line = tqdm(desc=name, total=steps, initial=first, unit="step", leave=True)
        self._shown = 0.0

    def __call__(self, done: Progress) -> None:
        self._bar.update_absolute(done.step, done.steps)
        self._line.update(done.step - self._line.n)
        self._line.set_postfix_str(f"loss {done.smoothed:.4g}, {done.memory / 1e9:.1f} GB", refresh=False)
        now = time.monotonic()
        if now - self._shown >= EVERY or done.step == done.steps:
            self._shown = now
            show(self._node_id, told(done, self._speed()))

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *_: object) -> None:
        self._line.close()


def told(done: Progress, speed: float | None) -> str:
    """step 120/1500 · 1.9 it/s · 12:05 left · loss 0.081 (smoothed 0.079) · 11.2 GB"""
    parts = [f"step {done.step}/{done.steps}"]
    if speed:
        left = clock((done.steps - done.step) / speed)
        parts += [f"{speed:.2f} it/s" if speed >= 1 else f"{1 / speed:.1f} s/it", f"{left} left"]
    parts += [f"loss {done.loss:.3g} (smoothed {done.smoothed:.3g})", f"{done.memory / 1e9:.1f} GB"]
    return " · ".join(parts)


def show(node_id: Any, text: str) -> None:
    """Put a text on the node."""
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.send_progress_text(text, node_id)
