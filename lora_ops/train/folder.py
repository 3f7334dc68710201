"""Folder: a folder of pictures as people keep one to train on, with captions, masks and kohya's repeats."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..errors import FileError, TrainingError, shown
from ..files.reading import reason
from .captions import SUFFIXES, TABLE, beside, read_caption, read_table

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif")
MASKS, MASK = "masks", "_mask"  # a folder of them, or a name's ending
CONTROLS, CONTROL = "control", "_control"  # of edit pairs
REPEATED = re.compile(r"(\d{1,4})_(.+)")  # kohya's folders: 10_sks dog


@dataclass(frozen=True)
class Source:
    """A picture's file and what lies beside it. caption is None where nothing tells one; name is its path within the
    folder."""

    name: str
    path: Path
    caption: str | None = None
    repeats: int = 1
    mask: Path | None = None


@dataclass(frozen=True)
class Folder:
    """What a folder holds, and by name what of it is left out and why."""

    sources: tuple[Source, ...]
    left_out: tuple[tuple[str, str], ...] = ()


def read_folder(folder: Path) -> Folder:
    """The pictures of a folder: its own, those of its folders named like 10_dog, and those that its table names.

    A picture's caption is in a file beside it, else in the folder's table, else the name of its 10_dog. Its mask is
    NAME_mask.png beside it or NAME.png in a folder masks. Raises FileError for a folder or caption that cannot be read,
    TrainingError for edit pairs.
    """
    table = read_table(folder)
    sources: list[Source] = []
    left_out: list[tuple[str, str]] = []
    named = {PurePosixPath(name).parts[0] for name in table if len(PurePosixPath(name).parts) == 2}
    for name in sorted({PurePosixPath(name).as_posix() for name in table}):
        if ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute() or ":" in name:
            left_out.append((name, f"{TABLE} names it, but it is outside of the folder"))
        elif not (folder / name).is_file():
            left_out.append((name, f"{TABLE} names it, but it is not there"))
    for inside in sorted(_entries(folder)):
        if not inside.is_dir() or inside.name.lower() == MASKS:
            continue
        if _is_controls(inside):
            raise _pairs(inside.name)
        if match := REPEATED.fullmatch(inside.name):
            sources += _read(folder, inside, table, left_out, int(match[1]), match[2].strip())
        elif inside.name in named:
            sources += _read(folder, inside, table, left_out)
        else:
            left_out.append((f"{inside.name}/", "a folder that is not named like 10_name, times and caption"))
    return Folder((*_read(folder, folder, table, left_out), *sources), tuple(left_out))


def _read(
    root: Path,
    folder: Path,
    table: Mapping[str, str],
    left_out: list[tuple[str, str]],
    repeats: int = 1,
    caption: str | None = None,
) -> Iterator[Source]:
    """The pictures of one folder, those below it left alone. Adds to left_out what is none."""
    if repeats == 0:
        left_out.append((f"{folder.name}/", "its name says 0 times"))
        return
    own = read_table(folder) if folder != root else {}
    files = sorted(path for path in _entries(folder) if not path.is_dir())
    pictures = [path for path in files if path.suffix.lower() in PICTURES]
    stems = {path.stem for path in pictures}
    masks = _masks(root, folder, pictures)
    used = {path for path in masks.values() if path.parent == folder} | {folder / TABLE}
    for path in pictures:
        if path.stem.lower().endswith(CONTROL) and path.stem[: -len(CONTROL)] in stems:
            raise _pairs(path.name)
        if path in used:
            continue
        name = path.relative_to(root).as_posix()
        text = beside(path)
        if text is not None:
            used.add(text)
            told = read_caption(text)
        else:
            told = own.get(path.name, table.get(name, caption))
        yield Source(name, path, told, repeats, masks.get(path))
    for path in files:
        name = path.relative_to(root).as_posix()
        if path not in used and path.suffix.lower() in SUFFIXES:
            left_out.append((name, "no picture of this name"))
        elif path not in used and path not in pictures:
            left_out.append((name, "no picture, or of a kind that is not read"))
    if folder != root:
        left_out += [(f"{folder.name}/{each.name}/", "a folder in a folder") for each in _below(folder)]
    every = {path for place in {folder / MASKS, root / MASKS} for path in _entries(place)} if folder == root else set()
    left_out += [
        (path.relative_to(root).as_posix(), "a mask of no picture")
        for path in sorted(every)
        if path.is_file() and path not in masks.values()
    ]


def _masks(root: Path, folder: Path, pictures: Sequence[Path]) -> dict[Path, Path]:
    """The masks of pictures, by picture."""
    stems = {path.stem: path for path in pictures}
    found: dict[Path, Path] = {}
    for path in pictures:
        of = stems.get(path.stem[: -len(MASK)]) if path.stem.lower().endswith(MASK) else None
        if of is not None:
            found[of] = path
    for place in (folder / MASKS, root / MASKS / folder.relative_to(root)):
        for mask in _entries(place):
            if mask.suffix.lower() in PICTURES and mask.stem in stems:
                found.setdefault(stems[mask.stem], mask)
    return found


def _entries(folder: Path) -> list[Path]:
    """What is in a folder, but for hidden files; nothing where there is none."""
    try:
        return [path for path in folder.iterdir() if not path.name.startswith(".") and path.name not in _SYSTEM]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError) as error:
        raise FileError(f"cannot be read: {reason(error)}.", file=folder, remedy="Check its rights.") from error


_SYSTEM = ("Thumbs.db", "desktop.ini", "__MACOSX")


def _below(folder: Path) -> list[Path]:
    return [path for path in _entries(folder) if path.is_dir() and path.name.lower() != MASKS]


def _is_controls(folder: Path) -> bool:
    """Whether a folder holds the other halves of pairs: pictures of the same names."""
    if folder.name.lower() != CONTROLS:
        return False
    stems = {path.stem for path in _entries(folder.parent) if path.suffix.lower() in PICTURES}
    return any(path.stem in stems for path in _entries(folder))


def _pairs(name: str) -> TrainingError:
    return TrainingError(
        f"'{shown(name)}' holds control pictures: pairs of pictures, before and after an edit, are not trained yet.",
        remedy="Take the control pictures out to train on the others alone.",
    )


def fingerprint(folder: Path) -> list[tuple[str, int, int]]:
    """What tells a changed folder: name, size and time of every file down to where pictures are looked for."""
    found: list[tuple[str, int, int]] = []
    for depth in ("*", "*/*", "*/*/*"):
        for path in folder.glob(depth):
            try:
                state = path.stat()
            except OSError:
                continue
            found.append(
                (path.relative_to(folder).as_posix(), state.st_size if path.is_file() else -1, state.st_mtime_ns)
            )
    return sorted(found)
