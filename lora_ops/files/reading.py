"""The one checked reader of safetensors files.

Bytes are copied into memory with plain reads and the file is never mapped: a mapped file that somebody truncates kills
the process with a bus error. The safetensors library either maps a file or holds every byte of it twice.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BufferedReader
from itertools import cycle

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

_BLOCK = MIB // 2  # bytes that are looked at for NaN and Inf at a time: as many as stay in a processor's cache

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


def read_rows(header: Header, name: str, limit: int) -> Iterator[Tensor]:
    """A tensor of a file in consecutive blocks of its rows, each of at most so many bytes, or of one row."""
    entry = header.entries[name]
    row = math.prod(entry.shape[1:]) * entry.dtype.itemsize
    step = max(limit // max(row, 1), 1)
    with _opened(header.path) as file:
        file.seek(header.data_start + entry.start)
        for start in range(0, entry.shape[0], step) if entry.shape else [0]:
            rows = min(step, entry.shape[0] - start) if entry.shape else 1
            data = _room(rows * row, header)
            if file.readinto(data) != len(data):
                raise _changed(header)
            _require_unchanged(file, header)
            shape = (rows, *entry.shape[1:]) if entry.shape else ()
            yield _tensor(data, Entry(entry.dtype, shape, 0, len(data)), 0)


def sha256(path: str | os.PathLike[str]) -> str:
    """The file's SHA-256, as model sites list it."""
    digest = hashlib.sha256()
    with _opened(path) as file:
        _through(file, digest.update)
    return digest.hexdigest()


class Checksum:
    """CRC-32 of what it is updated with: for faults of disks and memory, at half the price of hashing."""

    value = 0

    def update(self, data: bytes | memoryview) -> None:
        self.value = zlib.crc32(data, self.value)


def _through(file: BufferedReader, take: Callable[[memoryview], None]) -> None:
    """Hand on the rest of a file, which is read while take has what came before."""
    with ThreadPoolExecutor(1) as thread:
        taken = None
        for room in cycle([bytearray(MIB), bytearray(MIB)]):  # larger ones leave the processor's cache
            count = file.readinto(room)
            if taken:
                taken.result()
            if not count:
                return
            taken = thread.submit(take, memoryview(room)[:count])


def tensor_hash(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's tensors, all bytes after the header: it stays when metadata or name change.

    kohya's scripts state it as `sshs_model_hash` (library/train_util.py, addnet_hash_safetensors). The header is not
    checked: of thousands of files that would take longer than the hash.
    """
    with _opened(path) as file:
        file.seek(8 + _header_length(file, path))
        digest = hashlib.sha256()
        _through(file, digest.update)
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


def _room(size: int, header: Header) -> memoryview:
    try:
        return memoryview(np.empty(size, np.uint8))  # pyright: ignore[reportArgumentType]  Buffer is a protocol from 3.12
    except MemoryError as error:
        raise FileError(
            f"needs {size:,} bytes of memory, more than there is.", file=header.path, remedy="Free some memory."
        ) from error


def _require_finite(data: memoryview, name: str, entry: Entry, path: str) -> None:
    if not is_finite(data[entry.start : entry.end], entry.dtype):
        raise FileError(
            f"tensor '{shown(name)}' holds NaN or Inf, which would turn every picture black.",
            file=path,
            tensor=name,
            remedy="The training diverged or the file is damaged: get another version.",
        )


def is_finite(data: memoryview, dtype: torch.dtype) -> bool:
    """Whether these bytes hold no NaN and no Inf. On the stored bits with NumPy: less memory than a float test, and
    one thread, which is five times faster than two for the hundreds of small tensors of a LoRA."""
    if dtype not in _NON_FINITE_BITS:
        return True
    kind, mask = _NON_FINITE_BITS[dtype]
    blocks = (data[start : start + _BLOCK] for start in range(0, len(data), _BLOCK))
    return not any(((np.frombuffer(block, kind) & kind(mask)) == kind(mask)).any() for block in blocks)


def _tensor(data: memoryview, entry: Entry, offset: int) -> Tensor:
    if entry.start == entry.end:
        return torch.empty(entry.shape, dtype=entry.dtype)
    size = entry.end - entry.start
    if offset % entry.dtype.itemsize:  # torch reads at misaligned addresses only by luck
        data, offset = memoryview(bytearray(data[offset : offset + size])), 0
    flat = torch.frombuffer(data, dtype=entry.dtype, count=size // entry.dtype.itemsize, offset=offset)
    return flat.reshape(entry.shape)
