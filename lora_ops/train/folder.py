"""Folder: a folder of pictures as people keep one to train on, with captions, masks, control pictures and kohya's
repeats."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath

from ..errors import FileError, TrainingError, shown
from ..files.reading import reason
from .captions import SUFFIXES, TABLE, beside, read_caption, read_table

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif")
MASKS, MASK = "masks", "_mask"  # a folder of them, or a name's ending
CONTROLS = re.compile(r"(control)(?:_(\d{1,2}))?", re.IGNORECASE)  # a folder of them; several are control_1, control_2
CONTROL = re.compile(r"(.+)_control(?:_(\d{1,2}))?", re.IGNORECASE)  # or a name beside
LAST = 100  # in their order: those of a folder that is chosen
NUMBERED = re.compile(r"(.+)_(\d{1,2})")  # a name in a folder of them, where one folder holds several of a picture
REPEATED = re.compile(r"(\d{1,4})_(.+)")  # kohya's folders: 10_sks dog


@dataclass(frozen=True)
class Source:
    """A picture's file and what lies beside it. caption is None where nothing tells one; name is its path within the
    folder. controls are the pictures of which an edit makes it."""

    name: str
    path: Path
    caption: str | None = None
    repeats: int = 1
    mask: Path | None = None
    controls: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Folder:
    """What a folder holds, and by name what of it is left out and why."""

    sources: tuple[Source, ...]
    left_out: tuple[tuple[str, str], ...] = ()


def read_folder(folder: Path, controls: Path | None = None) -> Folder:
    """The pictures of a folder: its own, those of its folders named like 10_dog, and those that its table names.

    A picture's caption is in a file beside it, else in the folder's table, else the name of its 10_dog. Its mask is
    NAME_mask.png beside it or NAME.png in a folder masks. Its control pictures are NAME_control.png beside it, NAME.png
    in a folder control and in the folder controls; where there are any, pictures without are left out. Raises FileError
    for a folder or caption that cannot be read, TrainingError for controls of no picture.
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
        if not inside.is_dir() or _is_beside(inside) or inside == controls:
            continue
        if match := REPEATED.fullmatch(inside.name):
            sources += _read(folder, inside, table, left_out, controls, int(match[1]), match[2].strip())
        elif inside.name in named:
            sources += _read(folder, inside, table, left_out, controls)
        else:
            left_out.append((f"{inside.name}/", "a folder that is not named like 10_name, times and caption"))
    sources = [*_read(folder, folder, table, left_out, controls), *sources]
    left_out += _of_no_picture(folder, sources, controls)
    paired = [each for each in sources if each.controls]
    if controls and sources and not paired:
        what = f"'{shown(controls.name)}' holds no control picture for '{shown(folder.name)}'."
        raise TrainingError(what, remedy=f"Call them like the pictures, such as {shown(sources[0].name)} in it.")
    if paired:
        left_out += [(each.name, "no control picture of its name") for each in sources if not each.controls]
    return Folder(tuple(paired or sources), tuple(left_out))


def _read(
    root: Path,
    folder: Path,
    table: Mapping[str, str],
    left_out: list[tuple[str, str]],
    controls: Path | None,
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
    masks, befores = _masks(root, folder, pictures), _controls(root, folder, pictures, controls)
    used = {path for path in (*masks.values(), *chain(*befores.values())) if path.parent == folder} | {folder / TABLE}
    for path in pictures:
        if path in used:
            continue
        name = path.relative_to(root).as_posix()
        text = beside(path)
        if text is not None:
            used.add(text)
            told = read_caption(text)
        else:
            told = own.get(path.name, table.get(name, caption))
        yield Source(name, path, told, repeats, masks.get(path), befores.get(path, ()))
    for path in files:
        name = path.relative_to(root).as_posix()
        if path not in used and path.suffix.lower() in SUFFIXES:
            left_out.append((name, "no picture of this name"))
        elif path not in used and path not in pictures:
            left_out.append((name, "no picture, or of a kind that is not read"))
    if folder != root:
        left_out += [(f"{folder.name}/{each.name}/", "a folder in a folder") for each in _below(folder)]


def _of_no_picture(root: Path, sources: Sequence[Source], chosen: Path | None) -> Iterator[tuple[str, str]]:
    """What is in folders of masks and of control pictures that belongs to none."""
    used = {path for each in sources for path in (each.mask, *each.controls)}
    parents = dict.fromkeys((root, *(each.path.parent for each in sources)))
    places = [place for parent in parents for place in _entries(parent) if place.is_dir() and _is_beside(place)]
    for place in dict.fromkeys((*places, *([chosen] if chosen else ()))):
        what = "mask" if place.name.lower() == MASKS else "control picture"
        for path in sorted({path for parent in parents for path in _entries(place / parent.relative_to(root))}):
            if path.is_file() and path not in used:
                within = root if path.is_relative_to(root) else place.parent
                yield (path.relative_to(within).as_posix(), f"a {what} of no picture")


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


def _controls(root: Path, folder: Path, pictures: Sequence[Path], chosen: Path | None) -> dict[Path, tuple[Path, ...]]:
    """The control pictures of pictures, by picture: those beside it, then those in folders, each by their numbers."""
    stems, within = {path.stem: path for path in pictures}, folder.relative_to(root)
    found: dict[Path, set[tuple[int, int, Path]]] = {}

    def add(path: Path, place: int, stem: str, number: int) -> None:
        if path.suffix.lower() in PICTURES and stems.get(stem, path) != path:
            found.setdefault(stems[stem], set()).add((place, number, path))

    for path in pictures:
        add(path, -1, *_numbered(CONTROL, path.stem))
    places = [(place, place) for place in _entries(folder)] + [(place, place / within) for place in _entries(root)]
    numbered = [(_numbered(CONTROLS, place.name)[1], of) for place, of in places if CONTROLS.fullmatch(place.name)]
    for place, of in (*numbered, *([(LAST, chosen / within)] if chosen else ())):
        for path in _entries(of):
            add(path, place, *((path.stem, 0) if path.stem in stems else _numbered(NUMBERED, path.stem)))
    return {of: tuple(path for *_, path in sorted(each)) for of, each in found.items()}


def _numbered(pattern: re.Pattern[str], name: str) -> tuple[str, int]:
    """Whose a file is by its name, and its number."""
    match = pattern.fullmatch(name)
    return (match[1], int(match[2] or 0)) if match else (name, 0)


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
    return [path for path in _entries(folder) if path.is_dir() and not _is_beside(path)]


def _is_beside(folder: Path) -> bool:
    """Whether a folder is for what belongs to pictures."""
    return folder.name.lower() == MASKS or CONTROLS.fullmatch(folder.name) is not None


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
