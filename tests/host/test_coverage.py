"""The README's table of what lands is what a run on this host gives, and nothing in it is lost."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from harness.comfy import PACK
from tests.keys.coverage import same

EVERY = int(os.environ.get("LORA_OPS_COVERAGE", "4"))  # of so many cells one is counted; a release deserves all (1)
TABLE = (PACK / "README.md").read_text("utf-8").split("<!-- coverage -->")[1]


def test_the_table_in_the_readme_is_what_the_host_and_we_do(comfy_path):
    """In a process of its own: the host and the repository both have modules of the same names."""
    made_with = re.search(r"ComfyUI ([\d.]+)", TABLE)
    version = (comfy_path / "comfyui_version.py").read_text("utf-8")
    if not made_with or f'"{made_with[1]}"' not in version:
        pytest.skip(f"the table was made with {made_with and made_with[0]}, another version than this host")
    command = [sys.executable, "-m", "tests.keys.coverage", str(comfy_path), f"--check={EVERY}"]
    done = subprocess.run(command, cwd=PACK, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_module_lands_in_every_dialect():
    counts = re.findall(r"(✓|\d+) · (✓|\d+)", TABLE)
    assert len(counts) > 300 and any(host != "✓" for _, host in counts)
    assert all(ours == "✓" for ours, _ in counts)


def test_a_counted_cell_that_differs_is_noticed_and_one_that_was_not_counted_is_not():
    assert same("| a | ? |", "| a | 3 |")
    assert not same("| 2 | ? |", "| a | 3 |") and not same("| a |", "| a | 3 |")
