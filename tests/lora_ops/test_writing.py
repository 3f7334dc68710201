"""The atomic writer: what it writes, and what a failure, a race or a kill leaves behind."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import random
import re
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from lora_ops import files
from lora_ops.errors import FileError
from lora_ops.files import folder as folders
from lora_ops.files import syncing, writing
from tests.lora_ops import corpus

if os.name != "nt":
    from tests.lora_ops import writing_children as children

posix = pytest.mark.skipif(os.name == "nt", reason="POSIX processes, modes and folders")
ORPHANS = f".*{writing.TEMPORARY}"


def tensor_of(name: str) -> torch.Tensor:
    content = bytearray(corpus.tensor_bytes(name, 12))
    return torch.frombuffer(content, dtype=corpus.DTYPES[name]).reshape(3, 4)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    def bits(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    return one.dtype == other.dtype and one.shape == other.shape and bits(one).equal(bits(other))


BASE = torch.arange(24.0).reshape(4, 6)
TENSORS: dict[str, dict[str, torch.Tensor]] = {
    **{name: {"a": tensor_of(name)} for name in corpus.DTYPES},
    "every dtype": {name.lower(): tensor_of(name) for name in corpus.DTYPES},
    "odd sizes": {"b": torch.ones(3, dtype=torch.uint8), "a": torch.ones(5).half(), "c": torch.ones(1).double()},
    "no tensors": {},
    "0-d": {"a": torch.tensor(1.5), "b": torch.tensor(True), "c": torch.tensor(1.5).to(torch.float8_e5m2)},
    "empty": {"a": torch.ones(0), "b": torch.ones(3, 0, 2).half(), "c": torch.ones(1)},
    "transposed": {"a": BASE.t()},
    "strided": {"a": BASE[::2, 1::3]},
    "expanded": {"a": torch.ones(1, 3).expand(4, 3)},
    "channels last": {"a": torch.arange(48.0).reshape(1, 3, 4, 4).to(memory_format=torch.channels_last)},
    "one storage": {"a": BASE, "b": BASE, "c": BASE[1:], "d": BASE.reshape(-1)[3:5]},
    "a parameter": {"a": torch.nn.Parameter(torch.ones(2, 2))},
    "names": {name: torch.ones(1) for name in ("", "ü.λ", "🦊", 'a "b"', "back\\slash", "\0\x1b", "a" * 512)},
}
METADATA: dict[str, dict[str, str]] = {
    "none": {},
    "empty text": {"": ""},
    "of all kinds": {"ü": "日本語 🦊", "quote": '"\\', "control": "\0\n\x1b", "bidi": "‮"},
    "large": {"ss_tag_frequency": '{"a": 1}' * 10_000},
}


def leftovers(folder: Path) -> list[Path]:
    return list(folder.glob(ORPHANS))


def refusal(path: Path, tensors=None, metadata=None, *, overwrite: bool = True) -> FileError:
    """The error of a write that must fail, checked for what every such error has to do."""
    before = path.read_bytes() if os.path.isfile(path) else None
    with pytest.raises(FileError) as caught:
        files.write(path, {"a": torch.ones(1000)} if tensors is None else tensors, metadata, overwrite=overwrite)
    assert (path.read_bytes() if before is not None else None) == before, "the old file changed"
    assert str(path) == caught.value.file and caught.value.remedy
    if os.path.isdir(path.parent):
        assert not leftovers(path.parent)
        assert before is not None or not os.path.isfile(path)
    return caught.value


@pytest.fixture
def old(tmp_path) -> Path:
    """A file that is there already."""
    path = tmp_path / "kurt.safetensors"
    files.write(path, {"a": torch.zeros(3)}, {"note": "old"}, overwrite=False)
    return path


# What is written


@pytest.mark.parametrize("tensors", TENSORS.values(), ids=TENSORS)
def test_what_is_written_opens_in_the_library_with_equal_tensors(tensors, tmp_path):
    path = tmp_path / "kurt.safetensors"
    files.write(path, tensors, {"note": "ours"}, overwrite=False)
    loaded = safetensors.torch.load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(same(loaded[name], tensor.detach()) for name, tensor in tensors.items())
    with safetensors.safe_open(path, "pt") as opened:
        assert opened.metadata() == {"note": "ours"}
        assert set(opened.keys()) == set(tensors)
        assert all(same(opened.get_tensor(name), tensor.detach()) for name, tensor in tensors.items())


@pytest.mark.parametrize("metadata", METADATA.values(), ids=METADATA)
def test_metadata_comes_back_as_it_was(metadata, tmp_path):
    path = tmp_path / "kurt.safetensors"
    files.write(path, {"a": torch.ones(30_000)}, metadata, overwrite=False)
    with safetensors.safe_open(path, "pt") as opened:
        assert (opened.metadata() or {}) == metadata == files.read(path).metadata


@pytest.mark.parametrize("tensors", TENSORS.values(), ids=TENSORS)
def test_what_we_write_we_read(tensors, tmp_path):
    path = tmp_path / "kurt.safetensors"
    files.write(path, tensors, overwrite=False)
    read = files.read(path).tensors
    assert read.keys() == tensors.keys() and all(same(read[name], tensor.detach()) for name, tensor in tensors.items())


@pytest.mark.parametrize("tensors", TENSORS.values(), ids=TENSORS)
def test_every_tensor_lies_aligned_for_its_dtype(tensors, tmp_path):
    path = tmp_path / "kurt.safetensors"
    files.write(path, tensors, {"note": "x"}, overwrite=False)
    header = files.read_header(path)
    for entry in header.entries.values():
        assert (header.data_start + entry.start) % entry.dtype.itemsize == 0


def test_the_same_tensors_and_metadata_give_the_same_bytes_in_whatever_order(tmp_path):
    tensors, metadata = TENSORS["every dtype"], METADATA["of all kinds"]
    digests = set()
    for number in range(5):
        names, keys = random.sample(list(tensors), len(tensors)), random.sample(list(metadata), len(metadata))
        path = tmp_path / f"{number}.safetensors"
        files.write(path, {n: tensors[n].clone() for n in names}, {k: metadata[k] for k in keys}, overwrite=False)
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
        assert files.sha256(path) in digests
    assert len(digests) == 1


def test_the_bytes_are_these(tmp_path):
    path = tmp_path / "kurt.safetensors"
    files.write(path, {"b": torch.ones(2), "a": torch.zeros(1).half()}, {"y": "1", "x": "2"}, overwrite=False)
    header = b'{"__metadata__":{"x":"2","y":"1"},"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    header += b'"a":{"dtype":"F16","shape":[1],"data_offsets":[8,10]}}'
    header += b" " * (-len(header) % 8)
    assert path.read_bytes() == len(header).to_bytes(8, "little") + header + b"\0\0\x80\x3f" * 2 + b"\0\0"


def test_a_tensor_is_not_changed_by_being_written(tmp_path):
    tensor = torch.arange(6.0).reshape(2, 3).t()
    files.write(tmp_path / "kurt.safetensors", {"a": tensor}, overwrite=False)
    assert tensor.equal(torch.arange(6.0).reshape(2, 3).t()) and not tensor.is_contiguous()


# Tensors that are made when they are written


def lazy(tensor: torch.Tensor, *, rows: int = 1, kept: bool = False) -> files.Lazy:
    blocks = tensor.split(rows) if tensor.ndim else [tensor]
    return files.Lazy(tensor.dtype, tuple(tensor.shape), lambda: blocks, kept)


@pytest.mark.parametrize("tensors", TENSORS.values(), ids=TENSORS)
def test_lazy_tensors_give_the_same_bytes_as_whole_ones(tensors, tmp_path):
    whole, made = tmp_path / "whole", tmp_path / "made"
    files.write(whole, tensors, {"note": "ours"}, overwrite=False)
    files.write(made, {name: lazy(tensor) for name, tensor in tensors.items()}, {"note": "ours"}, overwrite=False)
    assert whole.read_bytes() == made.read_bytes()


@pytest.mark.parametrize(
    "made",
    [
        [torch.ones(2, 3)],
        [torch.ones(4, 3), torch.ones(1, 3)],
        [torch.ones(4, 3).half()],
        [torch.ones(3, 4)],
        [torch.ones(12)],
        [],
        itertools.repeat(torch.ones(4, 3)),
    ],
    ids=["too few", "too many", "another dtype", "another shape", "flat", "none", "endless"],
)
def test_a_lazy_tensor_that_is_not_what_it_says_is_an_error_that_names_it(made, old):
    good, bad = lazy(torch.ones(2, 2)), files.Lazy(torch.float32, (4, 3), lambda: made)
    error = refusal(old, {"good": good, "bad one": bad})
    assert error.facts["tensor"] == "bad one" and "(4, 3)" in error.what


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_no_picture_survives_are_not_written_unless_a_file_had_them_already(dtype, value, old):
    tensor = torch.ones(700_000)
    tensor[-2] = value
    tensor = tensor.to(dtype).reshape(2, -1)
    for bad in (tensor, lazy(tensor)):
        error = refusal(old, {"good": torch.ones(3), "bad": bad})
        assert error.facts["tensor"] == "bad" and "NaN or Inf" in error.what
    files.write(old, {"bad": lazy(tensor, kept=True)}, overwrite=True)
    assert same(safetensors.torch.load_file(old)["bad"], tensor)


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_progress_counts_every_byte_twice_and_speaks_often(folder, tmp_path, monkeypatch):
    for module in (writing, syncing, folders):
        monkeypatch.setattr(module, "CHUNK", 1 << 20)
    heard: list[tuple[int, int]] = []
    tensors = {"a": torch.zeros(640 << 10), "b": lazy(torch.zeros(384 << 10, 1), rows=320 << 10), "c": torch.zeros(3)}
    (tmp_path / "vae").write_bytes(bytes(1000))
    if folder:
        content, copies = {"x/1.safetensors": (tensors, {})}, {"vae/v": tmp_path / "vae"}
        files.write_folder(
            *(tmp_path / "new", content, {"note": "x"}, copies),
            overwrite=False,
            progress=lambda *told: heard.append(told),
        )
        size = sum((tmp_path / "new" / name).stat().st_size for name in ("x/1.safetensors", "vae/v"))
    else:
        files.write(tmp_path / "new", tensors, overwrite=False, progress=lambda *told: heard.append(told))
        size = (tmp_path / "new").stat().st_size
    assert {total for _, total in heard} == {2 * size} and heard[-1][0] == 2 * size
    steps = [after - before for (before, _), (after, _) in itertools.pairwise([(0, 0), *heard])]
    assert all(0 < step <= 1 << 20 for step in steps)


@pytest.mark.parametrize("at", [0.01, 0.4, 0.6, 1.0])
@pytest.mark.parametrize("what", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_what_progress_raises_cancels_the_writing(at, what, folder, old):
    def cancel(done, total):
        if done >= at * total:
            raise what

    tensors, before = {"a": torch.ones(5 << 20), "b": lazy(torch.ones(3, 4))}, old.read_bytes()
    with pytest.raises(what):
        if folder:
            files.write_folder(old.parent / "new", {"a/b": (tensors, {})}, {}, overwrite=False, progress=cancel)
        else:
            files.write(old, tensors, overwrite=True, progress=cancel)
    assert old.read_bytes() == before and [path.name for path in old.parent.iterdir()] == [old.name]


def test_what_a_lazy_tensor_raises_leaves_the_old_file(old):
    def broken():
        yield torch.ones(1, 1000)
        raise ZeroDivisionError

    before = old.read_bytes()
    with pytest.raises(ZeroDivisionError):
        files.write(old, {"a": files.Lazy(torch.float32, (2, 1000), broken)}, overwrite=True)
    assert old.read_bytes() == before and not leftovers(old.parent)


def test_a_check_sees_the_whole_new_file_while_the_old_one_has_the_name(old):
    seen = []

    def check(path: Path) -> None:
        seen.append((files.read(path).tensors["a"].item(), files.read(old).metadata["note"]))

    files.write(old, {"a": torch.tensor(7.0)}, {"note": "new"}, overwrite=True, check=check)
    assert seen == [(7.0, "old")] and files.read(old).metadata["note"] == "new"


def test_a_check_that_fails_leaves_the_old_file(old):
    def check(path: Path) -> None:
        raise FileError("is not what was sampled.", file=path, remedy="x")

    before = old.read_bytes()
    with pytest.raises(FileError, match="not what was sampled"):
        files.write(old, {"a": torch.ones(1)}, overwrite=True, check=check)
    with pytest.raises(FileError, match="not what was sampled"):
        files.write_folder(old.parent / "new", {"a/b": ({"a": torch.ones(1)}, {})}, {}, overwrite=False, check=check)
    assert old.read_bytes() == before and [path.name for path in old.parent.iterdir()] == [old.name]


# Folders


CONTENT = {
    "model.safetensors.index.json": "{}",
    "unet/config.json": '{"ü": 1}',
}


def folder_of(number: float, path: Path, vae: Path, *, overwrite: bool) -> None:
    shards = {f"unet/{shard}.safetensors": ({"a": torch.full((30,), number)}, {}) for shard in (1, 2)}
    files.write_folder(path, shards, CONTENT, {"vae/v.safetensors": vae}, overwrite=overwrite)


def test_a_folder_of_shards_texts_and_copies_appears_whole_and_is_replaced_whole(old, tmp_path):
    new = tmp_path / "new"
    folder_of(1, new, old, overwrite=False)
    assert {str(path.relative_to(new)) for path in new.rglob("*") if path.is_file()} == {
        *CONTENT,
        *("unet/1.safetensors", "unet/2.safetensors", "vae/v.safetensors"),
    }
    assert (new / "vae/v.safetensors").read_bytes() == old.read_bytes()
    assert all((new / name).read_text("utf-8") == text for name, text in CONTENT.items())
    with pytest.raises(FileError, match="exists"):
        folder_of(2, new, old, overwrite=False)
    folder_of(2, new, old, overwrite=True)
    assert {files.read(new / f"unet/{shard}.safetensors").tensors["a"][0].item() for shard in (1, 2)} == {2}
    (new / "unet/mine.txt").write_text("mine")
    with pytest.raises(FileError, match="mine.txt"):
        folder_of(3, new, old, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [old.name, "new"]


@posix
def test_an_old_folder_is_exchanged_in_one_step_where_the_system_can(old, tmp_path, monkeypatch):
    folder_of(1, tmp_path / "new", old, overwrite=False)
    if not files.folder._exchanged(tmp_path / "new", tmp_path / "new"):
        pytest.skip("this file system cannot")
    monkeypatch.setattr(os, "rename", None)
    folder_of(2, tmp_path / "new", old, overwrite=True)
    assert files.read(tmp_path / "new/unet/1.safetensors").tensors["a"][0].item() == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [old.name, "new"]


# Names by number


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_the_next_free_number_is_taken(folder, tmp_path):
    def save(first: int = 1) -> str:
        def path_of(number: int) -> Path:
            return tmp_path / f"x_{number:05}_"

        tensors = {"a": torch.ones(1)}
        if folder:
            return files.write_folder_numbered(path_of, {"a": (tensors, {})}, {}, first=first).name
        return files.write_numbered(path_of, tensors, first=first).name

    (tmp_path / "x_00002_").symlink_to(tmp_path / "nowhere")
    assert [save(), save(), save(9), save()] == ["x_00001_", "x_00003_", "x_00009_", "x_00004_"]
    assert not (tmp_path / "nowhere").exists() and not leftovers(tmp_path)


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_a_number_that_is_taken_while_writing_is_passed_over_without_writing_again(folder, tmp_path):
    made, asked = [], []

    def chunks():
        made.append(1)
        return [torch.ones(1)]

    def path_of(number: int) -> Path:
        path = tmp_path / f"{number}"
        if len(asked) > 1 and number < 3 and not path.exists():  # somebody else, between a look and a rename
            real = os.path.lexists
            folder_of(0, path, Path(__file__), overwrite=False) if folder else path.write_bytes(b"other")
            monkeypatch.setattr(os.path, "lexists", lambda each: each != path and real(each))
        asked.append(number)
        return path

    with pytest.MonkeyPatch.context() as monkeypatch:
        tensors = {"a": files.Lazy(torch.float32, (1,), chunks)}
        if folder:
            path = files.write_folder_numbered(path_of, {"a": (tensors, {})}, {})
        else:
            path = files.write_numbered(path_of, tensors)
    assert path.name == "3" and len(made) == 1
    assert folder or (tmp_path / "1").read_bytes() == b"other"


# What it does to files that are there


def test_without_overwrite_a_file_that_is_there_is_never_touched(old):
    before = files.identity(old), old.stat().st_mode
    error = refusal(old, overwrite=False)
    assert "exists" in str(error) and "another name" in error.remedy
    assert (files.identity(old), old.stat().st_mode) == before


@posix
@pytest.mark.parametrize("target", ["elsewhere.safetensors", "missing.safetensors"])
def test_without_overwrite_a_link_is_never_followed(target, tmp_path):
    (tmp_path / "elsewhere.safetensors").write_bytes(b"elsewhere")
    link = tmp_path / "kurt.safetensors"
    link.symlink_to(tmp_path / target)
    with pytest.raises(FileError, match="exists"):
        files.write(link, {"a": torch.ones(1)}, overwrite=False)
    assert link.is_symlink() and (tmp_path / "elsewhere.safetensors").read_bytes() == b"elsewhere"
    assert not (tmp_path / "missing.safetensors").exists() and not leftovers(tmp_path)


@posix
def test_overwriting_a_link_replaces_the_link_and_not_what_it_points_to(tmp_path):
    (tmp_path / "elsewhere.safetensors").write_bytes(b"elsewhere")
    link = tmp_path / "kurt.safetensors"
    link.symlink_to(tmp_path / "elsewhere.safetensors")
    files.write(link, {"a": torch.ones(1)}, overwrite=True)
    assert not link.is_symlink() and (tmp_path / "elsewhere.safetensors").read_bytes() == b"elsewhere"


@posix
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664), (0o000, 0o666)])
def test_the_mode_of_a_fresh_file_follows_the_umask(umask, mode, overwrite, tmp_path):
    before = os.umask(umask)
    try:
        files.write(tmp_path / "kurt.safetensors", {"a": torch.ones(1)}, overwrite=overwrite)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "kurt.safetensors").stat().st_mode) == mode


@posix
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o777])
def test_overwriting_keeps_the_mode_of_the_old_file(mode, old):
    old.chmod(mode)
    files.write(old, {"a": torch.ones(1)}, overwrite=True)
    assert stat.S_IMODE(old.stat().st_mode) == mode
    assert files.read(old).tensors["a"].item() == 1


def test_names_that_only_just_fit_are_written(tmp_path):
    for stem in ("a" * 243, "é" * 121, "🦊" * 60, ".hidden", "a b", "x.lora_ops_tmp"):
        path = tmp_path / f"{stem}.safetensors"
        files.write(path, {"a": torch.ones(1)}, overwrite=False)
        assert path.is_file()
    assert not leftovers(tmp_path)


# What a failure leaves


def test_a_disk_that_is_too_full_is_refused_before_the_first_byte(old, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    monkeypatch.setattr(os, "open", None)  # not even a temporary file
    error = refusal(old, {"a": torch.ones(1000)})
    assert error.facts["free"] == 10 and error.facts["needed"] >= 4000
    assert "10" in str(error) and f"{error.facts['needed']:,}" in str(error)


@pytest.mark.parametrize("used", [0, 0.5, 0.99])
@pytest.mark.parametrize("warned", [True, False], ids=["seen beforehand", "met while writing"])
def test_a_disk_that_is_full_keeps_the_old_file(used, warned, tmp_path, monkeypatch):
    size = 1 << 20
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(tmp_path)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        path = tmp_path / "kurt.safetensors"
        files.write(path, {"a": torch.zeros(100)}, overwrite=False)
        (tmp_path / "other").write_bytes(bytes(int(used * (size - 8192))))
        if not warned:
            monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40))
        error = refusal(path, {"a": torch.ones(size // 4)})
        assert ("needs" if warned else os.strerror(errno.ENOSPC)) in str(error)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@posix
@pytest.mark.parametrize("limit", [0, 4096, 1_000_000, 1_600_000])
def test_a_file_that_may_not_grow_keeps_the_old_file(limit, old):
    before = old.read_bytes()
    name, text = told(children.context(), children.write_with_small_files_only, str(old), limit)
    assert name == "FileError" and str(old) in text
    assert old.read_bytes() == before and not leftovers(old.parent)


@posix
def test_a_folder_one_may_not_write_to_keeps_the_old_file(old):
    before = old.read_bytes()
    old.parent.chmod(0o555)
    try:
        name, text = told(children.context(), children.write_as_nobody, str(old.parent))
    finally:
        old.parent.chmod(0o755)
    assert name == "FileError" and "Permission denied" in text
    assert old.read_bytes() == before and not leftovers(old.parent)


def told(context, target, *args):
    said = context.SimpleQueue()
    child = context.Process(target=target, args=(*args, said))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    return said.get()


def test_a_folder_that_is_missing_is_refused(tmp_path):
    refusal(tmp_path / "missing" / "kurt.safetensors")
    assert not (tmp_path / "missing").exists()


def test_a_folder_that_is_a_file_is_refused(old):
    refusal(old / "kurt.safetensors")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["a" * 300, "nul\0", "lone\ud800", "a" * 300 + "/kurt", "nul\0/kurt"])
def test_a_name_that_no_file_can_have_is_refused(name, overwrite, tmp_path):
    error = refusal(Path(f"{tmp_path}/{name}.safetensors"), overwrite=overwrite)
    assert str(error).isprintable()
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_a_folder_is_refused(tmp_path):
    (tmp_path / "kurt.safetensors").mkdir()
    for overwrite in (False, True):
        refusal(tmp_path / "kurt.safetensors", overwrite=overwrite)


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"lone\ud800": torch.ones(1)}, {}),
        ({"a" * 513: torch.ones(1)}, {}),
        ({"__metadata__": torch.ones(1)}, {}),
        ({"__metadata__": torch.ones(1)}, {"a": "b"}),
        ({"a": torch.ones(1)}, {"a": "\ud800"}),
        ({"a": torch.ones(1)}, {"a": 1}),
        ({"a": torch.ones(1)}, {"a": {"b": "c"}}),
        ({"a": torch.ones(1)}, {"a": "x" * (2 << 20)}),
        ({"a": torch.ones(1, dtype=torch.complex64)}, {}),
        ({"a": torch.ones(1, dtype=torch.uint16)}, {}),
    ],
    ids=[
        *(
            "surrogate in a name",
            "long name",
            "tensor __metadata__",
            "both",
            "surrogate in metadata",
            "number",
            "nested",
        ),
        *("mostly header", "complex", "uint16"),
    ],
)
def test_what_the_reader_would_refuse_is_not_written(tensors, metadata, old):
    error = refusal(old, tensors, metadata)
    assert str(error).isprintable() and writing.TEMPORARY not in str(error)


class Broken(OSError):
    pass


@pytest.mark.parametrize("step", ["open", "fsync", "compare", "chmod", "replace"])
def test_a_step_that_fails_leaves_the_old_file_and_no_temporary(step, old, monkeypatch):
    def fail(*_, **__):
        raise Broken(errno.EIO, "the disk is on fire")

    if step == "compare":
        monkeypatch.setattr(writing, "_require_readable", fail)
    else:
        monkeypatch.setattr(os, step, fail)
    assert "on fire" in str(refusal(old))


def test_a_cancelled_write_leaves_the_old_file_and_no_temporary(old, monkeypatch):
    def cancel(_):
        raise KeyboardInterrupt

    before = old.read_bytes()
    monkeypatch.setattr(os, "fsync", cancel)
    with pytest.raises(KeyboardInterrupt):
        files.write(old, {"a": torch.ones(1000)}, overwrite=True)
    assert old.read_bytes() == before and not leftovers(old.parent)


@posix
def test_without_hard_links_a_failing_rename_does_not_leave_an_empty_file(tmp_path, monkeypatch):
    def fail(*_):
        raise Broken(errno.EPERM, "not here")

    monkeypatch.setattr(os, "link", fail)
    monkeypatch.setattr(os, "replace", fail)
    refusal(tmp_path / "kurt.safetensors", overwrite=False)
    assert not list(tmp_path.iterdir())


@posix
def test_without_hard_links_a_fresh_file_is_written_and_an_old_one_kept(tmp_path, monkeypatch):
    def fail(*_):
        raise Broken(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", fail)
    path = tmp_path / "kurt.safetensors"
    files.write(path, {"a": torch.ones(1)}, overwrite=False)
    monkeypatch.setattr(Path, "exists", lambda _: False)  # as if the old file had come at the last moment
    assert "exists" in str(refusal(path, overwrite=False))


@posix
def test_a_file_system_that_cannot_sync_folders_is_no_failure(old, monkeypatch):
    """As vboxsf and others: fsync of a folder is EINVAL, and the file has its name already."""
    fsync = os.fsync

    def files_only(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    files.write(old, {"a": torch.ones(1)}, overwrite=True)
    assert files.read(old).tensors["a"].item() == 1


@posix
def test_a_folder_that_cannot_be_synced_is_an_error_that_does_not_deny_the_change(old, monkeypatch):
    fsync = os.fsync

    def files_only(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise Broken(errno.EIO, "the disk is on fire")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    with pytest.raises(FileError, match="is written, but") as caught:
        files.write(old, {"a": torch.ones(1)}, overwrite=True)
    assert "Nothing was changed" not in str(caught.value)
    assert files.read(old).tensors["a"].item() == 1 and not leftovers(old.parent)


@pytest.mark.parametrize("at", [0, 9, 40, -1])
def test_a_disk_that_gives_back_other_bytes_is_noticed(at, old, monkeypatch):
    """A flipped bit in the length, the header or the data, on its way to the disk."""
    fsync = os.fsync

    def corrupting(descriptor):
        fsync(descriptor)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            place = at % os.fstat(descriptor).st_size
            [byte] = os.pread(descriptor, 1, place)
            os.pwrite(descriptor, bytes([byte ^ 1]), place)

    monkeypatch.setattr(os, "fsync", corrupting)
    error = refusal(old)
    assert writing.TEMPORARY not in str(error) and "Check the disk" in error.remedy


@pytest.mark.skipif(not hasattr(os, "fdatasync"), reason="one kind of waiting for all")
@pytest.mark.parametrize("stretch", range(6))
def test_a_stretch_that_comes_back_as_other_bytes_is_noticed_while_others_are_written(stretch, old, monkeypatch):
    """The last of the six is what is left of the header and the data after five of 4 KiB."""
    done = []

    def corrupting(sync):
        def synced(descriptor):
            sync(descriptor)
            if stat.S_ISREG(os.fstat(descriptor).st_mode) and len(done) == stretch:
                place = 4096 * stretch + 7
                [byte] = os.pread(descriptor, 1, place)
                os.pwrite(descriptor, bytes([byte ^ 1]), place)
            done.append(sync)

        return synced

    monkeypatch.setattr(syncing, "STRETCH", 4096)
    tensors = {"a": torch.arange(5 << 10, dtype=torch.float32)}
    files.write(old, tensors, overwrite=True)
    assert torch.equal(files.read(old).tensors["a"], tensors["a"])
    for name in ("fdatasync", "fsync"):
        monkeypatch.setattr(os, name, corrupting(getattr(os, name)))
    assert "Check the disk" in refusal(old, tensors).remedy


# Order of the steps


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_file_is_on_the_disk_before_it_gets_its_name_and_the_folder_after(overwrite, tmp_path, monkeypatch):
    steps: list[tuple[str, int]] = []
    path = tmp_path / "kurt.safetensors"

    def recorded(name, real, size):
        def step(*args, **kwargs):
            steps.append((name, size(*args)))
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, step)

    def synced(descriptor):
        status = os.fstat(descriptor)
        return -1 if stat.S_ISDIR(status.st_mode) else status.st_size

    recorded("fsync", os.fsync, synced)
    recorded("replace", os.replace, lambda source, _: os.stat(source).st_size)
    recorded("link", os.link, lambda source, _: os.stat(source).st_size)
    recorded("rename", os.rename, lambda source, _: os.stat(source).st_size)
    files.write(path, {"a": torch.ones(1000)}, overwrite=overwrite)
    size = path.stat().st_size
    named = ("replace" if overwrite else "rename" if os.name == "nt" else "link", size)
    assert steps == [("fsync", size), named, *([("fsync", -1)] if os.name != "nt" else [])]


@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
def test_the_kernel_sees_write_then_fsync_then_rename_then_fsync_of_the_folder(tmp_path):
    trace = tmp_path / "trace"
    script = (
        "import torch; from lora_ops import files; "
        "[files.write('kurt.safetensors', {'a': torch.ones(100_000)}, overwrite=over) for over in (False, True)]"
    )
    calls = "write,fsync,fdatasync,rename,renameat,renameat2,link,linkat"
    strace = ["strace", "-f", "-y", "--seccomp-bpf", "-o", str(trace), "-e", f"trace={calls}"]
    root = str(Path(files.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([*strace, sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True)
    if b"ptrace" in done.stderr or b"PTRACE" in done.stderr:
        pytest.skip("tracing is not permitted here")
    assert done.returncode == 0, done.stderr
    seen = []
    for line in trace.read_text().splitlines():  # a call that another thread interrupts ends on a line of its own
        call = re.match(r"\d+\s+(\w+)\(", line)
        if call and (writing.TEMPORARY in line or f"<{tmp_path}>" in line):
            seen.append("folder" if call[1] == "fsync" and f"<{tmp_path}>" in line else call[1])
    assert [step for step, after in zip(seen, [*seen[1:], ""], strict=True) if step != after] == [
        *("write", "fsync", "link", "folder"),
        *("write", "fsync", "rename", "folder"),
    ]


# Races and kills


@posix
@pytest.mark.parametrize("hard_links", [True, False], ids=["hard links", "no hard links"])
def test_of_eight_processes_saving_to_the_same_names_each_name_has_one_winner(hard_links, tmp_path):
    context, writers, names = children.context(), 8, 20
    start, saved = context.Barrier(writers), context.Queue()
    processes = [
        context.Process(target=children.save_all_names, args=(str(tmp_path), writer, names, hard_links, start, saved))
        for writer in range(writers)
    ]
    for process in processes:
        process.start()
    reports = [saved.get(timeout=60) for _ in range(writers * names)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    won = sorted((name, number) for name, number, _ in reports if number is not None)
    assert [name for name, _ in won] == list(range(names)), "a save was lost or done twice"
    assert won == [(name, children.stamp(tmp_path / f"{name}.safetensors")) for name in range(names)]
    assert all("exists" in text for _, number, text in reports if number is None)
    assert not leftovers(tmp_path)


@posix
def test_eight_processes_saving_under_the_next_number_lose_nothing(tmp_path):
    context, writers, count = children.context(), 8, int(os.environ.get("LORA_OPS_SAVES", "10"))
    start, saved = context.Barrier(writers), context.Queue()
    processes = [
        context.Process(target=children.save_numbered, args=(str(tmp_path), writer, count, start, saved))
        for writer in range(writers)
    ]
    for process in processes:
        process.start()
    reports = dict(saved.get(timeout=120) for _ in range(writers * count))
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert sorted(reports) == list(range(writers * count))
    assert sorted(reports.values()) == [f"x_{number:05}_" for number in range(1, writers * count + 1)]
    assert all(children.stamp(tmp_path / name) == number for number, name in reports.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(reports.values())


KILLS = {"write": 15, "lazy": 10, "folder": 10, "merge": 10} if os.name != "nt" else {}


@posix
@pytest.mark.parametrize("overwrite", [False, True], ids=["fresh", "overwriting"])
@pytest.mark.parametrize("how", KILLS)
def test_a_killed_writer_leaves_the_old_file_or_the_whole_new_one(how, overwrite, tmp_path):
    context, kills = children.context(), int(os.environ.get("LORA_OPS_KILLS", KILLS[how]))
    save, stamp = children.SAVES[how]
    path = tmp_path / "kurt.safetensors"
    started = time.monotonic()
    save(path, 1, overwrite=False)
    once, last = time.monotonic() - started, 1
    if not overwrite:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for _ in range(kills):
        target = children.overwrite_for_ever if overwrite else children.save_fresh_for_ever
        child = context.Process(target=target, args=(str(path), last + 1, how))
        before = leftovers(tmp_path)
        child.start()
        started = time.monotonic()
        while len(leftovers(tmp_path)) <= len(before) and time.monotonic() < started + 10:
            time.sleep(0.0005)  # until it has begun its first file
        time.sleep(random.random() * (0.03 + 4 * once))
        child.kill()
        child.join()
        if overwrite:
            last = stamp(path)
        for file in [] if overwrite else tmp_path.glob("*.safetensors"):
            assert stamp(file) == int(file.stem)
            last = max(last, int(file.stem))
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    orphans = leftovers(tmp_path)
    assert len(orphans) > kills / 10 and (last > 1 or kills < 50), "too few kills met a writer at work"
    fresh, *aged = orphans
    for orphan in aged:
        os.utime(orphan, (time.time() - writing.ORPHAN_AGE - 60,) * 2)
    save(path, last + 1, overwrite=True)
    assert leftovers(tmp_path) == [fresh]


def test_only_our_own_old_temporaries_are_removed(tmp_path):
    aged = time.time() - writing.ORPHAN_AGE - 60
    mine, young = f".a.1-0{writing.TEMPORARY}", f".b.1-0{writing.TEMPORARY}"
    others = [young, "a.safetensors", f"visible{writing.TEMPORARY}", ".hidden", f".a{writing.TEMPORARY}.safetensors"]
    for name in (mine, *others):
        (tmp_path / name).write_bytes(b"x")
        if name != young:
            os.utime(tmp_path / name, (aged, aged))
    for name in (f".folder{writing.TEMPORARY}", f".young{writing.TEMPORARY}", "folder"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").write_bytes(b"x")
        if ".young" not in name:
            os.utime(tmp_path / name, (aged, aged))
    files.write(tmp_path / "kurt.safetensors", {"a": torch.ones(1)}, overwrite=False)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*others, f".young{writing.TEMPORARY}", "folder", "kurt.safetensors"}
