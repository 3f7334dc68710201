"""A folder of files that appears whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from ..errors import shown
from .syncing import CHUNK, write_synced
from .writing import (
    Lazy,
    Progress,
    laid,
    meter,
    published_numbered,
    require_room,
    sweep,
    sync_folder,
    temporary_of,
    told_of,
    write_laid,
)

Files = Mapping[str, tuple[Mapping[str, Tensor | Lazy], Mapping[str, str]]]  # name -> tensors and metadata


def write_folder(
    path: str | os.PathLike[str],
    tensors: Files,
    texts: Mapping[str, str],
    copies: Mapping[str, Path] | None = None,
    *,
    overwrite: bool,
    progress: Progress | None = None,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write a folder of safetensors files, small texts, and copies of other files; a name may have folders in it.

    It is made under a temporary name beside its own and renamed. With overwrite an existing folder stays until the new
    one is there; one that holds anything else than these files is refused, for it would be lost. progress and check
    are those of write; check gets the temporary folder.
    Raises FileError like write, with nothing changed.
    """
    final = Path(path)
    with told_of(path):
        _require_replaceable(final, {*tensors, *texts, *(copies or ())}, overwrite)
        with _written(final, tensors, texts, copies or {}, progress, check) as temporary:
            _publish(temporary, final, overwrite)


def write_folder_numbered(
    path_of: Callable[[int], Path],
    tensors: Files,
    texts: Mapping[str, str],
    copies: Mapping[str, Path] | None = None,
    *,
    first: int = 1,
    progress: Progress | None = None,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Write a folder like write_folder, under the first name that is free, and return it: see write_numbered."""
    with (
        told_of(path_of(first)),
        _written(path_of(first), tensors, texts, copies or {}, progress, check) as temporary,
    ):
        return published_numbered(path_of, first, lambda final: _publish(temporary, final, overwrite=False))


@contextmanager
def _written(
    final: Path,
    tensors: Files,
    texts: Mapping[str, str],
    copies: Mapping[str, Path],
    progress: Progress | None,
    check: Callable[[Path], None] | None,
) -> Iterator[Path]:
    sweep(final.parent)
    contents = {name: laid(*content, final / name) for name, content in tensors.items()}
    copied = sum(path.stat().st_size for path in copies.values())
    require_room(sum(content.size for content in contents.values()) + copied, final)
    work = sum(content.work for content in contents.values()) + 2 * copied
    more, temporary = meter(work, progress), temporary_of(final)
    temporary.mkdir()
    try:
        for name in (*contents, *texts, *copies):
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_synced(temporary / name, [text.encode("utf-8")], final)
        for name, source in copies.items():
            write_synced(temporary / name, _chunks(source), final, more)
        for name, content in contents.items():
            write_laid(temporary / name, content, final / name, more)
        if os.name != "nt":
            for folder, _, _ in os.walk(temporary):
                sync_folder(Path(folder) / "any")
        if check:
            check(temporary)
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _chunks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def _publish(temporary: Path, final: Path, overwrite: bool) -> None:
    """Give a folder its name; an old one is in its place until then, and afterwards under the temporary name."""
    if not overwrite or not os.path.lexists(final):
        try:
            os.rename(temporary, final)
        except OSError as error:
            if error.errno == errno.ENOTEMPTY:
                raise FileExistsError(errno.EEXIST, "exists already") from error
            raise
    elif not _exchanged(temporary, final):
        aside = temporary.with_suffix(".old")
        os.rename(final, aside)
        try:
            os.rename(temporary, final)
        except BaseException:
            os.rename(aside, final)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    if os.name != "nt":
        sync_folder(final)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two names in one step, where the system can (Linux, most file systems): a kill leaves no gap."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and not rename(-100, os.fsencode(one), -100, os.fsencode(other), 2)


def _require_replaceable(final: Path, names: set[str], overwrite: bool) -> None:
    if not os.path.lexists(final):
        return
    if not overwrite:
        raise FileExistsError(errno.EEXIST, "exists already")
    if final.is_symlink() or not final.is_dir():
        raise FileExistsError(errno.EEXIST, "exists already and is no folder")
    there = (path for path in final.rglob("*") if path.is_symlink() or not path.is_dir())
    if foreign := sorted(name for path in there if (name := path.relative_to(final).as_posix()) not in names):
        raise FileExistsError(errno.EEXIST, f"exists already and holds other files ({shown(foreign[0])})")
