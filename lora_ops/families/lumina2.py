"""Lumina Image 2.0 and Z-Image: one architecture, to which diffusers gives two sets of names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

from .base import Family, Naming, Place, Shapes, denoiser, layer, table
from .language import GEMMA2, QWEN3_4B

_MODULATED = ("layers.{}", "noise_refiner.{}")
_CONTEXT = "context_refiner.{}"
_NORMS = ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")


def _blocks(attention: str, rest: Mapping[str, str], context: Mapping[str, str]) -> Iterator[Naming]:
    """Rows of all blocks; the context's are not modulated, which may give their norms other names."""
    for block in (*_MODULATED, _CONTEXT):
        yield Naming(f"{block}.attention.qkv", tuple(f"{block}.{attention}.to_{name}" for name in "qkv"))
        yield Naming(f"{block}.attention.out", (f"{block}.{attention}.to_out.0",))
        for name in "qk":
            yield Naming(f"{block}.attention.{name}_norm", (f"{block}.{attention}.norm_{name}",))
        for native, diffusers in (context if block == _CONTEXT else rest).items():
            yield Naming(f"{block}.{native}", (f"{block}.{diffusers}",))


def _rows(names: Mapping[str, str]) -> Iterator[Naming]:
    for native, diffusers in names.items():
        yield Naming(native, (diffusers,))


_CONTEXT_LUMINA2 = {
    **{f"feed_forward.w{number}": f"feed_forward.linear_{number}" for number in (1, 2, 3)},
    **dict(zip(_NORMS, ("norm1", "norm2", "ffn_norm1", "ffn_norm2"), strict=True)),
}
LUMINA2_ROWS = (
    *_blocks(
        "attn",
        _CONTEXT_LUMINA2 | {"attention_norm1": "norm1.norm", "adaLN_modulation.1": "norm1.linear"},
        _CONTEXT_LUMINA2,
    ),
    *_rows(
        {
            "x_embedder": "x_embedder",
            "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
            "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
            "cap_embedder.0": "time_caption_embed.caption_embedder.0",
            "cap_embedder.1": "time_caption_embed.caption_embedder.1",
            "final_layer.adaLN_modulation.1": "norm_out.linear_1",
            "final_layer.linear": "norm_out.linear_2",
        }
    ),
)

_ALIKE = {name: name for name in (*(f"feed_forward.w{number}" for number in (1, 2, 3)), *_NORMS)}
_PATCH = "2-1"  # diffusers' name for the only patch size: 2 in space, 1 in time
Z_IMAGE_ROWS = (
    *_blocks("attention", _ALIKE | {"adaLN_modulation.0": "adaLN_modulation.0"}, _ALIKE),
    *_rows(
        {
            "x_embedder": f"all_x_embedder.{_PATCH}",
            "t_embedder.mlp.0": "t_embedder.mlp.0",
            "t_embedder.mlp.2": "t_embedder.mlp.2",
            "cap_embedder.0": "cap_embedder.0",
            "cap_embedder.1": "cap_embedder.1",
            "final_layer.adaLN_modulation.1": f"all_final_layer.{_PATCH}.adaLN_modulation.1",
            "final_layer.linear": f"all_final_layer.{_PATCH}.linear",
        }
    ),
)
_PADDING = {name: name for name in ("x_pad_token", "cap_pad_token")}


def _lumina2_places(shapes: Shapes) -> Iterator[Place]:
    """The host lets Lumina answer to Z-Image's names too (and takes k and v for as long as q, which they are not)."""
    yield from table(LUMINA2_ROWS)(shapes)
    for place in table(Z_IMAGE_ROWS)(shapes):
        if place.diffusers:
            yield place._replace(native=None)


def shapes(
    *, width: int, blocks: int, head: int, groups: int, inner: int, context: int, time: int, first: int
) -> dict[str, tuple[int, ...]]:
    """The weights of a transformer with so many heads of keys (groups) as wide as head.

    time is the width of the modulating vector, first the place of the linear layer in a block's modulation.
    """
    found = layer("x_embedder", width, 64) | layer("cap_embedder.0", context, bias=False)
    found |= layer("cap_embedder.1", width, context)
    found |= layer("t_embedder.mlp.0", 1024, 256) | layer("t_embedder.mlp.2", time, 1024)
    for stack, count in zip((*_MODULATED, _CONTEXT), (blocks, 2, 2), strict=True):
        for number in range(count):
            block = stack.format(number)
            found |= layer(f"{block}.attention.qkv", width + 2 * groups * head, width, bias=False)
            found |= layer(f"{block}.attention.out", width, width, bias=False)
            found |= {f"{block}.attention.{name}_norm.weight": (head,) for name in "qk"}
            found |= {f"{block}.feed_forward.w{name}.weight": (inner, width) for name in (1, 3)}
            found |= layer(f"{block}.feed_forward.w2", width, inner, bias=False)
            found |= {f"{block}.{norm}.weight": (width,) for norm in _NORMS}
            if stack != _CONTEXT:
                found |= layer(f"{block}.adaLN_modulation.{first}", width * 4, time)
    return found | layer("final_layer.linear", 64, width) | layer("final_layer.adaLN_modulation.1", width, time)


def z_image_shapes() -> Shapes:
    found = shapes(width=3840, blocks=30, head=128, groups=30, inner=10240, context=2560, time=256, first=0)
    return found | {f"{name}_pad_token": (1, 3840) for name in ("x", "cap")}


def _recognises(shapes: Shapes, *, first: int) -> bool:
    marks = ("noise_refiner.0.attention.k_norm", f"layers.0.adaLN_modulation.{first}")
    return all(f"{mark}.weight" in shapes for mark in marks)


LUMINA2 = Family(
    "lumina2",
    "Lumina Image 2.0",
    components=(
        denoiser(
            _lumina2_places,
            partial(shapes, width=2304, blocks=26, head=96, groups=8, inner=9216, context=2304, time=1024, first=1),
        ),
        GEMMA2,
    ),
    recognises=partial(_recognises, first=1),
)

Z_IMAGE = Family(
    "z_image",
    "Z-Image",
    components=(denoiser(table(Z_IMAGE_ROWS), z_image_shapes, parameters=_PADDING), QWEN3_4B),
    recognises=partial(_recognises, first=0),
)
