"""Telling: what a data set holds, as JSON has it and as a person reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import shown

NAMES = 8  # of pictures in a line, reasons among what is left out
BUCKETS = 6


def text(report: Mapping[str, Any]) -> str:
    return "\n".join(_lines(report))


def _lines(report: Mapping[str, Any]) -> Iterator[str]:
    found = f"{shown(report['source'])}: {_count(report['pictures'], 'picture')} to learn from"
    found += f", {report['held_out']} held out" if report["held_out"] else ""
    found += f", {report['regularisation']} for regularisation" if report["regularisation"] else ""
    epoch = report["epoch"]
    yield found + (f"; an epoch is {epoch}" if epoch != report["pictures"] + report["regularisation"] else "")
    if report["resolutions"]:
        resolutions = " and ".join(map(str, report["resolutions"])) + (" (auto)" if report["auto"] else "")
        yield f"resolution {resolutions}: {_buckets(report['buckets'])}"
    if (captions := report["captions"]) is not None:
        yield _captions(captions)
    details = [f"{report['masks']} with a mask"] if report["masks"] else []
    details += [f"{controls} with control pictures"] if (controls := report["controls"]) else []
    details += ["the mirror images too"] if report["mirrored"] else []
    details += [f"captions left out {report['dropout']:.0%} of the time"] if report["dropout"] else []
    if details:
        yield ", ".join(details)
    (pictures, of), (texts, all_texts) = report["kept"]["latents"], report["kept"]["texts"]
    if pictures or texts:
        yield f"from the cache: {pictures} of {of} latents, {texts} of {all_texts} texts"
    if report["small"]:
        every = len(report["small"]) == report["pictures"] + report["held_out"] + report["regularisation"]
        yield f"smaller than the resolution, used as they are: {'all' if every else _names(report['small'])}"
    if report["cropped"]:
        yield f"over a quarter is cut off of: {_names(report['cropped'])}"
    yield from report["notes"]
    left_out = report["left_out"]
    if left_out:
        yield f"left out: {len(left_out)}"
        yield from (f" {shown(name)}: {shown(why, 300)}" for name, why in left_out[:NAMES])
        if len(left_out) > NAMES:
            yield f" and {len(left_out) - NAMES} more"


def _captions(captions: Mapping[str, Any]) -> str:
    found = f"captions: {captions['written']}"
    without = captions["without"]
    if not without:
        return found
    instead = f"“{shown(captions['trigger'], 40)}”" if captions["trigger"] else "no text"
    return f"{found}; without one, learned with {instead}: {_names(without)}"


def _buckets(buckets: Sequence[tuple[str, int]]) -> str:
    told = ", ".join(f"{count} of {size}" for size, count in buckets[:BUCKETS])
    more = len(buckets) - BUCKETS
    return f"{told}, {_count(more, 'more size')}" if more > 0 else told


def _names(names: Sequence[str]) -> str:
    told = ", ".join(map(shown, names[:NAMES]))
    return f"{told} and {len(names) - NAMES} more" if len(names) > NAMES else told


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
