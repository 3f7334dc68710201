"""The one atomic writer of safetensors files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from ..errors import FileError
from .format import DTYPE_NAMES
from .reading import read_header, reason, sha256

ORPHAN_AGE = 86_400.0  # seconds after which a temporary file of a killed writer is removed
TEMPORARY = ".lora_ops_tmp"


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    overwrite: bool,
) -> None:
    """Write a safetensors file so that the final name holds the old file or the whole new one, never less.

    Temporary file in the same folder, fsync, reopened and compared byte for byte, renamed, folder synced.
    The same tensors and metadata give the same bytes. Without overwrite an existing file is never touched.
    Raises FileError, with nothing left behind, if there is no room, no right, or the file reads back wrong.
    """
    final = Path(path)
    try:
        _sweep(final.parent)
        head, names = _head(tensors, metadata or {}, final)
        needed = len(head) + sum(tensors[name].nbytes for name in names)
        free = shutil.disk_usage(final.parent).free
        if free < needed:
            raise FileError(
                f"needs {needed:,} bytes, the disk has {free:,}.",
                file=path,
                remedy="Free some room.",
                needed=needed,
                free=free,
            )
        if not overwrite and final.exists():
            raise FileExistsError(errno.EEXIST, "exists already")
        temporary = final.parent / f".{final.name[:40]}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY}"
        try:
            digest = write_synced(temporary, chain([head], (_bytes(tensors[name]) for name in names)))
            _compare(temporary, digest, tensors, path)
            _publish(temporary, final, overwrite)
        finally:
            with suppress(FileNotFoundError):
                temporary.unlink()
    except (OSError, ValueError) as error:  # ValueError: a NUL or a lone surrogate in a name or in metadata
        remedy = "Choose another name." if isinstance(error, FileExistsError) else "Nothing was changed."
        raise FileError(f"cannot be written: {reason(error)}.", file=path, remedy=remedy) from error


def _head(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> tuple[bytes, list[str]]:
    """The file's first bytes, and the tensors' names in the order of their bytes: widest dtype first, so that
    every tensor is aligned, then by name, so that the same tensors give the same bytes."""
    if sys.byteorder != "little":
        raise FileError("cannot be written on a big-endian machine.", file=path)
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    fields: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in DTYPE_NAMES:
            remedy = "Convert it to a float type."
            raise FileError(f"cannot hold a tensor of {tensor.dtype}.", file=path, module=name, remedy=remedy)
        offsets = [position, position + tensor.nbytes]
        fields[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        position = offsets[1]
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, names


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # pyright: ignore[reportArgumentType]  Buffer is a protocol only from 3.12


def write_synced(path: Path, chunks: Iterable[bytes | memoryview]) -> str:
    """Write a new file and wait until it is on the disk; returns its SHA-256."""
    digest = hashlib.sha256()
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0), 0o666)
    with open(descriptor, "wb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # so that the comparison reads the disk, not this write's cache
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return digest.hexdigest()


def _compare(temporary: Path, digest: str, tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    different = FileError("reads back differently from what was written.", file=path, remedy="Check the disk.")
    if sha256(temporary) != digest:
        raise different
    try:
        header = read_header(temporary)
    except FileError as error:  # not the disk's fault: names or metadata that no safetensors file may have
        what = f"cannot be written, the reader would refuse it: {error.what}"
        raise FileError(what, file=path, remedy="Nothing was changed.") from error
    same = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        name: (entry.dtype, entry.shape) for name, entry in header.entries.items()
    }
    if not same:
        raise different


def _publish(temporary: Path, final: Path, overwrite: bool) -> None:
    if overwrite:
        with suppress(FileNotFoundError):
            os.chmod(temporary, final.stat().st_mode & 0o7777)
        os.replace(temporary, final)
    elif os.name == "nt":
        os.rename(temporary, final)  # refuses an existing target there
    else:
        try:
            os.link(temporary, final)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links: reserve the name, then replace the reservation
            os.close(os.open(final, os.O_CREAT | os.O_EXCL, 0o666))
            try:
                os.replace(temporary, final)
            except BaseException:
                final.unlink()
                raise
    if os.name != "nt":
        sync_folder(final)


def sync_folder(final: Path) -> None:
    """Wait until the new name is on the disk, where the file system can sync a folder (vboxsf and others cannot)
    and the user may open it; the file is in its place already, so no error here may say that nothing was changed."""
    try:
        folder = os.open(final.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.EACCES):
            what = f"is written, but the disk has not confirmed its name: {reason(error)}."
            raise FileError(what, file=final, remedy="Check the disk.") from error


def _sweep(folder: Path) -> None:
    """Remove what killed writers left: our temporary files and folders of more than a day ago."""
    for orphan in folder.glob(f".*{TEMPORARY}"):
        with suppress(OSError):
            if time.time() - orphan.stat().st_mtime > ORPHAN_AGE:
                shutil.rmtree(orphan) if orphan.is_dir() else orphan.unlink()
