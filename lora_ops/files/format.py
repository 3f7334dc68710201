"""The safetensors format: what a file's header may say, every word of it checked.

Our rules are stricter than the library's (https://github.com/huggingface/safetensors#format): the tests hold us to
"nothing is accepted that the library refuses".
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BufferedReader
from typing import NoReturn

import torch

from ..errors import FileError, shown

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

MIB = 1 << 20
NAME_LIMIT = 512  # characters
TENSOR_LIMIT = 100_000
DIMENSION_LIMIT = 64  # torch's own operations go no further


# Bytes of header that a file may have before any of it is parsed.
LORA_HEADER = 16 * MIB
CHECKPOINT_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class Identity:
    """Which content of which file: any write, replacement or move changes one of these."""

    path: str  # real path
    size: int
    mtime_ns: int
    inode: int


@dataclass(frozen=True)
class Entry:
    """One tensor in a file; start and end count bytes from the start of the data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says about itself; entries stand in the order of their bytes."""

    path: str
    identity: Identity
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    data_start: int


def identity_of(real: str, stat: os.stat_result) -> Identity:
    """The identity of an open file with this real path."""
    return Identity(real, stat.st_size, stat.st_mtime_ns, stat.st_ino)


_STRANGERS: tuple[tuple[bytes, str, str], ...] = (
    (
        b"PK\x03\x04",
        "is a pickle or zip archive (torch.save), not a safetensors file",
        "Pickles can run code: get the .safetensors version, or convert it in a place you trust.",
    ),
    (
        b"\x80",
        "is a Python pickle, not a safetensors file",
        "Pickles can run code: get the .safetensors version, or convert it in a place you trust.",
    ),
    (b"version https://git-lfs", "is a Git-LFS pointer, not the file it points to", "Run `git lfs pull`."),
    (b"<", "is a web page, not a safetensors file", "Download it again; the site may ask you to log in."),
    (b"GGUF", "is a GGUF file, not a safetensors file", "Get the .safetensors version."),
)


def parse_header(file: BufferedReader, path: str, limit: int) -> Header:
    """The checked header of an open file. Raises FileError for anything but a whole, tight safetensors file."""
    ident = identity_of(os.path.realpath(path), os.fstat(file.fileno()))

    def refuse(what: str, remedy: str = "The file is damaged or incomplete: download it again.") -> NoReturn:
        raise FileError(f"{what}.", file=path, remedy=remedy)

    start = file.read(64)
    if not start:
        refuse("is empty")
    for magic, what, remedy in _STRANGERS:
        if start.startswith(magic) and start[8:9] != b"{":
            refuse(what, remedy)
    length = int.from_bytes(start[:8], "little")
    if ident.size < 10 or length < 2:
        refuse("is too short to be a safetensors file")
    if length > limit:
        refuse(f"is no safetensors file, or its header is over the limit of {limit:,} bytes")
    if length > ident.size - 8:
        refuse(f"is cut short: its header should have {length:,} bytes, the file has {ident.size:,}")
    if length > MIB and length * 2 > ident.size:
        refuse(f"is mostly header ({length:,} of {ident.size:,} bytes)")
    file.seek(8)
    raw = file.read(length)
    if len(raw) != length:
        refuse("changed while it was being read", "Load it again.")
    _require_few(raw.count(b'"data_offsets"'), refuse)  # seen before a million small objects are made
    fields = _parse(raw, refuse)
    metadata = _metadata(fields.pop("__metadata__", {}), refuse)
    _require_few(len(fields), refuse)
    entries = {name: _entry(name, value, refuse) for name, value in fields.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))
    position = 0
    for name, entry in entries.items():
        if entry.start != position:
            fault = "overlaps the one before it" if entry.start < position else "leaves a hole before it"
            refuse(f"tensor '{shown(name)}' {fault}")
        position = entry.end
    data = ident.size - 8 - length
    if position > data:
        refuse(f"is cut short: its tensors need {position:,} bytes, it has {data:,}")
    if position < data:
        refuse(f"has {data - position:,} bytes after its last tensor")
    return Header(path, ident, entries, metadata, 8 + length)


def _require_few(tensors: int, refuse: Callable[..., NoReturn]) -> None:
    if tensors > TENSOR_LIMIT:
        refuse(f"has {tensors:,} tensors; the limit is {TENSOR_LIMIT:,}")


def _parse(raw: bytes, refuse: Callable[..., NoReturn]) -> dict[str, object]:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
            refuse(f"names '{shown(twice)}' twice in its header")
        return fields

    def constant(name: str) -> NoReturn:
        refuse(f"has {name} in its header")

    def whole(digits: str) -> int:
        return -1 if digits.startswith("-") else int(digits)  # -0 is no whole number to the library

    if not raw.startswith(b"{"):
        refuse("is no safetensors file: its header is no JSON object")
    try:
        text = raw.decode("utf-8")
        fields = json.loads(text, object_pairs_hook=unique, parse_constant=constant, parse_int=whole)
    except (ValueError, RecursionError):
        refuse("has a header that is no valid JSON")
    return fields


def _metadata(value: object, refuse: Callable[..., NoReturn]) -> dict[str, str]:
    if not isinstance(value, dict) or not all(_clean(part) for item in value.items() for part in item):
        refuse("has metadata that is not a table of texts")
    return value


def _clean(text: object) -> bool:
    """A string without lone surrogates, which JSON can smuggle in and UTF-8 cannot hold."""
    if not isinstance(text, str):
        return False
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _entry(name: str, value: object, refuse: Callable[..., NoReturn]) -> Entry:
    if len(name) > NAME_LIMIT or not _clean(name):
        refuse(f"has a tensor name that is no text of at most {NAME_LIMIT} characters: '{shown(ascii(name))}'")
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        refuse(f"{_fault(name)} lacks its dtype, shape or offsets, or has more than these")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str):
        refuse(f"{_fault(name)} has a dtype that is no text")
    if dtype not in DTYPES:
        refuse(
            f"{_fault(name)} has the dtype '{shown(dtype)}', which no LoRA uses", "Convert the file to a float type."
        )
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        refuse(f"{_fault(name)} has a shape or offsets that are not whole numbers")
    size = DTYPES[dtype].itemsize
    # Zeros count as ones here: the library multiplies from the left, and torch needs a stride for every length.
    if len(shape) > DIMENSION_LIMIT or math.prod(max(length, 1) for length in shape) * size >= 1 << 63:
        refuse(f"{_fault(name)} has a shape that no memory can hold")
    needed = math.prod(shape) * size
    if offsets[1] - offsets[0] != needed:
        refuse(f"{_fault(name)} has {offsets[1] - offsets[0]:,} bytes, its shape needs {needed:,}")
    return Entry(DTYPES[dtype], tuple(shape), offsets[0], offsets[1])


def _fault(name: str) -> str:
    return f"tensor '{shown(name)}'"


def _counts(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)
