"""The checked reader: what it refuses, how fast, in which words, and that it agrees with the safetensors library."""

from __future__ import annotations

import json
import math
import os
import random
import threading
import time
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from lora_ops import files
from lora_ops.errors import FileError
from lora_ops.files import reading
from lora_ops.landing import land, merged
from lora_ops.lora import from_file, read_lora
from lora_ops.receipt import receipt
from lora_ops.stack import Entry
from tests.lora_ops import corpus

REFUSED = (*corpus.STRUCTURAL, *corpus.VALUES)
FUZZ = int(os.environ.get("LORA_OPS_FUZZ", "20000"))  # mutated files; a release deserves a million


def by_name(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def placed(folder: Path, content: bytes) -> str:
    path = folder / "kurt.safetensors"
    path.write_bytes(content)
    return str(path)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal bit for bit: NaN, minus zero and fp8 have no useful ==."""
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and one.contiguous().reshape(-1).view(torch.uint8).equal(other.contiguous().reshape(-1).view(torch.uint8))
    )


def all_same(ours, theirs) -> bool:
    return ours.keys() == theirs.keys() and all(same(ours[name], theirs[name]) for name in ours)


@by_name(REFUSED)
def test_a_bad_file_is_refused_with_its_name_and_a_remedy(case, tmp_path):
    path = placed(tmp_path, case.make())
    with pytest.raises(FileError) as caught:
        files.read(path)
    assert case.phrase in str(caught.value)
    assert path in str(caught.value)
    assert caught.value.file == path
    assert caught.value.remedy.endswith(".")


@by_name(corpus.STRUCTURAL)
def test_the_header_alone_refuses_what_the_whole_file_refuses(case, tmp_path):
    path = placed(tmp_path, case.make())
    with pytest.raises(FileError):
        files.read_header(path)


@pytest.mark.parametrize("name", ["missing.safetensors", "nul\0.safetensors", "lone\ud800.safetensors", ".", "a" * 300])
@pytest.mark.parametrize("reader", [files.read, files.read_header, files.sha256, read_lora])
def test_a_path_that_is_no_file_is_refused(reader, name, tmp_path):
    with pytest.raises(FileError) as caught:
        reader(str(tmp_path / name))
    assert caught.value.remedy and str(caught.value).isprintable()


@by_name(corpus.STRUCTURAL)
def test_a_structural_fault_is_refused_within_50_ms(case, tmp_path):
    path = placed(tmp_path, case.make())

    def once() -> float:
        start = time.thread_time()  # of this thread alone: nothing here waits, and other tests may be running
        with pytest.raises(FileError):
            files.read(path)
        return time.thread_time() - start

    assert min(once() for _ in range(3)) < 0.05


@by_name(corpus.GOOD)
def test_a_good_file_reads_bit_for_bit_as_the_library_reads_it(case, tmp_path):
    path = placed(tmp_path, case.make())
    ours = files.read(path)
    assert all_same(ours.tensors, safetensors.torch.load_file(path))
    with safetensors.safe_open(path, "pt") as theirs:
        assert dict(ours.metadata) == (theirs.metadata() or {})


@by_name(corpus.GOOD)
def test_tensors_read_one_at_a_time_are_those_of_the_whole_file(case, tmp_path):
    path = placed(tmp_path, case.make())
    header = files.read_header(path)
    assert all_same(dict(files.read_tensors(header, header.entries)), files.read(path).tensors)


@by_name(corpus.GOOD)
def test_every_tensor_is_aligned_for_its_dtype(case, tmp_path):
    for tensor in files.read(placed(tmp_path, case.make())).tensors.values():
        assert tensor.data_ptr() % tensor.dtype.itemsize == 0


def test_alpha_is_read_as_it_is_stored(tmp_path):
    for stored in (torch.tensor(4), torch.tensor(4.0).bfloat16(), torch.full((1,), 4.0), torch.tensor(0.0)):
        [adapter] = read_lora(placed(tmp_path, corpus.saved(corpus.lora(alpha=stored))())).modules.values()
        assert adapter.alpha == float(stored)


@pytest.mark.parametrize("text", ["\x1b[2J\x1b[31m", "\r\nINFO all is well", "‮gnp.exe", "\x00", "​", "\x9b1A", "\u2028"])
def test_a_name_that_would_forge_a_log_line_is_escaped(text, tmp_path):
    by_tensor = corpus.packed({f"a{text}": ("F32", (1,), bytes.fromhex("0000c07f"))})
    by_fault = corpus.container({f"a{text}": corpus.entry([2], 0, 4)}, bytes(4))
    by_dtype = corpus.container({"a": corpus.entry([1], 0, 4, dtype=text)}, bytes(4))
    twice = json.dumps({f"a{text}": corpus.GOOD_ENTRY}).encode()
    by_twice = corpus.container(twice[:-1] + b"," + twice[1:], bytes(4))
    by_length = corpus.container({text * 600: corpus.GOOD_ENTRY}, bytes(4))
    for content in (by_tensor, by_fault, by_dtype, by_twice, by_length):
        with pytest.raises(FileError) as caught:
            files.read(placed(tmp_path, content))
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 600
    with pytest.raises(FileError) as caught:
        read_lora(placed(tmp_path, corpus.saved({f"a{text}": torch.ones(1)})()))
    assert str(caught.value).isprintable()


def test_the_name_of_the_file_itself_is_escaped(tmp_path):
    with pytest.raises(FileError) as caught:
        files.read(tmp_path / "a\x1b[2J‮.safetensors")
    assert str(caught.value).isprintable()


def test_a_named_pipe_does_not_stop_the_reader(tmp_path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("no named pipes here")
    os.mkfifo(tmp_path / "kurt.safetensors")
    failures: list[FileError] = []

    def read():
        try:
            files.read(tmp_path / "kurt.safetensors")
        except FileError as error:
            failures.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(5)
    assert failures and "ordinary file" in str(failures[0])


def test_a_file_larger_than_memory_is_refused_by_its_size(tmp_path, monkeypatch):
    def no_room(*_):
        raise MemoryError

    path = placed(tmp_path, corpus.WHOLE)
    monkeypatch.setattr(reading.np, "empty", no_room)
    with pytest.raises(FileError, match="needs 56 bytes of memory"):
        files.read(path)


def test_headers_of_checkpoints_may_be_larger_than_those_of_loras(tmp_path):
    """A length over a LoRA's limit, in a file too short for it: which fault is named tells which limit held."""
    path = placed(tmp_path, corpus.container(b"{}", length=17 * corpus.MIB))
    with pytest.raises(FileError, match="cut short"):
        files.read_header(path)
    with pytest.raises(FileError, match="over the limit"):
        files.read_header(path, files.LORA_HEADER)


# Files that change under the reader


TICK = 0.012  # seconds: Linux before 6.13 stamps two writes within one tick of its clock with the same time


def filled(value: int, size: int = 1 << 20) -> bytes:
    return corpus.packed({name: ("U8", (size,), bytes([value]) * size) for name in "abcd"})


def values(tensors) -> set[int]:
    return {int(number) for tensor in tensors.values() for number in (tensor.min(), tensor.max())}


def rewrite(path: Path, value: int) -> None:
    path.write_bytes(filled(value))


def replace(path: Path, value: int) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(filled(value))
    os.replace(other, path)


def truncate_and_mend(path: Path, value: int) -> None:
    os.truncate(path, 2 << 20)
    rewrite(path, value)


def remove_and_write(path: Path, value: int) -> None:
    path.unlink()
    rewrite(path, value)


@pytest.mark.parametrize("change", [rewrite, replace, truncate_and_mend, remove_and_write])
@pytest.mark.parametrize("one_at_a_time", [False, True], ids=["whole", "one at a time"])
def test_a_file_that_changes_while_it_is_read_is_read_whole_or_refused(change, one_at_a_time, tmp_path):
    path = tmp_path / "kurt.safetensors"
    rewrite(path, 0)
    done = threading.Event()

    def keep_changing():
        value = 0
        while not done.wait(TICK + random.random() * 0.003):
            value = (value + 1) % 256
            change(path, value)

    def read_once():
        if not one_at_a_time:
            return files.read(path).tensors
        header = files.read_header(path)
        return dict(files.read_tensors(header, header.entries))

    changer = threading.Thread(target=keep_changing)
    changer.start()
    tries = whole = 0
    try:
        until = time.monotonic() + 60
        while (tries < 50 or not whole) and time.monotonic() < until:
            tries += 1
            try:
                found = values(read_once())
            except FileError as error:
                assert error.remedy
                continue
            assert len(found) == 1, "a mixture of two files"
            whole += 1
    finally:
        done.set()
        changer.join()
    assert whole


def test_a_change_between_the_reads_of_two_tensors_is_noticed(tmp_path):
    path = tmp_path / "kurt.safetensors"
    rewrite(path, 1)
    header = files.read_header(path)
    tensors = files.read_tensors(header, "abcd")
    next(tensors)
    time.sleep(TICK)
    with open(path, "r+b") as file:
        file.seek(header.data_start)
        file.write(bytes([2]) * (4 << 20))
    with pytest.raises(FileError, match="changed") as caught:
        next(tensors)
    assert caught.value.remedy


def test_a_file_replaced_since_its_header_was_read_is_noticed(tmp_path):
    path = tmp_path / "kurt.safetensors"
    rewrite(path, 1)
    header = files.read_header(path)
    replace(path, 2)
    with pytest.raises(FileError, match="changed"):
        dict(files.read_tensors(header, "a"))


@pytest.mark.parametrize("change", [rewrite, replace])
def test_other_content_has_another_identity(change, tmp_path):
    path = tmp_path / "kurt.safetensors"
    rewrite(path, 1)
    before = files.identity(path)
    assert before == files.identity(path) == files.read(path).identity == files.read_header(path).identity
    time.sleep(TICK)
    change(path, 2)
    assert files.identity(path) != before


def test_what_was_read_stays_when_the_file_is_cut_afterwards(tmp_path):
    path = tmp_path / "kurt.safetensors"
    rewrite(path, 7)
    tensors = files.read(path).tensors
    os.truncate(path, 0)
    assert values(tensors) == {7}


# Against the library, on mutated files

TOKENS = (
    *(b"-0", b"1e0", b"1.0", b"-1", b"NaN", b"Infinity", b"null", b"true", b"{}", b"[]", b'""', b"\xff", b"\0", b" "),
    *(str((1 << bits) + extra).encode() for bits in (31, 32, 62, 63, 64) for extra in (-1, 0)),
    *(
        rb'"\ud800"',
        rb'"\u0061"',
        b"[[[[",
        b"}}}}",
        b",",
        b":",
        b'"',
        b"\\",
        b"0",
        b"4",
        b"00",
        b"\t",
        b"\n",
        b"\xef\xbb\xbf",
    ),
    *(f'"{name}"'.encode() for name in (*corpus.DTYPES, "dtype", "shape", "data_offsets", "__metadata__", "U16", "F4")),
)


def fuzzed(seed: bytes, dice: random.Random) -> bytes:
    """The seed with one to three changes; half of them keep the header's length true."""
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        seed = dice.choice((flipped, cut, grown, retold, spliced, restructured, restructured))(seed, dice)
    return seed


def flipped(content: bytes, dice: random.Random) -> bytes:
    if not content:
        return content
    at = dice.randrange(min(len(content), dice.choice((8, 200, 1 << 20))))
    return content[:at] + bytes([dice.choice((0, 255, 127, 128, dice.randrange(256)))]) + content[at + 1 :]


def cut(content: bytes, dice: random.Random) -> bytes:
    return content[: dice.randrange(len(content) + 1)]


def grown(content: bytes, dice: random.Random) -> bytes:
    return content + dice.randbytes(dice.choice((1, 4, 8)))


def halves(content: bytes) -> tuple[bytes, bytes]:
    length = int.from_bytes(content[:8], "little")
    return content[8 : 8 + length], content[8 + length :]


def retold(content: bytes, dice: random.Random) -> bytes:
    """A token of the header put in the place of another."""
    header, data = halves(content)
    at = dice.randrange(len(header) + 1)
    end = min(len(header), at + dice.choice((0, 0, 1, 2, 4, 8)))
    return corpus.container(header[:at] + dice.choice(TOKENS) + header[end:], data)


def spliced(content: bytes, dice: random.Random) -> bytes:
    """A piece of the header repeated or left out."""
    header, data = halves(content)
    start, end = sorted((dice.randrange(len(header) + 1), dice.randrange(len(header) + 1)))
    return corpus.container(header[:end] + (header[start:end] if dice.random() < 0.5 else b"") + header[end:], data)


def restructured(content: bytes, dice: random.Random) -> bytes:
    """Valid JSON with one tensor's field changed, mostly by a little."""
    header, data = halves(content)
    try:
        fields = json.loads(header)
        name = dice.choice([name for name in fields if name != "__metadata__"])
        shape, offsets = list(fields[name]["shape"]), list(fields[name]["data_offsets"])
        match dice.randrange(9):
            case 0:
                fields[name]["dtype"] = dice.choice((*corpus.DTYPES, "U16", "C64", "F4", "F8_E8M0", ""))
            case 1:
                at = dice.randrange(len(offsets))
                offsets[at] += dice.choice((-8, -4, -1, 1, 4, 8, 1 << 62))
                fields[name]["data_offsets"] = offsets
            case 2:
                shape.insert(dice.randrange(len(shape) + 1), dice.choice((0, 1, 1, 2, 1 << 32, 1 << 62)))
                fields[name]["shape"] = shape
            case 3:
                fields[name]["shape"] = [math.prod(shape)]
            case 4:
                dice.shuffle(shape)
                fields[name]["shape"] = shape
            case 5:
                fields[name]["data_offsets"] = fields[dice.choice(list(fields))]["data_offsets"]
            case 6:
                fields[dice.choice(("", "x", "a.alpha", "__metadata__", "\ud800"))] = fields.pop(name)
            case 7:
                del fields[name][dice.choice(list(fields[name]))]
            case _:
                fields = dict(dice.sample(list(fields.items()), len(fields)))
        return corpus.container(json.dumps(fields).encode(), data)
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError):
        return content


