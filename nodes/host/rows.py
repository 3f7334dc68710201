"""Rows of a stack as the LoRAs that they name on this disk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ...lora_ops.select import parse_selectors
from ...lora_ops.stack import Entry, Row
from . import caches, names
from .caches import Loaded
from .names import Found


class OnDisk(NamedTuple):
    """Row for row: the file that is meant, what was read of it, and the entry of the stack."""

    meant: Sequence[Found]
    loaded: Sequence[Loaded]
    entries: Sequence[Entry]


def on_disk(rows: Sequence[Row]) -> OnDisk:
    """Raises FileError for a name that means no file or several, and what reading it raises."""
    meant = [names.find(row.name, row.sha256) for row in rows]
    loaded = [caches.load(each.name, each.path) for each in meant]
    entries = [
        Entry(
            each.lora,
            row.strengths,
            row.schedule,
            parse_selectors(row.blocks),
            found.asked,
            caches.differs(each.path, row.sha256),
        )
        for row, found, each in zip(rows, meant, loaded, strict=True)
    ]
    return OnDisk(meant, loaded, entries)
