"""A new file's bytes on the disk: written, waited for and read back, all at the same time."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path

from typing_extensions import Self

from ..errors import FileError
from .format import MIB
from .reading import Checksum

CHUNK = 16 * MIB  # bytes at a time, from one call of progress to the next
AHEAD = 2  # chunks that are being written while the next one is made
STRETCH = 64 * MIB  # bytes that are waited for and read back together: whole pages, which the cache can forget
UNREAD = 2  # stretches that may wait for the disk


def write_synced(
    path: Path, chunks: Iterable[bytes | memoryview], final: Path, more: Callable[[int], None] = lambda size: None
) -> None:
    """Write a new file, wait until it is on the disk, and compare what is read from there with what was written.

    While a chunk is made here, where an interrupt is seen, those before it are written, a stretch before them goes to
    the disk, and one before that comes back from it, each in a thread: the disk has work all along, and nothing long is
    left for the end, which could not be interrupted. more hears of every byte twice.
    Raises FileError, told of the final file, if other bytes come back.
    """
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0), 0o666)
    with (
        open(descriptor, "wb", buffering=0) as file,
        open(path, "rb", buffering=0) as again,
        _Line(more) as writer,
        _Line(more) as syncer,
        _Line(more) as reader,
    ):
        written, read = Checksum(), Checksum()
        start = end = 0
        put: Future[None] | None = None

        def settle(sync: Callable[[int], None]) -> None:
            """Have the disk take and give back all from start to end."""
            synced = syncer.add(0, _sync, descriptor, sync, put, start)
            for place in range(start, end, CHUNK):
                reader.add(min(CHUNK, end - place), _take, again, read, synced, min(CHUNK, end - place))

        for chunk in _cut(chunks):
            put = writer.add(len(chunk), _put, file, written, chunk)
            writer.settle(AHEAD)
            end += len(chunk)
            if end - start == STRETCH:
                settle(getattr(os, "fdatasync", os.fsync))
                reader.settle(UNREAD * STRETCH // CHUNK)
                start = end
        writer.settle()
        settle(os.fsync)
        syncer.settle()
        reader.settle()
        if read.value != written.value or again.read(1):
            raise FileError("reads back differently from what was written.", file=final, remedy="Check the disk.")


class _Line:
    """Steps that a thread takes one after the other; more hears of how many bytes each was, when it is settled."""

    def __init__(self, more: Callable[[int], None]) -> None:
        self._more, self._thread = more, ThreadPoolExecutor(1)
        self._steps: deque[tuple[Future[None], int]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def add(self, size: int, step: Callable[..., None], *args: object) -> Future[None]:
        self._steps.append((self._thread.submit(step, *args), size))
        return self._steps[-1][0]

    def settle(self, most: int = 0) -> None:
        """Wait until at most so many are left."""
        while len(self._steps) > most:
            done, size = self._steps.popleft()
            done.result()
            if size:
                self._more(size)


def _cut(chunks: Iterable[bytes | memoryview]) -> Iterator[memoryview]:
    """The same bytes in pieces of which each stretch is several whole ones."""
    room = STRETCH
    for chunk in chunks:
        left = memoryview(chunk)
        while left:
            piece, left = left[:room], left[room:]
            room = room - len(piece) or STRETCH
            yield piece


def _put(file: FileIO, written: Checksum, chunk: memoryview) -> None:
    written.update(chunk)
    while chunk:
        chunk = chunk[file.write(chunk) :]


def _sync(descriptor: int, sync: Callable[[int], None], put: Future[None] | None, start: int) -> None:
    if put:
        put.result()
    sync(descriptor)
    if hasattr(os, "posix_fadvise"):  # so that what is read back comes from the disk, not from memory
        os.posix_fadvise(descriptor, start, 0, os.POSIX_FADV_DONTNEED)


def _take(again: FileIO, read: Checksum, synced: Future[None], size: int) -> None:
    synced.result()
    room = memoryview(bytearray(min(size, MIB)))  # a larger one leaves the processor's cache
    while size and (count := again.readinto(room[:size])):
        read.update(room[:count])
        size -= count
