"""FLUX.1, FLUX.2 and Chroma: Black Forest Labs' names and diffusers', which splits the fused projections."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from ..lora import Band
from .base import Family, Naming, Place, Shapes, denoiser, layer, table
from .text import CLIP_L, T5_ALONE, T5_SECOND

_DOUBLE, _SINGLE = "transformer_blocks.{}", "single_transformer_blocks.{}"  # diffusers' names
_FLUX1 = ("net.0.proj", "net.2")  # of a feed-forward's two layers
_FLUX2 = ("linear_in", "linear_out")


def _double(feed_forward: tuple[str, str]) -> Iterator[Naming]:
    """The double blocks: a stream of the image, one of the text."""
    for native, suffix, projections, output, norms in (
        ("img", "", "to_{}", "to_out.0", "norm_{}"),
        ("txt", "_context", "add_{}_proj", "to_add_out", "norm_added_{}"),
    ):
        block = f"double_blocks.{{}}.{native}"
        yield Naming(f"{block}_attn.qkv", tuple(f"{_DOUBLE}.attn.{projections.format(name)}" for name in "qkv"))
        yield Naming(f"{block}_attn.proj", (f"{_DOUBLE}.attn.{output}",))
        yield Naming(f"{block}_attn.norm.query_norm", (f"{_DOUBLE}.attn.{norms.format('q')}",))
        yield Naming(f"{block}_attn.norm.key_norm", (f"{_DOUBLE}.attn.{norms.format('k')}",))
        yield Naming(f"{block}_mlp.0", (f"{_DOUBLE}.ff{suffix}.{feed_forward[0]}",))
        yield Naming(f"{block}_mlp.2", (f"{_DOUBLE}.ff{suffix}.{feed_forward[1]}",))
        yield Naming(f"{block}_mod.lin", (f"{_DOUBLE}.norm1{suffix}.linear",))


def _embedders(diffusers: str, names: Mapping[str, str]) -> Iterator[Naming]:
    for native, name in names.items():
        yield Naming(f"{native}_in.in_layer", (f"{diffusers}.{name}_embedder.linear_1",))
        yield Naming(f"{native}_in.out_layer", (f"{diffusers}.{name}_embedder.linear_2",))


_QUERY_KEY = (
    Naming("single_blocks.{}.norm.query_norm", (f"{_SINGLE}.attn.norm_q",)),
    Naming("single_blocks.{}.norm.key_norm", (f"{_SINGLE}.attn.norm_k",)),
)
_ENDS = (
    Naming("img_in", ("x_embedder",)),
    Naming("txt_in", ("context_embedder",)),
    Naming("final_layer.linear", ("proj_out",)),
    # Black Forest Labs store shift before scale, diffusers scale before shift.
    Naming("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap=True),
)

ROWS = (
    *_double(_FLUX1),
    Naming("single_blocks.{}.linear1", (*(f"{_SINGLE}.attn.to_{name}" for name in "qkv"), f"{_SINGLE}.proj_mlp")),
    Naming("single_blocks.{}.linear2", (f"{_SINGLE}.proj_out",)),
    Naming("single_blocks.{}.modulation.lin", (f"{_SINGLE}.norm.linear",)),
    *_QUERY_KEY,
    *_embedders("time_text_embed", {"time": "timestep", "vector": "text", "guidance": "guidance"}),
    *_ENDS,
)
FLUX2_ROWS = (
    *_double(_FLUX2),
    Naming("single_blocks.{}.linear1", (f"{_SINGLE}.attn.to_qkv_mlp_proj",)),
    Naming("single_blocks.{}.linear2", (f"{_SINGLE}.attn.to_out",)),
    *_QUERY_KEY,
    *_embedders("time_guidance_embed", {"time": "timestep", "guidance": "guidance"}),
    *(
        Naming(f"{name}.lin", (f"{name}.linear",))
        for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
    ),
    *_ENDS,
)
CHROMA_ROWS = (
    *ROWS,
    *(
        Naming(f"distilled_guidance_layer.{name}", (f"distilled_guidance_layer.{name}",))
        for name in ("in_proj", "out_proj")
    ),
    *(
        Naming(f"distilled_guidance_layer.layers.{{}}.{native}", (f"distilled_guidance_layer.layers.{{}}.{name}",))
        for native, name in (("in_layer", "linear_1"), ("out_layer", "linear_2"))
    ),
    Naming("distilled_guidance_layer.norms.{}", ("distilled_guidance_layer.norms.{}",)),
)

# x-flux (XLabs; USO after it) hangs the LoRA of a block on its processor: 1 is the image, 2 the text.
_X_FLUX = {
    "img_attn.qkv": "qkv_lora1",
    "txt_attn.qkv": "qkv_lora2",
    "img_attn.proj": "proj_lora1",
    "txt_attn.proj": "proj_lora2",
    "linear1": "qkv",
    "linear2": "proj",
}


def _flux1_places(shapes: Shapes) -> Iterator[Place]:
    yield from table(ROWS)(shapes)
    for key, shape in shapes.items():
        match = re.fullmatch(r"((?:double|single)_blocks\.\d+)\.(.+)\.weight", key)
        if match and match[2] in _X_FLUX:
            # A single block's qkv is the first rows of linear1, its proj all of linear2, mlp included
            # (github.com/XLabs-AI/x-flux, SingleStreamBlockLoraProcessor).
            band = Band(0, 3 * shape[1]) if match[2] == "linear1" else None
            yield Place(key, None, None, band, processor=f"{match[1]}.processor.{_X_FLUX[match[2]]}")


def block_shapes(
    hidden: int, double: int, single: int, *, mlp: int = 4, gates: int = 1, bias: bool = True, modulated: bool = True
) -> dict[str, tuple[int, ...]]:
    """The weights of double and single blocks. The mlp is so many times as wide, and gated by a second half."""
    found: dict[str, tuple[int, ...]] = {}

    def norms(name: str) -> Shapes:
        return {f"{name}.{norm}_norm.weight": (128,) for norm in ("query", "key")}  # the size of a head

    for number in range(double):
        for stream in ("img", "txt"):
            block = f"double_blocks.{number}.{stream}"
            found |= layer(f"{block}_attn.qkv", hidden * 3, hidden, bias=bias)
            found |= norms(f"{block}_attn.norm")
            found |= layer(f"{block}_attn.proj", hidden, hidden, bias=bias)
            found |= layer(f"{block}_mlp.0", hidden * mlp * gates, hidden, bias=bias)
            found |= layer(f"{block}_mlp.2", hidden, hidden * mlp, bias=bias)
            if modulated:
                found |= layer(f"{block}_mod.lin", hidden * 6, hidden)
    for number in range(single):
        block = f"single_blocks.{number}"
        found |= layer(f"{block}.linear1", hidden * (3 + mlp * gates), hidden, bias=bias)
        found |= layer(f"{block}.linear2", hidden, hidden * (1 + mlp), bias=bias)
        found |= norms(f"{block}.norm")
        if modulated:
            found |= layer(f"{block}.modulation.lin", hidden * 3, hidden)
    return found


def embedder_shapes(name: str, hidden: int, inputs: int, *, bias: bool = True) -> dict[str, tuple[int, ...]]:
    first = layer(f"{name}.in_layer", hidden, inputs, bias=bias)
    return first | layer(f"{name}.out_layer", hidden, hidden, bias=bias)


def flux1_shapes(*, hidden: int = 3072, double: int = 19, single: int = 38, guidance: bool = True) -> Shapes:
    """The weights of a FLUX.1 transformer: dev with guidance, schnell without."""
    found = block_shapes(hidden, double, single)
    found |= layer("img_in", hidden, 64)
    found |= layer("txt_in", hidden, 4096)
    found |= embedder_shapes("time_in", hidden, 256)
    found |= embedder_shapes("vector_in", hidden, 768)
    if guidance:
        found |= embedder_shapes("guidance_in", hidden, 256)
    found |= layer("final_layer.linear", 64, hidden)
    return found | layer("final_layer.adaLN_modulation.1", hidden * 2, hidden)


def flux2_shapes(
    *, hidden: int = 6144, double: int = 8, single: int = 48, context: int = 15360, guidance: bool = True
) -> Shapes:
    """The weights of a FLUX.2 transformer: dev; klein is smaller and without guidance. It has no biases."""
    found = block_shapes(hidden, double, single, mlp=3, gates=2, bias=False, modulated=False)
    for name in ("time", "guidance") if guidance else ("time",):
        found |= embedder_shapes(f"{name}_in", hidden, 256, bias=False)
    for name, outputs, inputs in (
        ("img_in", hidden, 128),
        ("txt_in", hidden, context),
        ("double_stream_modulation_img.lin", hidden * 6, hidden),
        ("double_stream_modulation_txt.lin", hidden * 6, hidden),
        ("single_stream_modulation.lin", hidden * 3, hidden),
        ("final_layer.linear", 128, hidden),
        ("final_layer.adaLN_modulation.1", hidden * 2, hidden),
    ):
        found |= layer(name, outputs, inputs, bias=False)
    return found


def chroma_shapes(*, hidden: int = 3072, double: int = 19, single: int = 38, inner: int = 5120) -> Shapes:
    """The weights of Chroma: FLUX.1 with one small network in place of all modulations."""
    found = block_shapes(hidden, double, single, modulated=False)
    found |= layer("img_in", hidden, 64)
    found |= layer("txt_in", hidden, 4096)
    found |= layer("distilled_guidance_layer.in_proj", inner, 64)
    for number in range(5):
        found |= embedder_shapes(f"distilled_guidance_layer.layers.{number}", inner, inner)
        found |= layer(f"distilled_guidance_layer.norms.{number}", inner, bias=False)
    found |= layer("distilled_guidance_layer.out_proj", hidden, inner)
    return found | layer("final_layer.linear", 64, hidden)


def _has(*marks: str) -> Callable[[Shapes], bool]:
    return lambda shapes: all(f"{mark}.weight" in shapes for mark in marks)


FLUX = Family(
    "flux",
    "FLUX.1",
    components=(
        denoiser(_flux1_places, flux1_shapes),
        CLIP_L,
        T5_SECOND,
    ),
    # FLUX.2 shares its modulation between blocks, Chroma has none of its own, HunyuanVideo refines its text.
    recognises=_has("double_blocks.0.img_attn.qkv", "double_blocks.0.img_mod.lin", "vector_in.in_layer", "txt_in"),
)

FLUX2 = Family(
    "flux2",
    "FLUX.2 dev",
    components=(denoiser(table(FLUX2_ROWS), flux2_shapes),),
    recognises=_has("double_blocks.0.img_attn.qkv", "double_stream_modulation_img.lin", "guidance_in.in_layer"),
)

_KLEIN = partial(flux2_shapes, hidden=3072, double=5, single=20, context=7680, guidance=False)  # 4B

FLUX2_KLEIN = Family(
    "flux2_klein",
    "FLUX.2 klein",
    components=(denoiser(table(FLUX2_ROWS), _KLEIN),),
    recognises=lambda shapes: (
        "double_stream_modulation_img.lin.weight" in shapes and "guidance_in.in_layer.weight" not in shapes
    ),
)

CHROMA = Family(
    "chroma",
    "Chroma",
    components=(
        denoiser(table(CHROMA_ROWS), chroma_shapes),
        T5_ALONE,
    ),
    recognises=_has("double_blocks.0.img_attn.qkv", "distilled_guidance_layer.in_proj"),
)
