"""The one checked reader of safetensors files.

Bytes are copied into memory with plain reads and the file is never mapped: a mapped file that somebody truncates kills
the process with a bus error. The safetensors library either maps a file or holds every byte of it twice.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BufferedReader

import numpy as np
import torch
from torch import Tensor

from ..errors import FileError, shown
from .format import CHECKPOINT_HEADER, LORA_HEADER, MIB, Entry, Header, Identity, identity_of, parse_header

# Bits that are all set exactly in NaN and Inf (for e4m3fn, which has no Inf, in NaN), with the integer to view as.
_NON_FINITE_BITS = {
    torch.float64: (np.uint64, 0x7FF0_0000_0000_0000),
    torch.float32: (np.uint32, 0x7F80_0000),
    torch.float16: (np.uint16, 0x7C00),
    torch.bfloat16: (np.uint16, 0x7F80),
    torch.float8_e4m3fn: (np.uint8, 0x7F),
    torch.float8_e5m2: (np.uint8, 0x7C),
}

_STATED = re.compile(rb'"sshs_model_hash"\s*:\s*"([0-9a-f]{64})"')


@dataclass(frozen=True)
class TensorFile:
    """A file's tensors, copied into memory, with its metadata."""

    source: str
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    identity: Identity | None = None  # None for what came over a wire


def identity(path: str | os.PathLike[str]) -> Identity:
    """The file's identity now. Raises FileError if there is no such file."""
    try:
        return identity_of(os.path.realpath(path), os.stat(path))
    except (OSError, ValueError) as error:
        raise FileError(f"cannot be opened: {reason(error)}.", file=path, remedy="Check the name.") from error


def read_header(path: str | os.PathLike[str], limit: int = CHECKPOINT_HEADER) -> Header:
    """Names, dtypes, shapes and metadata of a safetensors file, every offset checked; no tensor is read.

    limit is the most bytes that the header may have.
    """
    with _opened(path) as file:
        return parse_header(file, str(path), limit)


def read(path: str | os.PathLike[str]) -> TensorFile:
    """A LoRA file, whole: every tensor in memory, every value finite.

    Extra memory is the file's size. Raises FileError, naming the tensor where one is at fault, if the file
    is no safetensors file, breaks a limit, holds NaN or Inf, or changes while it is being read.
    """
    with _opened(path) as file:
        header = parse_header(file, str(path), LORA_HEADER)
        size = header.identity.size - header.data_start
        data = _room(size, header)
        if file.readinto(data) != size:
            raise _changed(header)
        _require_unchanged(file, header)
    for name, entry in header.entries.items():
        _require_finite(data, name, entry, header.path)
    tensors = {name: _tensor(data, entry, entry.start) for name, entry in header.entries.items()}
    return TensorFile(str(path), tensors, header.metadata, header.identity)


def read_tensors(header: Header, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """The named tensors of a file of any size, one at a time; memory is the largest tensor's."""
    with _opened(header.path) as file:
        for name in names:
            entry = header.entries[name]
            data = _room(entry.end - entry.start, header)
            file.seek(header.data_start + entry.start)
            if file.readinto(data) != len(data):
                raise _changed(header)
            _require_unchanged(file, header)
            yield name, _tensor(data, entry, 0)


def sha256(path: str | os.PathLike[str]) -> str:
    """The file's SHA-256, as model sites list it."""
    digest = hashlib.sha256()
    with _opened(path) as file:
        while chunk := file.read(MIB):
            digest.update(chunk)
    return digest.hexdigest()


def tensor_hash(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's tensors, all bytes after the header: it stays when metadata or name change.

    kohya's scripts state it as `sshs_model_hash` (library/train_util.py, addnet_hash_safetensors). The header is not
    checked: of thousands of files that would take longer than the hash.
    """
    digest = hashlib.sha256()
    with _opened(path) as file:
        file.seek(8 + _header_length(file, path))
        while chunk := file.read(MIB):
            digest.update(chunk)
    return digest.hexdigest()


def stated_hash(path: str | os.PathLike[str]) -> str:
    """The tensor_hash that a file's header states, "" for none. It may be another file's: tools copy metadata."""
    with _opened(path) as file:
        found = _STATED.search(file.read(_header_length(file, path)))
    return found[1].decode() if found else ""


def _header_length(file: BufferedReader, path: str | os.PathLike[str]) -> int:
    length = int.from_bytes(file.read(8), "little")
    if length > LORA_HEADER:
        raise FileError("is no LoRA: no safetensors file, or its header is too long.", file=path)
    return length


def read_text(path: str | os.PathLike[str], limit: int) -> str:
    """A text file of at most limit bytes. Raises FileError for a longer one and for what is no UTF-8."""
    with _opened(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise FileError(f"is over the limit of {limit:,} bytes.", file=path, remedy="Is it the right file?")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError("is no UTF-8 text.", file=path) from error


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[BufferedReader]:
    try:
        if stat.S_ISFIFO(os.stat(path).st_mode):  # opening one waits for a writer, perhaps for ever
            raise OSError("is no ordinary file")
        with open(path, "rb") as file:
            yield file
    except (OSError, ValueError) as error:  # ValueError: a NUL or a lone surrogate in the name
        raise FileError(f"cannot be read: {reason(error)}.", file=path, remedy="Check the name.") from error


def reason(error: Exception) -> str:
    """An operating system error in a few words."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def _changed(header: Header) -> FileError:
    return FileError("changed while it was being read.", file=header.path, remedy="Load it again.")


def _require_unchanged(file: BufferedReader, header: Header) -> None:
    if identity_of(header.identity.path, os.fstat(file.fileno())) != header.identity:
        raise _changed(header)


def _room(size: int, header: Header) -> bytearray:
    try:
        return bytearray(size)
    except MemoryError as error:
        raise FileError(
            f"needs {size:,} bytes of memory, more than there is.", file=header.path, remedy="Free some memory."
        ) from error


def _require_finite(data: bytearray, name: str, entry: Entry, path: str) -> None:
    """On the stored bits with NumPy: half the memory of a float test, and one thread, which is five times
    faster than two for the hundreds of small tensors of a LoRA."""
    if entry.dtype not in _NON_FINITE_BITS or entry.start == entry.end:
        return
    kind, mask = _NON_FINITE_BITS[entry.dtype]
    bits = np.frombuffer(data, kind, (entry.end - entry.start) // entry.dtype.itemsize, entry.start)
    if ((bits & kind(mask)) == kind(mask)).any():
        raise FileError(
            f"tensor '{shown(name)}' holds NaN or Inf, which would turn every picture black.",
            file=path,
            tensor=name,
            remedy="The training diverged or the file is damaged: get another version.",
        )


def _tensor(data: bytearray, entry: Entry, offset: int) -> Tensor:
    if entry.start == entry.end:
        return torch.empty(entry.shape, dtype=entry.dtype)
    size = entry.end - entry.start
    if offset % entry.dtype.itemsize:  # torch reads at misaligned addresses only by luck
        data, offset = data[offset : offset + size], 0
    flat = torch.frombuffer(data, dtype=entry.dtype, count=size // entry.dtype.itemsize, offset=offset)
    return flat.reshape(entry.shape)
