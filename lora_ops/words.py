"""Trigger words: what a LoRA answers to, from its metadata or from the files beside it, and which of them said so."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import FileError, shown
from .files import read_text

PHRASE = "modelspec.trigger_phrase"
CAPTIONS = "ss_tag_frequency"
FIELDS = ("trained_words", "trigger_words", "ss_trigger_words", "activation text")  # other tools' metadata
OFTEN = 0.8  # share of a folder's pictures that must carry a caption tag for it to count as a trigger

SIDECARS = (".civitai.info", ".json", ".txt")
SIDECAR_FIELDS = ("trainedWords", "trained words", "trained_words", "activation text", "trigger words", "trigger_words")
SIDECAR_BYTES = 1 << 20
TEXT_CHARACTERS, TEXT_LINES = 1_000, 5  # beyond these a .txt is a caption or a readme


@dataclass(frozen=True)
class TriggerWords:
    """Words, the metadata field or sidecar that has them ("": none), and the sidecars that could not be used."""

    words: tuple[str, ...] = ()
    source: str = ""
    faults: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """For people: the words and their source, then the faults."""
        told = f"{shown(joined(self.words))} (from {self.source})" if self.words else "none"
        return "\n".join([told, *self.faults])


def joined(words: Iterable[str]) -> str:
    """Trigger words as a prompt takes them, each once."""
    return ", ".join(dict.fromkeys(words))


def trigger_words(metadata: Mapping[str, str], path: str | None = None) -> TriggerWords:
    """The trigger words of a LoRA with this metadata, and beside it if it is a file.

    The first that has any: what its author wrote (`modelspec.trigger_phrase`), what its captions tell, what other tools
    wrote, `.civitai.info`, `.json`, `.txt`. A sidecar that cannot be read is a fault in the result, not an error.
    """
    for field, words in (
        (PHRASE, _listed(metadata.get(PHRASE))),
        (CAPTIONS, _captioned(metadata)),
        *((field, _listed(metadata.get(field))) for field in FIELDS),
    ):
        if words:
            return TriggerWords(words, field)
    faults: list[str] = []
    for sidecar in sidecars(path) if path else ():
        name = shown(Path(sidecar).name)
        try:
            if words := _read(Path(sidecar)):
                return TriggerWords(words, name, tuple(faults))
        except FileError as error:
            faults.append(f"{name} {error.what}")
    return TriggerWords(faults=tuple(faults))


def sidecars(path: str) -> list[str]:
    """The files that may lie beside a LoRA to tell its trigger words."""
    return [str(Path(path).with_suffix(suffix)) for suffix in SIDECARS]


def _read(sidecar: Path) -> tuple[str, ...]:
    """Raises FileError for a file that is there and cannot be read as what its extension says."""
    if not os.path.exists(sidecar):  # also where its name is longer than the file system allows
        return ()
    text = read_text(sidecar, SIDECAR_BYTES)
    if sidecar.suffix == ".txt":
        if len(text) > TEXT_CHARACTERS or len(text.strip().splitlines()) > TEXT_LINES:
            raise FileError("is too long for trigger words.", file=sidecar)
        return _listed(text)
    table = _table(text)
    if table is None:
        raise FileError("is no JSON object.", file=sidecar)
    return next(filter(None, (_listed(table.get(field)) for field in SIDECAR_FIELDS)), ())


def _listed(value: object) -> tuple[str, ...]:
    """The words of a text with commas or of a list of such texts."""
    texts: Sequence[object] = value if isinstance(value, list) else [value]
    words = (word.strip() for text in texts if isinstance(text, str) for word in re.split(r"[,\r\n]", text))
    return tuple(dict.fromkeys(word for word in words if word))


def _captioned(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The tags that nearly every picture of a folder carries; without such a tag the folder's own name, which
    DreamBooth training uses as the caption ("10_sks dog")."""
    found: dict[str, None] = {}
    folders = _table(metadata.get("ss_dataset_dirs")) or {}
    for folder, tags in (_table(metadata.get(CAPTIONS)) or {}).items():
        counts = {tag.strip(): _count(n) for tag, n in tags.items()} if isinstance(tags, dict) else {}
        pictures = _pictures(folders.get(folder)) or max(counts.values(), default=0)
        often = [tag for tag, count in counts.items() if tag and count and count >= OFTEN * pictures]
        found.update(dict.fromkeys(often or [re.sub(r"^\d+_", "", folder)]))
    return tuple(word for word in found if word)


def _pictures(entry: object) -> int:
    return _count(entry.get("img_count")) if isinstance(entry, dict) else 0


def _count(value: object) -> int:
    """A number of pictures, 0 for what can be none."""
    return value if isinstance(value, int) and 0 <= value < 2**63 else 0


def _table(text: str | None) -> Mapping[str, Any] | None:
    """A JSON object, None for what is none."""
    try:
        value = json.loads(text or "")
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
