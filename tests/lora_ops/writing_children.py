"""What the writer's tests let other processes do; they start from a server that has imported everything."""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import resource
from pathlib import Path

import torch

from lora_ops import files
from lora_ops.errors import FileError

SIZE = 200_000  # float32 values: large enough that a kill meets the writer in the middle of a file


def context() -> multiprocessing.context.ForkServerContext:
    children = multiprocessing.get_context("forkserver")
    children.set_forkserver_preload([__name__])
    return children


def stamped(number: int) -> dict[str, torch.Tensor]:
    """Tensors of which every value tells which save wrote them."""
    return {name: torch.full((SIZE,), float(number)) for name in ("a", "b")}


def stamp(path: Path) -> int:
    """The save that wrote this file, whole. Raises if the file is a mixture or no file."""
    file = files.read(path)
    [number] = {int(value) for tensor in file.tensors.values() for value in (tensor.min(), tensor.max())}
    assert file.metadata == {"number": str(number)} and set(file.tensors) == {"a", "b"}
    return number


def save(path: Path, number: int, *, overwrite: bool) -> None:
    files.write(path, stamped(number), {"number": str(number)}, overwrite=overwrite)


def overwrite_for_ever(path: str, first: int) -> None:
    torch.set_num_threads(1)
    for number in itertools.count(first):
        save(Path(path), number, overwrite=True)


def save_fresh_for_ever(path: str, first: int) -> None:
    torch.set_num_threads(1)
    for number in itertools.count(first):
        save(Path(path).with_name(f"{number}.safetensors"), number, overwrite=False)


def save_all_names(folder: str, writer: int, names: int, hard_links: bool, start, saved) -> None:
    """One save to each name; tells which of them it was told had succeeded."""
    torch.set_num_threads(1)
    if not hard_links:
        os.link = _no_hard_links
    start.wait()
    for name in range(names):
        number = writer * 1000 + name
        try:
            save(Path(folder) / f"{name}.safetensors", number, overwrite=False)
        except FileError as error:
            saved.put((name, None, str(error)))
        else:
            saved.put((name, number, ""))


def _no_hard_links(*_: object) -> None:
    raise OSError(errno.EPERM, "no hard links here")


def write_as_nobody(folder: str, said) -> None:
    os.chdir(folder)
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    _tell(said, Path("kurt.safetensors"))


def write_with_small_files_only(path: str, limit: int, said) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    _tell(said, Path(path))


def _tell(said, path: Path) -> None:
    try:
        save(path, 2, overwrite=True)
    except BaseException as error:
        said.put((type(error).__name__, str(error)))
    else:
        said.put(("", ""))
