"""Captions: the texts that pictures come with, as files beside them tell and as training draws them."""

from __future__ import annotations

import json
import random
from pathlib import Path, PurePosixPath

from ..errors import FileError, shown
from ..files import read_text

SUFFIXES = (".txt", ".caption")  # beside a picture, under its name; the first that is there
TABLE = "metadata.jsonl"  # of a folder: a JSON object a line, file_name and text
LIMIT, TABLE_LIMIT = 1 << 20, 64 << 20  # bytes


def beside(picture: Path) -> Path | None:
    """The file that has a picture's caption: a.txt or a.png.txt for a.png."""
    names = [name for suffix in SUFFIXES for name in (picture.with_suffix(suffix), Path(f"{picture}{suffix}"))]
    return next((name for name in names if name.is_file()), None)


def read_caption(file: Path) -> str:
    """A caption as one line. Raises FileError for what is no UTF-8 text."""
    return " ".join(read_text(file, LIMIT).split())


def read_table(folder: Path) -> dict[str, str]:
    """The captions that a folder's table has, by the pictures' names within the folder, with forward slashes.

    Raises FileError, naming the line, for one that is no JSON object with file_name and text.
    """
    file = folder / TABLE
    if not file.is_file():
        return {}
    found: dict[str, str] = {}
    for number, line in enumerate(read_text(file, TABLE_LIMIT).splitlines(), 1):
        if line.strip():
            name, text = _row(line, number, file)
            found[PurePosixPath(name.replace("\\", "/")).as_posix()] = " ".join(text.split())
    return found


def _row(line: str, number: int, file: Path) -> tuple[str, str]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    name, text = (row.get("file_name"), row.get("text", row.get("caption"))) if isinstance(row, dict) else (None, None)
    if not isinstance(name, str) or not isinstance(text, str):
        what = f'line {number} is not like {{"file_name": "a.png", "text": "a caption"}}: {shown(line, 60)}'
        raise FileError(what, file=file, remedy="Correct that line.", line=number)
    return name, text


def triggered(caption: str, trigger: str) -> str:
    """A caption that holds the trigger word, put before it where it is not in it yet."""
    if not trigger or trigger.casefold() in caption.casefold():
        return caption
    return f"{trigger}, {caption}" if caption else trigger


def orders(caption: str, count: int, keep: int) -> tuple[str, ...]:
    """A caption, and as many others as there are up to count, whose tags (between commas) come in another order; the
    first keep tags stay in place. Nothing but the caption decides."""
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    first, rest = tags[:keep], tags[keep:]
    found = {caption: None}
    draw = random.Random(caption)
    for _ in range(4 * count if len(rest) > 1 else 0):
        if len(found) >= count:
            break
        draw.shuffle(rest)
        found[", ".join([*first, *rest])] = None
    return tuple(found)
