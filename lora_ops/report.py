"""Report: what a LoRA file is, without a model: family, dialect, modules, ranks, trigger words, metadata."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import shown
from .landing import guess, land
from .lora import Lora
from .receipt import TITLES, by_reason, most, numbers
from .stack import PARTS, Entry

METADATA_SHOWN = 2_000  # characters of one metadata value in a report
EXPLICIT = (
    "modelspec.trigger_phrase",
    "trigger_words",
    "ss_trigger_words",
    "activation text",
    "trained_words",
)
OFTEN = 0.8  # share of a folder's pictures that must carry a caption tag for it to count as a trigger


@dataclass(frozen=True)
class Report:
    """What a file is, as data (for JSON) and as text."""

    data: Mapping[str, Any]
    text: str


def report(lora: Lora) -> Report:
    """What a LoRA says about itself and what it looks made for."""
    likely = guess(lora)
    landing = None if likely is None else land([Entry(lora, dict.fromkeys(PARTS, 1.0))], likely)
    named = () if likely is None else [likely.names[name] for name in lora.modules if name in likely.names]
    parts = {part: sum(there.target.part == part for there in named) for part in PARTS}
    words = trigger_words(lora.metadata)
    data = {
        "version": 1,
        "lora": lora.name,
        "family": likely.family if likely else None,
        "dialect": most(there.dialect for there in named),
        "modules": len(lora.modules),
        "parts": {part: count for part, count in parts.items() if count},
        "fits_published_model": len(landing.rows[0].landed) if landing else 0,
        **numbers(lora, lora.modules),
        "unread": by_reason(lora.leftover),
        "trigger_words": words,
        "metadata": {shown(key): _cut(value) for key, value in sorted(lora.metadata.items())},
    }
    return Report(data, "\n".join(_lines(data)))


def _lines(data: Mapping[str, Any]) -> list[str]:
    family = TITLES.get(data["family"], "no family this version knows")
    parts = ", ".join(f"{part} {count}" for part, count in data["parts"].items())
    lines = [
        shown(data["lora"]),
        f"made for {family}; names: {data['dialect'] or 'no known dialect'}",
        f"{data['modules']} modules{f' ({parts})' if parts else ''}; {', '.join(data['algebra'])}",
        f"rank {', '.join(data['rank'])}; scale {', '.join(data['scale'])}, alpha from: {', '.join(data['alpha'])}",
    ]
    if data["trigger_words"]:
        lines.append(f"trigger words: {shown(', '.join(data['trigger_words']))}")
    lines += [f"{group['count']} unread: {group['reason']} (first: {group['first'][0]})" for group in data["unread"]]
    return lines


def trigger_words(metadata: Mapping[str, str]) -> list[str]:
    """The words that a LoRA answers to: as its author wrote them, else as its captions tell.

    Captions (kohya's `ss_tag_frequency`): the tags that nearly every picture of a folder carries; without
    such a tag the folder's own name, which DreamBooth training uses as the caption ("10_sks dog").
    """
    for key in EXPLICIT:
        if words := [word.strip() for word in metadata.get(key, "").split(",") if word.strip()]:
            return words
    found: dict[str, None] = {}
    for folder, tags in _table(metadata.get("ss_tag_frequency")).items():
        counts = {tag.strip(): n for tag, n in tags.items() if isinstance(n, int)} if isinstance(tags, dict) else {}
        pictures = _pictures(metadata, folder) or max(counts.values(), default=0)
        often = [tag for tag, count in counts.items() if tag and count >= OFTEN * pictures]
        found.update(dict.fromkeys(often or [re.sub(r"^\d+_", "", folder)]))
    return [word for word in found if word]


def _pictures(metadata: Mapping[str, str], folder: str) -> int:
    entry = _table(metadata.get("ss_dataset_dirs")).get(folder)
    count = entry.get("img_count") if isinstance(entry, dict) else None
    return count if isinstance(count, int) else 0


def _table(text: str | None) -> Mapping[str, Any]:
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _cut(value: str) -> str:
    return value if len(value) <= METADATA_SHOWN else f"{value[:METADATA_SHOWN]}… ({len(value):,} characters)"


def joined(words: Sequence[str]) -> str:
    """Trigger words as a prompt takes them."""
    return ", ".join(words)
