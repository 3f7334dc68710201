"""The ledger: which LoRAs our nodes have put on a MODEL or CLIP, in order of application; it goes along with clones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from torch import Tensor

from ...lora_ops.errors import FileError
from ...lora_ops.files import Identity, identity
from ...lora_ops.landing import Landing, Piece
from ...lora_ops.stack import Schedule
from . import caches

KEY = "lora_ops_ledger"
SOURCE = "lora_ops_source"  # on a merged model: how the host loaded the one before, cached_patcher_init


@dataclass(frozen=True)
class Record:
    """One LoRA on one MODEL or CLIP.

    row is the same for what one row of a stack does to MODEL and to CLIP, and of nothing else. how is "patch", "live",
    "patch and live" (weights differ in how they are stored) or "merged". bytes are those of the factors it keeps.
    """

    row: str
    name: str
    part: str  # "model" or "clip"
    strength: float
    blocks: str
    schedule: Schedule
    how: str
    weights: int
    bytes: int
    file: Identity | None  # what it was read from, None where another node made or changed it

    @property
    def known_hash(self) -> str:
        """The SHA-256 of its file's tensors if it has been computed, else ""."""
        return "" if self.file is None else caches.hash_of(self.file)

    def sha256(self) -> str:
        """The same, computed now if need be; "" where there is no file, or another one by now."""
        try:
            if not self.known_hash and self.file is not None and identity(self.file.path) == self.file:
                caches.tensor_hash(self.file.path)
        except FileError:  # the file is gone
            return ""
        return self.known_hash


def rows_of(landing: Landing) -> tuple[str, ...]:
    """A new row for each of a landing's."""
    return tuple(uuid4().hex for _ in landing.rows)


def recorded(
    landing: Landing,
    rows: Sequence[str],
    part: str,
    patched: Mapping[str, Sequence[Piece]],
    running: Mapping[str, Sequence[Piece]],
) -> Iterable[Record]:
    """The records of what a landing does to a part, by patches and live; rows that do nothing there have none."""
    for number, row in enumerate(landing.rows):
        of_row = [
            {key: mine for key, there in pieces.items() if (mine := [p for p in there if p.entry == number])}
            for pieces in (patched, running)
        ]
        how = " and ".join(word for word, pieces in zip(("patch", "live"), of_row, strict=True) if pieces)
        if how:
            entry = row.entry
            yield Record(
                rows[number],
                entry.lora.name,
                part,
                entry.strengths[part],
                ", ".join(map(str, entry.blocks)),
                entry.schedule if part == "model" else Schedule(),
                how,
                len(of_row[0].keys() | of_row[1].keys()),
                size(piece.adapter.packed() for pieces in of_row for there in pieces.values() for piece in there),
                caches.file_of(entry.lora),
            )


def size(values: Iterable[Any]) -> int:
    """Bytes of all tensors in nested tuples and lists; one that is there twice counts once."""
    found: dict[int, int] = {}

    def walk(value: Any) -> None:
        if isinstance(value, Tensor):
            found[value.data_ptr()] = value.nbytes
        elif isinstance(value, tuple | list):
            for each in value:
                walk(each)

    walk(tuple(values))
    return sum(found.values())


def records(patcher: Any) -> tuple[Record, ...]:
    """The LoRAs of our nodes on a ModelPatcher (of a CLIP: clip.patcher), in order of application."""
    return patcher.get_attachment(KEY) or ()


def add(patcher: Any, more: Iterable[Record]) -> None:
    """Note what was put on a fresh clone."""
    write(patcher, (*records(patcher), *more))


def write(patcher: Any, found: Sequence[Record]) -> None:
    """Make these the records of a fresh clone."""
    patcher.remove_attachments(KEY)
    if found:
        patcher.set_attachments(KEY, tuple(found))
