"""The one atomic writer of safetensors files."""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import FileError, shown
from .format import DTYPE_NAMES
from .reading import is_finite, read_header, reason
from .syncing import CHUNK, write_synced

ORPHAN_AGE = 86_400.0  # seconds after which a temporary file of a killed writer is removed
TEMPORARY = ".lora_ops_tmp"


@dataclass(frozen=True, eq=False)
class Lazy:
    """A tensor that is made when it is written.

    chunks gives consecutive blocks of its rows, in order, of its dtype, on any device; what is given is not written to
    again: it goes to the disk while the next one is made. kept: the values are a file's own, whatever they are. before:
    bytes that are gone through until its first block is made, which progress counts.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[Tensor]]
    kept: bool = False
    before: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


Progress = Callable[[int, int], None]  # (bytes done, bytes in all); what it raises cancels the writing


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor | Lazy],
    metadata: Mapping[str, str] | None = None,
    *,
    overwrite: bool,
    progress: Progress | None = None,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write a safetensors file so that the final name holds the old file or the whole new one, never less.

    Temporary file in the same folder, fsync, reopened and compared byte for byte, renamed, folder synced.
    The same tensors and metadata give the same bytes. Without overwrite an existing file is never touched.
    progress hears at least every 16 MB; every byte counts twice, written and read back, and Lazy.before once. check
    gets the temporary file when it has read back right; what it raises, like anything else, leaves nothing behind.
    Raises FileError, with nothing left behind, if there is no room, no right, the file reads back wrong, or a tensor
    holds NaN or Inf that no file held before (see Lazy.kept).
    """
    final = Path(path)
    with (
        told_of(path),
        _written(final, tensors, metadata, progress, check, taken=not overwrite and final.exists()) as temporary,
    ):
        _publish(temporary, final, overwrite)


