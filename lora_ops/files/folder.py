"""A folder of files that appears whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from ..errors import FileError, shown
from .reading import reason
from .writing import TEMPORARY, sync_folder, write, write_synced


def write_folder(
    path: str | os.PathLike[str],
    tensors: Mapping[str, tuple[Mapping[str, Tensor], Mapping[str, str]]],
    texts: Mapping[str, str],
    *,
    overwrite: bool,
) -> None:
    """Write a folder of safetensors files (name -> tensors and metadata, see write) and small texts.

    It is made under a temporary name beside its own and renamed. With overwrite an existing folder is put aside until
    the new one is there; one that holds anything else than these files is refused, for it would be lost.
    Raises FileError like write, with nothing changed.
    """
    final = Path(path)
    unique = f".{final.name[:40]}.{os.getpid()}-{secrets.token_hex(4)}"
    temporary, aside = final.parent / (unique + TEMPORARY), final.parent / f"{unique}.old"
    try:
        _require_replaceable(final, {*tensors, *texts}, overwrite)
        temporary.mkdir()
        try:
            for name, text in texts.items():
                write_synced(temporary / name, [text.encode("utf-8")])
            for name, (content, metadata) in tensors.items():
                write(temporary / name, content, metadata, overwrite=False)
            if final.exists():
                os.rename(final, aside)
            try:
                os.rename(temporary, final)
            except BaseException:
                if aside.exists():
                    os.rename(aside, final)
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        if os.name != "nt":
            sync_folder(final)
        shutil.rmtree(aside, ignore_errors=True)
    except FileError as error:
        error.file = str(path)  # not the temporary one
        raise
    except (OSError, ValueError) as error:
        remedy = "Choose another name." if isinstance(error, FileExistsError) else "Nothing was changed."
        raise FileError(f"cannot be written: {reason(error)}.", file=path, remedy=remedy) from error


def _require_replaceable(final: Path, names: Collection[str], overwrite: bool) -> None:
    if not os.path.lexists(final):
        return
    if not overwrite:
        raise FileExistsError(errno.EEXIST, "exists already")
    if final.is_symlink() or not final.is_dir():
        raise FileExistsError(errno.EEXIST, "exists already and is no folder")
    if foreign := sorted(entry.name for entry in final.iterdir() if entry.name not in names):
        raise FileExistsError(errno.EEXIST, f"exists already and holds other files ({shown(foreign[0])})")
