"""What a measurement says of the machine, and its two files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from harness import comfy


def machine(path: Path) -> dict[str, str]:
    """The host, torch and the device."""
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    return {"host": comfy.version(path), "torch": torch.__version__, "device": device}


def write(out: Path, name: str, about: Mapping[str, Any], rows: Sequence[Any], markdown: str) -> None:
    """As JSON and as Markdown."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1), encoding="utf-8")
    (out / f"{name}.md").write_text(markdown, encoding="utf-8")
    print(f"wrote {out / f'{name}.md'} and .json")
