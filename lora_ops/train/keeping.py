"""Keeping: where a run keeps its state, its LoRAs and what made it, and how an earlier one is kept."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from ..errors import FileError
from ..files import write_text
from .state import step_of

SUFFIX = ".safetensors"
RECIPE = "recipe.json"


@dataclass(frozen=True)
class Folder:
    """A run's, which need not exist yet; its files are called like the run."""

    path: Path

    @property
    def state(self) -> Path:
        return self.path / f"state{SUFFIX}"

    @property
    def result(self) -> Path:
        return self.path / f"{self.path.name}{SUFFIX}"

    @property
    def best(self) -> Path:
        """The best LoRA by the held-out pictures."""
        return self.path / f"{self.path.name}-best{SUFFIX}"

    def lora(self, step: int) -> Path:
        return self.path / f"{self.path.name}-{step:06}{SUFFIX}"

    def step(self) -> int:
        """The step that it goes on from; 0 where there is no state. Raises FileError for what is none."""
        return step_of(self.state) if self.state.exists() else 0

    def set_aside(self) -> Path | None:
        """Give the folder of an earlier run another name, which is returned: its own with the next free number."""
        if not self.path.exists():
            return None
        other = next(to for n in count(1) if not (to := self.path.with_name(f"{self.path.name} ({n})")).exists())
        try:
            os.rename(self.path, other)
        except OSError as error:
            what = f"cannot be given another name: {error.strerror}."
            raise FileError(what, file=self.path, remedy="Choose another name for the run.") from error
        return other

    def told(self) -> Mapping[str, Any] | None:
        """The recipe that is there; None for none that can be read."""
        try:
            found = json.loads((self.path / RECIPE).read_text(encoding="utf-8"))
            return found if found["node"] in found["prompt"] else None
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def tell(self, recipe: Mapping[str, Any]) -> None:
        """Keep what the run can be made again with. Raises FileError."""
        write_text(self.path / RECIPE, json.dumps(recipe, ensure_ascii=False, indent=1))
