"""A corpus of bad, odd and good files, each row made by a function: no binaries in git."""

from __future__ import annotations

import io
import json
import math
import pickle
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import safetensors.torch
import torch

from lora_ops.lora import BIAS, Named, Target, TargetMap

MIB = 1 << 20
DTYPES = {
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
FLOATS = {name: dtype for name, dtype in DTYPES.items() if dtype.is_floating_point}
# The bits of NaN and of both infinities by dtype; e4m3fn has no infinity and two NaNs.
NON_FINITE = {
    "F64": (0x7FF8_0000_0000_0000, 0x7FF0_0000_0000_0000, 0xFFF0_0000_0000_0000),
    "F32": (0x7FC0_0000, 0x7F80_0000, 0xFF80_0000),
    "F16": (0x7E00, 0x7C00, 0xFC00),
    "BF16": (0x7FC0, 0x7F80, 0xFF80),
    "F8_E4M3": (0x7F, 0xFF),
    "F8_E5M2": (0x7E, 0x7C, 0xFC),
}
PATTERN = bytes(range(16))  # as any of the dtypes: finite


class Bad(NamedTuple):
    """A file that the reader must refuse, with this phrase in the message."""

    name: str
    make: Callable[[], bytes]
    phrase: str


class Refused(NamedTuple):
    """A well-formed file in which this module must be refused, with this phrase in the reason."""

    name: str
    make: Callable[[], bytes]
    module: str
    phrase: str


class Good(NamedTuple):
    """A file that must be read, equal to what the safetensors library reads; a LoRA must land on MODEL, too."""

    name: str
    make: Callable[[], bytes]


def container(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file, however wrong: the header is bytes or what JSON can say, length is what the file claims."""
    raw = header if isinstance(header, bytes) else json.dumps(header, ensure_ascii=False).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(shape: object, *offsets: object, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


def packed(tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]], metadata: object = None) -> bytes:
    """Tensors (dtype, shape, bytes) in the order given, so that they may be misaligned."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = entry(list(shape), len(data), len(data) + len(content), dtype=dtype)
        data += content
    return container(header, data)


def tensor_bytes(dtype: str, count: int) -> bytes:
    return (PATTERN * count)[: count * DTYPES[dtype].itemsize] if dtype != "BOOL" else (b"\0\1" * count)[:count]


def lora(
    module: str = "unet.block", *, alpha: torch.Tensor | None = None, **factors: torch.Tensor
) -> dict[str, torch.Tensor]:
    """A LoRA's tensors by name; factors replaces up and down."""
    pair = {"up": torch.linspace(-1, 1, 8).reshape(4, 2), "down": torch.linspace(1, 2, 6).reshape(2, 3)} | factors
    tensors = {f"{module}.lora_{name}.weight": factor for name, factor in pair.items()}
    return tensors if alpha is None else tensors | {f"{module}.alpha": alpha}


def saved(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> Callable[[], bytes]:
    return lambda: safetensors.torch.save(dict(tensors), None if metadata is None else dict(metadata))


def _raw(text: bytes, data: bytes = b"") -> Callable[[], bytes]:
    return lambda: container(text, data)


def _one(value: object, data: bytes = bytes(4)) -> Callable[[], bytes]:
    return lambda: container({"a": value}, data)


def _nest(before: bytes, depth: int, after: bytes) -> Callable[[], bytes]:
    return lambda: container(before + b"[" * depth + b"]" * depth + after)


def _torch_saved() -> bytes:
    file = io.BytesIO()
    torch.save({"a": torch.zeros(4)}, file)
    return file.getvalue()


def _sparse_names(count: int) -> bytes:
    names = (b'"%x":{"dtype":"U8","shape":[1],"data_offsets":[%d,%d]}' % (i, i, i + 1) for i in range(count))
    header = b"{" + b",".join(names) + b"}"
    return container(header + b" " * 8, bytes(len(header) + MIB))


def _twice_after_many(count: int) -> bytes:
    return container(b"{" + b",".join(b'"%x":0' % i for i in [*range(count), count - 1]) + b"}")


GOOD_ENTRY = entry([1], 0, 4)
GOOD_TEXT = json.dumps(GOOD_ENTRY).encode()
WHOLE = safetensors.torch.save(lora(), {"note": "a LoRA"})

STRUCTURAL: tuple[Bad, ...] = (
    # The file as a whole
    Bad("empty", lambda: b"", "is empty"),
    Bad("3 bytes", lambda: b"\x10\0\0", "too short"),
    Bad("only a length", lambda: (0).to_bytes(8, "little"), "too short"),
    Bad("zeros", lambda: bytes(4096), "too short"),
    Bad("truncated header", lambda: WHOLE[:40], "cut short"),
    Bad("truncated data", lambda: WHOLE[:-1], "cut short"),
    Bad("half the file", lambda: container({"a": entry([MIB], 0, 4 * MIB)}, bytes(2 * MIB)), "cut short"),
    Bad("header length 2^63", lambda: container(b"{}", length=1 << 63), "over the limit"),
    Bad("header length 2^64-1", lambda: container(b"{}", length=(1 << 64) - 1), "over the limit"),
    Bad("header length 101 MB", lambda: container(b"{}", length=101_000_000), "over the limit"),
    Bad("header length over a LoRA's limit", lambda: container(b"{}", length=16 * MIB + 1), "over the limit"),
    Bad("header length zero", lambda: container(b"", b"{}", length=0), "too short"),
    Bad("mostly header", lambda: container(b"{}" + b" " * 2 * MIB), "mostly header"),
    Bad("trailing bytes", lambda: WHOLE + b"\0", "after its last tensor"),
    Bad("a second file behind", lambda: WHOLE + WHOLE, "after its last tensor"),
    # What is no safetensors file at all
    Bad("pickle", lambda: pickle.dumps({"a": [1.0]}), "pickle"),
    Bad("pickle with a long body", lambda: pickle.dumps({"a": [1.0] * 1000}, protocol=2), "pickle"),
    Bad("torch.save", _torch_saved, "pickle or zip"),
    Bad("LFS pointer", lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    Bad("HTML", lambda: b"<!DOCTYPE html><html><title>Log in</title></html>", "web page"),
    Bad("GGUF", lambda: b"GGUF\x03\0\0\0" + bytes(64), "GGUF"),
    Bad("text", lambda: b"Entry not found", "no safetensors file"),
    # The header's JSON
    Bad("list header", _raw(b"[]"), "no JSON object"),
    Bad("space before the header", _raw(b" {}"), "no JSON object"),
    Bad("header without end", _raw(b'{"a":'), "no valid JSON"),
    Bad("two headers", _raw(b"{}{}"), "no valid JSON"),
    Bad("NUL behind the header", _raw(b"{}\0\0"), "no valid JSON"),
    Bad("header is not UTF-8", _raw(b'{"\xff\xfe":' + GOOD_TEXT + b"}", bytes(4)), "no valid JSON"),
    Bad("newline in a name", _raw(b'{"a\nb":' + GOOD_TEXT + b"}", bytes(4)), "no valid JSON"),
    Bad("deep JSON", _nest(b'{"a":', 100_000, b"}"), "no valid JSON"),
    Bad("deep JSON as dtype", _nest(b'{"a":{"shape":[1],"data_offsets":[0,4],"dtype":', 500, b"}}"), "no text"),
    Bad("deep JSON as metadata", _nest(b'{"__metadata__":', 200, b"}"), "table of texts"),
    Bad("NaN literal", _raw(b'{"a":NaN}'), "NaN in its header"),
    Bad("Infinity literal", _raw(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,-Infinity]}}'), "-Infinity"),
    Bad("number of 5000 digits", _raw(b'{"a":' + b"9" * 5000 + b"}"), "no valid JSON"),
    Bad("duplicate names", _raw(b'{"a":%b,"a":%b}' % (GOOD_TEXT, GOOD_TEXT), bytes(4)), "'a' twice"),
    Bad("duplicate field", _raw(b'{"a":{"dtype":"F32",' + GOOD_TEXT[1:] + b"}", bytes(4)), "'dtype' twice"),
    Bad("duplicate __metadata__", _raw(b'{"__metadata__":{},"__metadata__":{}}'), "'__metadata__' twice"),
    Bad("duplicate in metadata", _raw(b'{"__metadata__":{"b":"1","b":"1"}}'), "'b' twice"),
    Bad("duplicate behind 20,000 names", lambda: _twice_after_many(20_000), "twice"),
    Bad("too many tensors", lambda: _sparse_names(100_001), "the limit is 100,000"),
    # Metadata
    Bad("nested metadata", lambda: container({"__metadata__": {"a": {"b": "c"}}}), "table of texts"),
    Bad("number in metadata", lambda: container({"__metadata__": {"a": 1}}), "table of texts"),
    Bad("null metadata", lambda: container({"__metadata__": None}), "table of texts"),
    Bad("metadata that is a text", lambda: container({"__metadata__": "a"}), "table of texts"),
    Bad("lone surrogate in metadata", _raw(rb'{"__metadata__":{"a":"\ud800"}}'), "table of texts"),
    Bad("lone surrogate in a metadata name", _raw(rb'{"__metadata__":{"\udfff":"a"}}'), "table of texts"),
    # Names
    Bad("lone surrogate in a name", _raw(rb'{"a\ud800":' + GOOD_TEXT + b"}", bytes(4)), "no text"),
    Bad("over-long name", lambda: container({"a" * 513: GOOD_ENTRY}, bytes(4)), "at most 512"),
    # One tensor's fields
    Bad("missing dtype", _one({"shape": [1], "data_offsets": [0, 4]}), "lacks its dtype"),
    Bad("missing shape", _one({"dtype": "F32", "data_offsets": [0, 4]}), "lacks its dtype"),
    Bad("missing offsets", _one({"dtype": "F32", "shape": [1]}), "lacks its dtype"),
    Bad("extra field", _one(GOOD_ENTRY | {"stride": [1]}), "more than these"),
    Bad("tensor that is a number", _one(4), "lacks its dtype"),
    Bad("tensor that is null", _one(None), "lacks its dtype"),
    Bad("unknown dtype", _one(entry([1], 0, 4, dtype="F33")), "'F33'"),
    Bad("complex", _one(entry([1], 0, 8, dtype="C64"), bytes(8)), "'C64'"),
    Bad("unsigned 16", _one(entry([2], 0, 4, dtype="U16")), "'U16'"),
    Bad("dtype in small letters", _one(entry([1], 0, 4, dtype="f32")), "'f32'"),
    Bad("dtype that is a number", _one(entry([1], 0, 4, dtype=32)), "no text"),
    Bad("shape with a fraction", _one(entry([1.0], 0, 4)), "whole numbers"),
    Bad("shape with a truth value", _one(entry([True], 0, 4)), "whole numbers"),
    Bad("shape that is a number", _one(entry(1, 0, 4)), "whole numbers"),
    Bad("negative length", _one(entry([-1], 0, 4)), "whole numbers"),
    Bad("negative lengths that cancel", _one(entry([-1, -1], 0, 4)), "whole numbers"),
    Bad("negative offset", _one(entry([1], -4, 0)), "whole numbers"),
    Bad("minus zero", _raw(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}', bytes(4)), "whole numbers"),
    Bad("three offsets", _one(entry([1], 0, 4, 4)), "whole numbers"),
    Bad("offset in letters", _one(entry([1], 0, "4")), "whole numbers"),
    Bad("offsets swapped", _one(entry([1], 4, 0)), "its shape needs"),
    Bad("wrong byte count for the shape", _one(entry([2], 0, 4)), "its shape needs"),
    Bad("bytes without shape", _one(entry([0], 0, 4)), "its shape needs"),
    Bad("overflow shape", _one(entry([1 << 62, 4], 0, 0), b""), "no memory can hold"),
    Bad("overflow shape with a zero", _one(entry([1 << 62, 1 << 62, 0], 0, 0), b""), "no memory can hold"),
    Bad("zero before an overflow", _one(entry([0, 1 << 62, 1 << 62], 0, 0), b""), "no memory can hold"),
    Bad("length over 64 bits", _one(entry([1 << 64, 0], 0, 0), b""), "whole numbers"),
    Bad("65 dimensions", _one(entry([1] * 65, 0, 4)), "no memory can hold"),
    Bad("shape bomb", _one(entry([(1 << 63) - 1] * 45_000, 0, 4)), "no memory can hold"),
    # Where tensors lie
    Bad("offset past the end", _one(entry([1 << 40], 0, 1 << 42)), "cut short"),
    Bad("starts late", _one(entry([1], 4, 8), bytes(8)), "leaves a hole"),
    Bad("hole", lambda: container({"a": GOOD_ENTRY, "b": entry([1], 8, 12)}, bytes(12)), "'b' leaves a hole"),
    Bad("overlap", lambda: container({"a": GOOD_ENTRY, "b": entry([1], 2, 6)}, bytes(6)), "'b' overlaps"),
    Bad("same bytes twice", lambda: container({"a": GOOD_ENTRY, "b": GOOD_ENTRY}, bytes(4)), "'b' overlaps"),
    Bad(
        "empty tensor in the middle", lambda: container({"a": GOOD_ENTRY, "b": entry([0], 2, 2)}, bytes(4)), "overlaps"
    ),
)

# How the main writers spell the two halves of a LoRA.
HALVES = {
    "kohya": (".lora_down.weight", ".lora_up.weight"),
    "PEFT": (".lora_A.weight", ".lora_B.weight"),
    "PEFT with a name": (".lora_A.default.weight", ".lora_B.default.weight"),
    "diffusers' scripts": (".lora.down.weight", ".lora.up.weight"),
    "attention processors": ("_lora.down.weight", "_lora.up.weight"),
    "transformers": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    "Mochi": (".lora_A", ".lora_B"),
}

# Every algebra: the factors of a file for a weight of MODEL. Those of a module that is called "linear" are for (4, 6).
_LORA = {"lora_up.weight": (4, 2), "lora_down.weight": (2, 6)}
_LOHA = {"hada_w1_a": (4, 2), "hada_w1_b": (2, 6), "hada_w2_a": (4, 2), "hada_w2_b": (2, 6)}
_LOKR = {"lokr_w1_a": (2, 2), "lokr_w1_b": (2, 3), "lokr_w2_a": (2, 2), "lokr_w2_b": (2, 2)}
_CORE = (2, 2, 3, 3)
ALGEBRAS: Mapping[str, tuple[str, Mapping[str, tuple[int, ...]]]] = {
    "LoRA": ("linear", _LORA),
    "LoRA of a convolution": ("conv", {"lora_up.weight": (4, 2, 1, 1), "lora_down.weight": (2, 6, 3, 3)}),
    "LoRA with a core": (
        "conv",
        {"lora_up.weight": (4, 2, 1, 1), "lora_mid.weight": _CORE, "lora_down.weight": (2, 6, 1, 1)},
    ),
    "DoRA": ("linear", {**_LORA, "dora_scale": (4, 1)}),
    "DoRA of inputs": ("linear", {**_LORA, "dora_scale": (1, 6)}),
    "DoRA of PEFT": ("linear", {"lora_B.weight": (4, 2), "lora_A.weight": (2, 6), "lora_magnitude_vector": (4,)}),
    "DoRA of ai-toolkit": ("linear", {**_LORA, "magnitude": (4,)}),
    "LoHa": ("linear", _LOHA),
    "LoHa of a convolution": ("conv", {**_LOHA, "hada_w1_b": (2, 54), "hada_w2_b": (2, 54)}),
    "LoHa with cores": (
        "conv",
        {
            **{name: shape[::-1] if name.endswith("_a") else shape for name, shape in _LOHA.items()},
            "hada_t1": _CORE,
            "hada_t2": _CORE,
        },
    ),
    "DoRA around LoHa": ("linear", {**_LOHA, "dora_scale": (4, 1)}),
    "LoKr": ("linear", _LOKR),
    "LoKr of matrices": ("linear", {"lokr_w1": (2, 3), "lokr_w2": (2, 2)}),
    "LoKr with a core": (
        "conv",
        {"lokr_w1": (2, 3), "lokr_w2_a": (2, 2), "lokr_w2_b": (2, 2), "lokr_t2": _CORE},
    ),
    "LoKr with two cores": (
        "conv",
        {
            "lokr_w1_a": (2, 2),
            "lokr_w1_b": (2, 3),
            "lokr_t1": (2, 2, 1, 1),
            "lokr_w2_a": (2, 2),
            "lokr_w2_b": (2, 2),
            "lokr_t2": _CORE,
        },
    ),
    "GLoRA with a core": (
        "conv",
        {
            "a1.weight": (6, 2, 1, 1),
            "a2.weight": (2, 6, 1, 1),
            "b1.weight": (4, 2, 1, 1),
            "b2.weight": (2, 6, 1, 1),
            "bm.weight": _CORE,
        },
    ),
    "GLoRA": ("linear", {"a1.weight": (6, 2), "a2.weight": (2, 6), "b1.weight": (4, 2), "b2.weight": (2, 6)}),
    "Diag-OFT": ("linear", {"oft_blocks": (2, 2, 2)}),
    "BOFT": ("linear", {"oft_blocks": (2, 2, 2, 2), "rescale": (4, 1)}),
    "OFT of PEFT": ("linear", {"oft_R.weight": (3, 1)}),
    "(IA)3 of LyCORIS": ("linear", {"weight": (4,), "on_input": ()}),
    "(IA)3 of PEFT": ("linear", {"ia3_l": (1, 6)}),
    "(IA)3 of PEFT on outputs": ("linear", {"ia3_l": (4, 1)}),
    "a difference": ("linear", {"diff": (4, 6)}),
    "a bias's difference": ("linear", {"diff_b": (4,)}),
    "a norm": ("norm", {"w_norm": (8,), "b_norm": (8,)}),
    "a LoRA with a bias": ("linear", {"lora_B.weight": (4, 2), "lora_A.weight": (2, 6), "lora_B.bias": (4,)}),
}

SHAPES = {"linear": (4, 6), "conv": (4, 6, 3, 3), "norm": (8,), "square": (32, 32)}


def _model() -> TargetMap:
    """A model of one part with a weight and a bias of each kind, called as in a file of ComfyUI's spelling."""
    targets = {name: Target("model", f"{name}.weight", shape) for name, shape in SHAPES.items()}
    biases = {f"{name}{BIAS}": Target("model", f"{name}.bias", shape[:1]) for name, shape in SHAPES.items()}
    names = {f"unet.{name}": Named(target, "comfy") for name, target in (targets | biases).items()}
    return TargetMap("none", names, lambda name: (names[name],) if name in names else (), (*targets.values(),))


MODEL = _model()


def shape_of(key: str) -> tuple[int, ...]:
    """Of a weight or bias of MODEL."""
    name, _, kind = key.partition(".")
    return SHAPES[name][:1] if kind == "bias" else SHAPES[name]


def factors(name: str, change: Mapping[str, tuple[int, ...] | None] | None = None) -> dict[str, torch.Tensor]:
    """The tensors of an algebra's file, all ones; change gives factors another shape, or none."""
    module, shapes = ALGEBRAS[name]
    wanted = {**shapes, **(change or {})}
    made = {f"unet.{module}.{factor}": torch.ones(shape) for factor, shape in wanted.items() if shape is not None}
    return {key: torch.zeros(()).int() if key.endswith("on_input") else tensor for key, tensor in made.items()}


def pair(dialect: str, *shapes: tuple[int, ...] | None) -> dict[str, torch.Tensor]:
    """down and up of these shapes as a dialect spells them."""
    ends = zip(HALVES[dialect], shapes, strict=True)
    return {f"unet.linear{end}": torch.ones(shape) for end, shape in ends if shape is not None}


def _nan(tensors: dict[str, torch.Tensor], key: str) -> Callable[[], bytes]:
    broken = tensors[key].clone()
    broken.view(-1)[-1] = math.nan
    return saved(tensors | {key: broken})


def _with_bits(dtype: str, bits: int) -> Callable[[], bytes]:
    """A tensor whose last value, of 33, is the one that is not finite."""
    size = DTYPES[dtype].itemsize
    return lambda: packed({"a": (dtype, (33,), tensor_bytes(dtype, 32) + bits.to_bytes(size, "little"))})


VALUES: tuple[Bad, ...] = (
    *(
        Bad(f"{bits:#x} in {dtype}", _with_bits(dtype, bits), "'a' holds NaN or Inf")
        for dtype, all_bits in NON_FINITE.items()
        for bits in all_bits
    ),
    Bad("alpha NaN", saved(lora(alpha=torch.tensor(math.nan))), "alpha' holds NaN or Inf"),
    Bad("alpha Inf", saved(lora(alpha=torch.tensor(math.inf))), "alpha' holds NaN or Inf"),
    *(
        Bad(f"NaN in a half of {dialect}", _nan(pair(dialect, (2, 6), (4, 2)), f"unet.linear{ends[1]}"), "holds NaN")
        for dialect, ends in HALVES.items()
    ),
    *(
        Bad(f"NaN in {name}", _nan(factors(name), key), f"'{key}' holds NaN or Inf")
        for name in ALGEBRAS
        for key in list(factors(name))[:1]
    ),
)

_FLOAT8 = torch.zeros(4, 2).to(torch.int8)
_UP = "lora_up.weight"

SEMANTIC: tuple[Refused, ...] = (
    Refused("missing up", saved({"m.lora_down.weight": torch.ones(2, 3)}), "m", "lacks its up"),
    Refused("missing down", saved({"m.lora_up.weight": torch.ones(4, 2)}), "m", "lacks its down"),
    Refused("alpha alone", saved(factors("LoRA") | {"m.alpha": torch.tensor(1.0)}), "m", "lacks its down, up"),
    Refused("rank mismatch", saved(lora("m", down=torch.ones(3, 3))), "m", "do not share one rank"),
    Refused("transposed", saved(lora("m", up=torch.ones(2, 4), down=torch.ones(3, 2))), "m", "do not share one rank"),
    Refused("rank zero", saved(lora("m", up=torch.ones(4, 0), down=torch.ones(0, 3))), "m", "no matrix"),
    Refused("1-d factors", saved(lora("m", up=torch.ones(4), down=torch.ones(3))), "m", "no matrix"),
    Refused("0-d factors", saved(lora("m", up=torch.tensor(1.0), down=torch.tensor(1.0))), "m", "no matrix"),
    Refused("kernel in up", saved(lora("m", up=torch.ones(4, 2, 3, 3))), "m", "do not share one rank"),
    Refused("int8 factor", saved(lora("m", up=_FLOAT8)), "m", "not a float type"),
    Refused("bool factor", saved(lora("m", up=_FLOAT8.bool())), "m", "not a float type"),
    Refused("alpha vector", saved(lora("m", alpha=torch.ones(2))), "m", "should be one number"),
    Refused("alpha without a value", saved(lora("m", alpha=torch.ones(0))), "m", "should be one number"),
    Refused(
        "two spellings of one module",
        saved(lora("m") | {"m.lora_A.weight": torch.ones(2, 3)}),
        "m",
        "two tensors for down",
    ),
    Refused("dora_scale that is no vector", saved(lora("m") | {"m.dora_scale": torch.ones(4, 3)}), "m", "no vector"),
    Refused("LoRA with a mid", saved(lora("m") | {"m.lora_mid.weight": torch.ones(3, 2, 3, 3)}), "m", "no core"),
    Refused("a bias without its LoRA", saved({"m.lora_B.bias": torch.ones(4)}), "m.bias", "not there or cannot be"),
    Refused(
        "two differences of one bias",
        saved(lora("m") | {"m.lora_B.bias": torch.ones(4), "m.diff_b": torch.ones(4)}),
        "m.bias",
        "two tensors for diff",
    ),
    Refused(
        "a difference and a norm's", saved({"m.diff": torch.ones(4), "m.w_norm": torch.ones(4)}), "m", "two tensors"
    ),
    Refused("a difference beside a LoRA", saved(lora("m") | {"m.diff": torch.ones(4, 3)}), "m", "no one algebra"),
    Refused("a difference of nothing", saved({"m.diff": torch.ones(4, 0)}), "m", "no weight has"),
    Refused("a whole number as a difference", saved({"m.diff_b": torch.ones(4).int()}), "m.bias", "not a float type"),
    Refused("reshape_weight", saved(lora("m") | {"m.reshape_weight": torch.tensor([99, 99])}), "m", "reshape_weight"),
    Refused("half a LoKr", saved({"m.lokr_w1": torch.ones(2, 2), "m.lokr_w2_b": torch.ones(2, 2)}), "m", "lacks its"),
    Refused(
        "half a LoHa",
        saved({f"m.hada_{name}": torch.ones(2, 2) for name in ("w1_a", "w1_b", "w2_a")}),
        "m",
        "lacks its hada_w2_b",
    ),
    Refused("OFT of no square blocks", saved({"m.oft_blocks": torch.ones(2, 2, 3)}), "m", "square blocks"),
    Refused("BOFT of odd blocks", saved({"m.oft_blocks": torch.ones(1, 4, 3, 3)}), "m", "no butterfly"),
    Refused("BOFT of too many stages", saved({"m.oft_blocks": torch.ones(3, 2, 2, 2)}), "m", "no butterfly"),
    Refused(
        "OFT with a rescale of another width",
        saved({"m.oft_blocks": torch.ones(2, 2, 2), "m.rescale": torch.ones(3, 1)}),
        "m",
        "for 4 outputs",
    ),
    Refused("PEFT's OFT of no size of block", saved({"m.oft_R.weight": torch.ones(2, 4)}), "m", "no size of block"),
    Refused("old OFT of PEFT", saved(lora() | {"m.oft_R": torch.ones(2, 4, 4)}), "m.oft_R", "no known factor name"),
    Refused("(IA)3 without on_input", saved(lora() | {"m.weight": torch.ones(4)}), "m.weight", "no known factor name"),
    Refused("(IA)3 without weight", saved(lora() | {"m.on_input": torch.tensor(0)}), "m", "lacks its ia3_weight"),
    Refused(
        "(IA)3 with a matrix",
        saved({"m.weight": torch.ones(4, 3), "m.on_input": torch.tensor(0)}),
        "m",
        "should be a vector",
    ),
    Refused(
        "DoRA of OneTrainer's OFT",
        saved({"m.oft_R.weight": torch.ones(2, 6), "m.dora_scale": torch.ones(4, 1)}),
        "m",
        "dora_scale around OFT",
    ),
    Refused("set_weight", saved(factors("LoRA") | {"m.set_weight": torch.ones(4, 3)}), "m", "has set_weight"),
    Refused("a norm that replaces", saved(lora("m") | {"n.key_norm.scale": torch.ones(4)}), "n.key_norm", "set_weight"),
    Refused(
        "a bundled text embedding",
        saved(lora("m") | {"bundle_emb.cat.clip_l": torch.ones(4, 8)}),
        "bundle_emb.cat.clip_l",
        "embeddings folder",
    ),
    Refused(
        "a LoRA for a reference picture",
        saved(lora("m") | {"blocks.0.self_attn.q_loras.down.weight": torch.ones(4, 8)}),
        "blocks.0.self_attn.q_loras.down.weight",
        "reference picture",
    ),
    *(
        Refused(f"{fault} in {dialect}", saved(pair(dialect, *shapes)), "unet.linear", phrase)
        for dialect in HALVES
        for fault, phrase, shapes in (
            ("no down", "lacks its down", (None, (4, 2))),
            ("no up", "lacks its up", ((2, 6), None)),
            ("transposed halves", "do not share one rank", ((6, 2), (2, 4))),
            ("two ranks", "do not share one rank", ((3, 6), (4, 2))),
        )
    ),
    *(
        Refused(f"{name} without its {lost}", saved(factors(name, {lost: None})), "unet.linear", "lacks its")
        for name, lost in (("LoHa", "hada_w1_b"), ("LoKr", "lokr_w1_a"), ("GLoRA", "b2.weight"), ("DoRA", _UP))
    ),
    *(
        Refused(f"{name} of two ranks", saved(factors(name, {factor: shape})), f"unet.{ALGEBRAS[name][0]}", phrase)
        for name, factor, shape, phrase in (
            ("LoHa", "hada_w1_a", (4, 3), "different shapes"),
            ("LoHa with cores", "hada_t1", (3, 3, 3, 3), "do not fit"),
            ("LoKr", "lokr_w1_a", (2, 3), "share no rank"),
            ("GLoRA", "b1.weight", (4, 3), "do not share one rank"),
            ("DoRA", "lora_up.weight", (4, 3), "do not share one rank"),
            ("LoRA with a core", "lora_mid.weight", (3, 2, 3, 3), "is no core"),
        )
    ),
    Refused("an unknown suffix", saved(lora("m") | {"m.wobble": torch.ones(1)}), "m.wobble", "no known factor name"),
    Refused("a suffix alone", saved(lora("m") | {".lora_up.weight": torch.ones(1)}), ".lora_up.weight", "no known"),
)


def _bomb(module: str, **tensors: tuple[int, ...]) -> Callable[[], bytes]:
    """A small file whose product would be gigabytes."""
    return saved({f"unet.{module}.{name.replace('__', '.')}": torch.ones(shape) for name, shape in tensors.items()})


def _misfits() -> Iterator[Refused]:
    """Whole modules that do not fit the weight of their name, or that have none."""
    for name, (module, _) in ALGEBRAS.items():
        if module == "linear" and not name.startswith(("a LoRA with", "(IA)3 of Ly")):
            wide = {"a bias's difference": (5,)}.get(name)
            tensors = {key.replace("linear", "square"): tensor for key, tensor in factors(name).items()}
            found = f"unet.square{BIAS}" if wide else "unet.square"
            yield Refused(f"{name} for a smaller weight", saved(tensors), found, "the weight has (32")
    for name, up, down, place in (
        ("a LoRA for a convolution", (4, 2, 1, 1), (2, 6, 3, 3), "linear"),
        ("a LoRA for a matrix", (4, 2), (2, 6), "conv"),
        ("as many numbers in another shape", (16, 2), (2, 64), "square"),
        ("a wrong number of inputs", (4, 2), (2, 7), "linear"),
        ("a LoRA stored transposed", (6, 2), (2, 4), "linear"),
    ):
        tensors = {f"unet.{place}.lora_up.weight": torch.ones(up), f"unet.{place}.lora_down.weight": torch.ones(down)}
        yield Refused(f"{name} on {place}", saved(tensors), f"unet.{place}", "the weight has (")
    yield Refused("a norm of another size", _bomb("norm", w_norm=(9,)), "unet.norm", "the weight has (8,)")
    yield Refused("a magnitude of another size", saved(factors("DoRA", {"dora_scale": (5, 1)})), "unet.linear", "5 out")
    wide = (30_000, 1)
    yield Refused("a bomb of two halves", _bomb("linear", lora_up__weight=wide, lora_down__weight=wide[::-1]),
                  "unet.linear", "update of (30000, 30000)")  # fmt: skip
    yield Refused("a bomb of a product of matrices", _bomb("linear", lokr_w1=(200, 200), lokr_w2=(200, 200)),
                  "unet.linear", "update of (40000, 40000)")  # fmt: skip
    yield Refused("a bomb of entries", _bomb("linear", hada_w1_a=wide, hada_w1_b=wide[::-1], hada_w2_a=wide,
                  hada_w2_b=wide[::-1]), "unet.linear", "update of (30000, 30000)")  # fmt: skip
    core = (1, 1, 100_000)
    yield Refused("a bomb of a core", _bomb("linear", lora_up__weight=(4, 1), lora_mid__weight=core,
                  lora_down__weight=core[1:]), "unet.linear", "update of (4, 100000, 100000)")  # fmt: skip
    yield Refused("a bomb of two cores", _bomb("linear", hada_w1_a=(1, 4), hada_w1_b=core[1:], hada_t1=core,
                  hada_w2_a=(1, 4), hada_w2_b=core[1:], hada_t2=core), "unet.linear", "update of (4, 100")  # fmt: skip
    yield Refused("a bomb of a product with a core", _bomb("linear", lokr_w1=(1, 1), lokr_w2_a=(1, 4),
                  lokr_w2_b=core[1:], lokr_t2=core), "unet.linear", "update of (4, 100000, 100000)")  # fmt: skip
    yield Refused("a bomb of a rank", _bomb("linear", lora_up__weight=(5, 50_000), lora_down__weight=(50_000, 6)),
                  "unet.linear", "update of (5, 6)")  # fmt: skip
    for name in ("lora_unet_double_blocks_0_img_attn_qkv", "unet.nowhere", "../../etc/passwd", "a\n\x1b[2JINFO fine"):
        yield Refused(f"a LoRA for {name!r}", saved(lora(name)), name, "no")


MISFITS = tuple(_misfits())

_CHECKPOINT = {f"blocks.{n}.weight": torch.ones(4, 4) for n in range(20)}

NO_LORA: tuple[Bad, ...] = (
    Bad("no tensors", lambda: container({}), "none of its 0 tensors"),
    Bad("metadata only", lambda: container({"__metadata__": {"a": "b"}}), "none of its 0 tensors"),
    Bad(
        "a checkpoint",
        saved({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(4, 4), "logit_scale": torch.tensor(1.0)}),
        "a checkpoint belongs",
    ),
    Bad(
        "a checkpoint of Black Forest Labs",
        saved({"double_blocks.0.img_attn.norm.key_norm.scale": torch.ones(4), "img_in.weight": torch.ones(4, 4)}),
        "a checkpoint belongs",
    ),
    *(
        Bad(f"a checkpoint with a stray {stray}", saved(_CHECKPOINT | {f"act{stray}": torch.ones(4)}), phrase)
        for stray, phrase in (
            (".alpha", "none of its 21"),
            (".magnitude", "none of its 21"),
            (".diff", "1 of its 21"),
            (".up.weight", "1 of its 21"),
        )
    ),
    Bad("a vocoder", saved({f"act.{n}.alpha": torch.ones(4) for n in range(4)}), "none of its 4"),
    Bad("a text embedding", saved({"clip_l": torch.ones(4, 8), "clip_g": torch.ones(4, 8)}), "embeddings folder"),
    Bad("an old text embedding", saved({"emb_params": torch.ones(4, 8)}), "embeddings folder"),
)


def _every_dtype(order: list[str]) -> bytes:
    return packed({name.lower(): (name, (3,), tensor_bytes(name, 3)) for name in order})


def _largest(dtype: str) -> bytes:
    info = torch.finfo(DTYPES[dtype])
    return safetensors.torch.save({"a": torch.tensor([info.max, info.min], dtype=torch.float64).to(DTYPES[dtype])})


_NAMES = ("", "ü.λ", "日本語", "🦊.lora_up.weight", "a b", 'say "a"', "back\\slash", "\0\x1b[2J", "‮.alpha", "a" * 512)

_CONTAINERS: tuple[Good, ...] = (
    *(Good(f"{name} vector", lambda name=name: _every_dtype([name])) for name in DTYPES),
    Good("every dtype, aligned", lambda: _every_dtype(sorted(DTYPES, key=lambda name: -DTYPES[name].itemsize))),
    Good("every dtype, misaligned", lambda: _every_dtype(["U8", *DTYPES])),
    Good(
        "header in another order than the data", lambda: container({"b": entry([1], 4, 8), "a": GOOD_ENTRY}, bytes(8))
    ),
    Good("no tensors", lambda: container({})),
    Good("spaces behind the header", lambda: container(json.dumps({"a": GOOD_ENTRY}).encode() + b" " * 99, bytes(4))),
    Good("newlines in the header", lambda: container(json.dumps({"a": GOOD_ENTRY}, indent=1).encode(), bytes(4))),
    Good("unpadded header", lambda: container(b'{"a":%b}' % GOOD_TEXT + b" " * (1 - len(GOOD_TEXT) % 2), bytes(4))),
    Good("names of all kinds", saved({name: torch.ones(1) for name in _NAMES})),
    Good("escaped name", _raw(rb'{"\u00fc\ud83e\udd8a":' + GOOD_TEXT + b"}", bytes(4))),
    Good("name that looks like a path", saved({"../../etc/passwd": torch.ones(1)})),
    Good("0-d", saved({"a": torch.tensor(3.5)})),
    Good("empty tensors", saved({"a": torch.ones(0), "b": torch.ones(3, 0, 2), "c": torch.ones(2)})),
    Good("64 dimensions", lambda: container({"a": entry([1] * 64, 0, 4)}, bytes(4))),
    Good("a long empty tensor", lambda: container({"a": entry([1 << 60, 0], 0, 0, dtype="U8")})),
    Good("minus zero and subnormals", saved({"a": torch.tensor([-0.0, 1e-45, -1e-45])})),
    *(Good(f"largest finite values of {name}", lambda name=name: _largest(name)) for name in FLOATS),
    Good("empty metadata", lambda: packed({"a": ("F32", (1,), bytes(4))}, {})),
    Good("empty texts in metadata", saved(lora(), {"": "", "note": ""})),
    Good("metadata of all kinds", saved(lora(), {"html": "<script>", "escape": "\x1b[2J\0", "bidi": "‮", "fox": "🦊"})),
    Good("metadata named like a field", saved(lora(), {"data_offsets": "data_offsets", "dtype": "F32"})),
    Good("large metadata", saved(lora(), {"ss_tag_frequency": '{"a, b": 1}' * 50_000})),
)


def _good_loras() -> Iterator[Good]:
    for name in ALGEBRAS:
        for dtype in (torch.float32, torch.bfloat16):
            tensors = {key: t.to(dtype) if t.is_floating_point() else t for key, t in factors(name).items()}
            yield Good(f"{name}, {str(dtype).removeprefix('torch.')}", saved(tensors))
    for dialect in HALVES:
        tensors = pair(dialect, (2, 6), (4, 2))
        yield Good(f"{dialect}, alone", saved(tensors))
        for alpha in ("alpha", "lora_alpha"):
            yield Good(f"{dialect} with {alpha}", saved(tensors | {f"unet.linear.{alpha}": torch.tensor(1.0)}))
    for dtype in FLOATS.values():
        tensors = {key: tensor.to(dtype) for key, tensor in factors("LoRA").items()}
        yield Good(f"LoRA in {str(dtype).removeprefix('torch.')} with empty metadata", saved(tensors, {}))
    for name, alpha in {
        "alpha 0": torch.tensor(0.0),
        "a negative alpha": torch.tensor(-1.0),
        "a whole alpha": torch.tensor(4),
        "an alpha of one element": torch.ones(1),
        "an alpha in a matrix": torch.ones(1, 1),
        "a half alpha": torch.tensor(2.0).half(),
    }.items():
        yield Good(f"LoRA with {name}", saved(factors("LoRA") | {"unet.linear.alpha": alpha}))
    mixed = {
        key: tensor.to(dtype)
        for (key, tensor), dtype in zip(factors("LoRA").items(), list(FLOATS.values())[2:4], strict=True)
    }
    yield Good("LoRA of two precisions", saved(mixed))
    yield Good("LoRA of zeros", saved({key: torch.zeros_like(tensor) for key, tensor in factors("LoRA").items()}))
    yield Good("LoRA of one rank", saved(factors("LoRA", {"lora_up.weight": (4, 1), "lora_down.weight": (1, 6)})))
    yield Good("LoRA of a rank above its weight's", saved(pair("kohya", (99, 6), (4, 99))))
    flat = {"lora_up.weight": (4, 2), "lora_down.weight": (2, 54)}
    yield Good("LoRA with a flat kernel", saved(factors("LoRA of a convolution", flat)))
    yield Good("LoRA, unaligned", lambda: packed({
        "unet.linear.lora_up.weight": ("BF16", (4, 1), bytes(8)),
        "unet.linear.alpha": ("F8_E4M3", (), b"\x38"),
        "unet.linear.lora_down.weight": ("BF16", (1, 6), bytes(12)),
    }))  # fmt: skip


LORAS = tuple(_good_loras())
GOOD = (*_CONTAINERS, *LORAS)
