"""Names of real files, as people and trainers published them, on the families they were made for.

`files.json` holds, per file: its origin, the family, its keys with `{a,b}` and `{0..9}` for what repeats, and what of
that the source lists itself. No weights; shapes are the published model's. What is no part of a LoRA is `refused`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from lora_ops.dialects import published_map
from lora_ops.families import FAMILIES
from lora_ops.files import TensorFile
from lora_ops.landing import land
from lora_ops.lora import from_file, split
from lora_ops.stack import PARTS, Entry

FILES = json.loads((Path(__file__).parent / "files.json").read_text("utf-8"))
MAPS = {family.name: published_map(family) for family in FAMILIES}
_INNERMOST = re.compile(r"\{([^{}]*)\}")


def expanded(patterns: Iterable[str]) -> set[str]:
    """What `{a,b}` and `{0..9}` stand for, like a shell's braces; they may lie in each other."""
    found: set[str] = set()
    waiting = set(patterns)
    while waiting:
        pattern = waiting.pop()
        braces = _INNERMOST.search(pattern)
        if not braces:
            found.add(pattern)
            continue
        first, dots, last = braces[1].partition("..")
        choices = map(str, range(int(first), int(last) + 1)) if dots else braces[1].split(",")
        waiting |= {pattern[: braces.start()] + choice + pattern[braces.end() :] for choice in choices}
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file['family']}, {file['writer']}")
def test_every_name_lands(file):
    family = file["family"]
    if family not in MAPS:
        pytest.skip(f"no family {family} in FAMILIES: {file['origin']} is not tested")
    keys, refused = expanded(file["names"]), expanded(file.get("refused", ()))
    assert {key for key in keys if not split(key)[1]} == refused

    factors: dict[str, set[str]] = {}
    for module, factor in map(split, keys - refused):
        factors.setdefault(module, set()).add(factor)
    names = MAPS[family].names
    assert not [module for module in factors if module not in names]

    tensors = {}
    for key in keys:
        module, factor = split(key)
        if module in factors and {"up", "down"} <= factors[module] <= {"up", "down", "alpha"}:
            rows, inputs, *kernel = names[module].target.delta_shape
            shape = {"up": (rows, 1, *(1 for _ in kernel)), "down": (1, inputs, *kernel), "alpha": ()}[factor]
            tensors[key] = torch.zeros(()).expand(shape)
    if tensors:
        landing = land([Entry(from_file(TensorFile("test", tensors)), dict.fromkeys(PARTS, 1.0))], MAPS[family])
        assert not landing.rows[0].refused and not landing.rows[0].unconnected


def test_the_files_are_of_many_origins():
    assert len({file["origin"] for file in FILES}) >= 25
    assert all(file["origin"] and file["seen"] and file["names"] for file in FILES)
