"""Progress of long work: bytes and seconds left on the node and in the terminal; cancelled when the user says so."""

from __future__ import annotations

import time
from typing import Any

import comfy.model_management
import comfy.utils
from server import PromptServer
from tqdm import tqdm

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
            self._show(f"{far} {self._unit}, {left:.0f} s left")

    def _show(self, text: str) -> None:
        server = getattr(PromptServer, "instance", None)
        if server is not None:
            server.send_progress_text(f"{self._what}: {text}", self._node_id)

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._line.close()
        if self._shown and kind is None:  # else the node would go on showing what was left
            self._show(f"done in {time.monotonic() - self._start:.1f} s")