def write_numbered(
    path_of: Callable[[int], Path],
    tensors: Mapping[str, Tensor | Lazy],
    metadata: Mapping[str, str] | None = None,
    *,
    first: int = 1,
    progress: Progress | None = None,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Write a file like write, under the first name that is free, and return it: path_of(first), path_of(first + 1), …

    All of them are of one folder. A name that another process takes meanwhile is passed over; nothing is written again.
    """
    with told_of(path_of(first)), _written(path_of(first), tensors, metadata, progress, check) as temporary:
        return published_numbered(path_of, first, lambda final: _publish(temporary, final, overwrite=False))


def published_numbered(path_of: Callable[[int], Path], first: int, publish: Callable[[Path], None]) -> Path:
    """The first of these names under which publish does not meet a FileExistsError."""
    for number in count(first):
        final = path_of(number)
        if not os.path.lexists(final):
            with suppress(FileExistsError):
                publish(final)
                return final
    raise AssertionError  # numbers end never


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text, whole or not at all, over what was there. Raises FileError."""
    final = Path(path)
    with told_of(path):
        temporary = temporary_of(final)
        try:
            write_synced(temporary, [text.encode()], final)
            _publish(temporary, final, overwrite=True)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def told_of(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors of the system, told of this file or folder."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a NUL or a lone surrogate in a name or in metadata
        remedy = "Choose another name." if isinstance(error, FileExistsError) else "Nothing was changed."
        raise FileError(f"cannot be written: {reason(error)}.", file=path, remedy=remedy) from error


@contextmanager
def _written(
    final: Path,
    tensors: Mapping[str, Tensor | Lazy],
    metadata: Mapping[str, str] | None,
    progress: Progress | None,
    check: Callable[[Path], None] | None,
    *,
    taken: bool = False,
) -> Iterator[Path]:
    """A temporary file beside the final one that holds it all and was read back right; gone at the end."""
    sweep(final.parent)
    content = laid(tensors, metadata or {}, final)
    require_room(content.size, final)
    if taken:
        raise FileExistsError(errno.EEXIST, "exists already")
    temporary = temporary_of(final)
    try:
        write_laid(temporary, content, final, meter(content.work, progress))
        if check:
            check(temporary)
        yield temporary
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def temporary_of(final: Path) -> Path:
    """A name of our own beside a file or folder."""
    return final.parent / f".{final.name[:40]}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY}"


def require_room(needed: int, final: Path) -> None:
    free = shutil.disk_usage(final.parent).free
    if free < needed:
        what = f"needs {needed:,} bytes, the disk has {free:,}."
        raise FileError(what, file=final, remedy="Free some room.", needed=needed, free=free)


def meter(total: int, progress: Progress | None) -> Callable[[int], None]:
    """What takes how many more bytes are done, and tells progress how many are in all."""
    done = 0

    def more(size: int) -> None:
        nonlocal done
        done += size
        if progress:
            progress(done, total)

    return more


class Laid(NamedTuple):
    """A file's first bytes, and its tensors in the order of their bytes."""

    head: bytes
    tensors: Mapping[str, Lazy]

    @property
    def size(self) -> int:
        return len(self.head) + sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def work(self) -> int:
        """Bytes that progress counts."""
        return 2 * self.size + sum(tensor.before for tensor in self.tensors.values())


def laid(tensors: Mapping[str, Tensor | Lazy], metadata: Mapping[str, str], path: Path) -> Laid:
    """Widest dtype first, so that every tensor is aligned, then by name: the same tensors give the same bytes."""
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
    return Laid(len(text).to_bytes(8, "little") + text, {name: _lazy(tensors[name]) for name in names})


def _lazy(tensor: Tensor | Lazy) -> Lazy:
    return tensor if isinstance(tensor, Lazy) else Lazy(tensor.dtype, tuple(tensor.shape), lambda: [tensor])


def write_laid(temporary: Path, content: Laid, final: Path, more: Callable[[int], None]) -> None:
    """Write a file, wait until it is on the disk, and read it back. Errors are told of the final one."""
    chunks = (chunk for name, tensor in content.tensors.items() for chunk in _bytes(name, tensor, final, more))
    write_synced(temporary, chain([content.head], chunks), final, more)
    _require_readable(temporary, content, final)


def _bytes(name: str, tensor: Lazy, path: Path, more: Callable[[int], None]) -> Iterator[memoryview]:
    """What a tensor's chunks hold, checked, in pieces of at most CHUNK bytes."""
    left, before = tensor.nbytes, tensor.before
    for block in tensor.chunks():
        if before:
            more(before)
            before = 0
        left -= block.nbytes
        if block.dtype != tensor.dtype or block.ndim != len(tensor.shape) or block.shape[1:] != tensor.shape[1:]:
            found = f"{tuple(block.shape)} of {block.dtype}"
            raise _unlike(name, tensor, path, f"a block of it is {found}")
        if left < 0:
            raise _unlike(name, tensor, path, "its blocks are more than that")
        flat = block.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        view = memoryview(flat.numpy())  # pyright: ignore[reportArgumentType]  Buffer is a protocol only from 3.12
        for start in range(0, len(view), CHUNK):
            piece = view[start : start + CHUNK]
            if not tensor.kept and not is_finite(piece, tensor.dtype):
                what = f"tensor '{shown(name)}' would hold NaN or Inf in {tensor.dtype}."
                remedy = "Use smaller strengths, or a dtype that reaches further: bf16 or fp32."
                raise FileError(what, file=path, tensor=name, remedy=remedy)
            yield piece
    if left:
        raise _unlike(name, tensor, path, f"{left:,} bytes of it were not made")


def _unlike(name: str, tensor: Lazy, path: Path, what: str) -> FileError:
    expected = f"tensor '{shown(name)}' should be {tensor.shape} of {tensor.dtype}, but {what}."
    return FileError(expected, file=path, tensor=name, remedy="Nothing was changed.")


def _require_readable(temporary: Path, content: Laid, path: Path) -> None:
    """Raises FileError unless the reader finds in a file what was to be written."""
    try:
        header = read_header(temporary)
    except FileError as error:  # not the disk's fault: names or metadata that no safetensors file may have
        what = f"cannot be written, the reader would refuse it: {error.what}"
        raise FileError(what, file=path, remedy="Nothing was changed.") from error
    same = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in content.tensors.items()} == {
        name: (entry.dtype, entry.shape) for name, entry in header.entries.items()
    }
    if not same:
        raise FileError("reads back differently from what was written.", file=path, remedy="Check the disk.")


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


def sweep(folder: Path) -> None:
    """Remove what killed writers left: our temporary files and folders of more than a day ago."""
    for orphan in folder.glob(f".*{TEMPORARY}"):
        with suppress(OSError):
            if time.time() - orphan.stat().st_mtime > ORPHAN_AGE:
                shutil.rmtree(orphan) if orphan.is_dir() else orphan.unlink()
