"""What the writer's tests let other processes do; they start from a server that has imported everything."""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import resource
from pathlib import Path

import torch

from lora_ops import checkpoints, files
from lora_ops.adapters import Full
from lora_ops.errors import FileError
from lora_ops.landing import land
from lora_ops.lora import Lora
from lora_ops.stack import Entry

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


def lazily(number: int) -> dict[str, files.Lazy]:
    def blocks(tensor: torch.Tensor) -> files.Lazy:
        return files.Lazy(tensor.dtype, tuple(tensor.shape), lambda: tensor.split(SIZE // 8))

    return {name: blocks(tensor) for name, tensor in stamped(number).items()}


def save_lazily(path: Path, number: int, *, overwrite: bool) -> None:
    files.write(path, lazily(number), {"number": str(number)}, overwrite=overwrite)


def save_folder(path: Path, number: int, *, overwrite: bool) -> None:
    shards = {f"part/{shard}": (lazily(number), {"number": str(number)}) for shard in (1, 2)}
    files.write_folder(path, shards, {"index.json": str(number)}, overwrite=overwrite)


def folder_stamp(path: Path) -> int:
    """The save that wrote this folder, whole."""
    [number] = {stamp(path / "part" / shard) for shard in ("1", "2")} | {int((path / "index.json").read_text())}
    return number


def save_merged(path: Path, number: int, *, overwrite: bool) -> None:
    """A checkpoint of ones with a difference of number - 1 in it."""
    base = path.parent / "base" / "base"
    if not base.exists():
        base.parent.mkdir(exist_ok=True)
        files.write(base, {f"diffusion_model.{name}.weight": torch.ones(400, 500) for name in "ab"}, overwrite=True)
    opened = checkpoints.opened(base)
    diff = Full(torch.full((400, 500), number - 1.0))
    lora = Lora("x", {f"diffusion_model.{name}": diff for name in "ab"})
    checkpoints.merge(
        opened, land([Entry(lora, {"model": 1.0, "clip": 1.0})], opened.targets), path, overwrite=overwrite
    )


def merged_stamp(path: Path) -> int:
    tensors = files.read(path).tensors
    [number] = {int(value) for tensor in tensors.values() for value in (tensor.min(), tensor.max())}
    assert len(tensors) == 2
    return number


SAVES = {
    "write": (save, stamp),
    "lazy": (save_lazily, stamp),
    "folder": (save_folder, folder_stamp),
    "merge": (save_merged, merged_stamp),
}


def save_numbered(folder: str, writer: int, count: int, start, saved) -> None:
    torch.set_num_threads(1)
    start.wait()
    for number in range(writer * count, (writer + 1) * count):
        tensors = {name: tensor[:1000] for name, tensor in stamped(number).items()}
        path = files.write_numbered(lambda free: Path(folder) / f"x_{free:05}_", tensors, {"number": str(number)})
        saved.put((number, path.name))


def overwrite_for_ever(path: str, first: int, how: str) -> None:
    torch.set_num_threads(1)
    for number in itertools.count(first):
        SAVES[how][0](Path(path), number, overwrite=True)


def save_fresh_for_ever(path: str, first: int, how: str) -> None:
    torch.set_num_threads(1)
    for number in itertools.count(first):
        SAVES[how][0](Path(path).with_name(f"{number}.safetensors"), number, overwrite=False)


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
