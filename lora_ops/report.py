"""Report: what a LoRA file is, without a model: family, dialect, modules, ranks, trigger words, metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import shown
from .landing import guess, land
from .lora import Lora
from .receipt import TITLES, by_reason, figures, most, numbers
from .stack import PARTS, Entry
from .words import TriggerWords

METADATA_SHOWN = 2_000  # characters of one metadata value in a report


@dataclass(frozen=True)
class Report:
    """What a file is, as data (for JSON) and as text."""

    data: Mapping[str, Any]
    text: str


def report(lora: Lora, words: TriggerWords, asked: str = "") -> Report:
    """What a LoRA says about itself and what it looks made for; asked is the name asked for, if that is another."""
    likely = guess(lora)
    landing = None if likely is None else land([Entry(lora, dict.fromkeys(PARTS, 1.0))], likely)
    named = () if likely is None else [likely.names[name] for name in lora.modules if name in likely.names]
    parts = {part: sum(there.target.part == part for there in named) for part in PARTS}
    data = {
        "version": 1,
        "lora": lora.name,
        "asked": asked or None,
        "family": likely.family if likely else None,
        "dialect": most(there.dialect for there in named),
        "modules": len(lora.modules),
        "parts": {part: count for part, count in parts.items() if count},
        "fits_published_model": len(landing.rows[0].landed) if landing else 0,
        **numbers(lora, lora.modules),
        "unread": by_reason(lora.leftover),
        "trigger_words": list(words.words),
        "trigger_words_from": words.source,
        "trigger_words_faults": list(words.faults),
        "metadata": {shown(key): _cut(value) for key, value in sorted(lora.metadata.items())},
    }
    return Report(data, "\n".join([*_lines(data), f"trigger words: {words.text}"]))


def _lines(data: Mapping[str, Any]) -> list[str]:
    family = TITLES.get(data["family"], "no family this version knows")
    parts = ", ".join(f"{part} {count}" for part, count in data["parts"].items())
    lines = [
        shown(data["lora"]),
        *([f"asked for as {shown(data['asked'])}"] if data["asked"] else []),
        f"made for {family}; names: {data['dialect'] or 'no known dialect'}",
        f"{data['modules']} modules{f' ({parts})' if parts else ''}; {figures(data)}",
    ]
    lines += [
        f"{group['count']} unread: {group['reason']} (first: {group['first'][0]}). {group['remedy']}"
        for group in data["unread"]
    ]
    return lines


def _cut(value: str) -> str:
    return value if len(value) <= METADATA_SHOWN else f"{value[:METADATA_SHOWN]}… ({len(value):,} characters)"