def test_nothing_is_accepted_that_the_library_refuses_and_what_is_accepted_lands_or_is_refused_in_words(tmp_path):
    whole = (*corpus.GOOD, *corpus.SEMANTIC, *corpus.MISFITS)
    seeds = [case.make() for case in (*whole, *whole, *whole, *corpus.STRUCTURAL, *corpus.VALUES)]
    seeds = [seed for seed in seeds if len(seed) < 5000]
    dice = random.Random(20)
    path = str(tmp_path / "mutant.safetensors")
    accepted = 0
    for count in range(FUZZ):
        mutant = fuzzed(dice.choice(seeds), dice)
        Path(path).unlink(missing_ok=True)  # some file systems wait for the disk when a file is cut and rewritten
        Path(path).write_bytes(mutant)
        try:
            ours = files.read(path)
        except FileError as error:
            assert error.remedy and str(error).isprintable(), (count, mutant)
            continue
        except Exception as error:
            pytest.fail(f"mutant {count} raised {error!r}: {mutant!r}")
        accepted += 1
        try:
            safetensors.deserialize(mutant)
            theirs = safetensors.torch.load_file(path)
            with safetensors.safe_open(path, "pt") as opened:
                metadata = opened.metadata() or {}
        except Exception as error:
            pytest.fail(f"mutant {count} is accepted, the library says {error}: {mutant!r}")
        assert all_same(ours.tensors, theirs) and dict(ours.metadata) == metadata, (count, mutant)
        lora = from_file(ours)
        landing = land([Entry(lora, {"model": 1.0})], corpus.MODEL)
        (told,) = receipt(landing, 0.0).data["rows"]
        assert told["matched"] + sum(group["count"] for group in told["refused"]) == len(lora.modules) + len(
            lora.leftover
        )
        for (_, key), pieces in landing.pieces.items():
            merged(torch.ones(corpus.shape_of(key)), pieces)
    # A fuzzer whose mutants are all refused at the door would test nothing behind it.
    assert accepted > FUZZ / 20
