"""How far a long work is, in the node and in the terminal, and the user's cancel."""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass, field

import comfy.model_management
import comfy.utils

NODE, TERMINAL = 0.2, 5.0  # seconds between two messages


@dataclass
class Progress:
    what: str
    total: int  # bytes
    node: str | None  # its id, None outside of a workflow
    done: int = 0
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._bar = comfy.utils.ProgressBar(max(1, self.total))
        self._shown = self._logged = self.started

    def add(self, count: int) -> None:
        """Raises the host's InterruptProcessingException if the user has cancelled."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.done += count
        now = time.monotonic()
        if now - self._shown > NODE or self.done == self.total:
            self._shown = now
            self._bar.update_absolute(self.done, self.total)
            self._show(self._text(now))
        if now - self._logged > TERMINAL or self.done == self.total:
            self._logged = now
            logging.info(self._text(now))

    def _text(self, now: float) -> str:
        left = (now - self.started) * (self.total - self.done) / max(1, self.done)
        return f"{self.what}: {self.done / 1e6:.0f} of {self.total / 1e6:.0f} MB, {left:.0f} s left"

    def _show(self, text: str) -> None:
        server = getattr(sys.modules.get("server"), "PromptServer", None)  # not there where no server runs
        instance = getattr(server, "instance", None)
        if self.node is not None and instance is not None:
            instance.send_progress_text(text, self.node)
