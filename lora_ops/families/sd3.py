"""Stable Diffusion 3 and 3.5: the MMDiT's names and diffusers', which splits the fused projections."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import partial

from .base import Family, Naming, Place, Shapes, denoiser, layer, table
from .text import CLIP_G, CLIP_L, T5_THIRD

_BLOCK, _DIFFUSERS = "joint_blocks.{}", "transformer_blocks.{}"


def _attention(native: str, diffusers: str, projections: str, output: str, norms: str) -> Iterator[Naming]:
    native, diffusers = f"{_BLOCK}.{native}", f"{_DIFFUSERS}.{diffusers}"
    yield Naming(f"{native}.qkv", tuple(f"{diffusers}.{projections.format(name)}" for name in "qkv"))
    yield Naming(f"{native}.proj", (f"{diffusers}.{output}",))
    for name in "qk":
        yield Naming(f"{native}.ln_{name}", (f"{diffusers}.{norms.format(name)}",))


ROWS = (
    *_attention("x_block.attn", "attn", "to_{}", "to_out.0", "norm_{}"),
    *_attention("x_block.attn2", "attn2", "to_{}", "to_out.0", "norm_{}"),  # MMDiT-X, the medium model of 3.5
    *_attention("context_block.attn", "attn", "add_{}_proj", "to_add_out", "norm_added_{}"),
    *(
        Naming(f"{_BLOCK}.{block}.{native}", (f"{_DIFFUSERS}.{name}",))
        for block, suffix in (("x_block", ""), ("context_block", "_context"))
        for native, name in (
            ("adaLN_modulation.1", f"norm1{suffix}.linear"),
            ("mlp.fc1", f"ff{suffix}.net.0.proj"),
            ("mlp.fc2", f"ff{suffix}.net.2"),
        )
    ),
    Naming("x_embedder.proj", ("pos_embed.proj",)),
    Naming("context_embedder", ("context_embedder",)),
    *(
        Naming(f"{native}_embedder.mlp.{index}", (f"time_text_embed.{name}_embedder.linear_{number}",))
        for native, name in (("t", "timestep"), ("y", "text"))
        for index, number in ((0, 1), (2, 2))
    ),
    Naming("final_layer.linear", ("proj_out",)),
    # Stability store shift before scale, diffusers scale before shift.
    Naming("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap=True),
)


def _places(shapes: Shapes) -> Iterator[Place]:
    """The last block only reads the context, with a shift and a scale that are stored like the final layer's."""
    modulation = "context_block.adaLN_modulation.1"
    last = (
        Naming(
            key.removesuffix(".weight"), (f"{_DIFFUSERS.format(key.split('.')[1])}.norm1_context.linear",), swap=True
        )
        for key, shape in shapes.items()
        if key.endswith(f".{modulation}.weight") and shape[0] == 2 * shape[1]
    )
    return table((*ROWS, *last))(shapes)


def shapes(
    *,
    depth: int = 38,
    dual: Collection[int] = (),
    positions: int = 192,
    context: int = 4096,
    pooled: int = 2048,
    norms: bool = True,
) -> Shapes:
    """The weights of an MMDiT of this many blocks, those in dual with a second attention on the image alone.

    The default is 3.5 large; 3.5 medium has 24 blocks and is dual in the first 13, 3 medium has no norms.
    """
    hidden = depth * 64
    found: dict[str, tuple[int, ...]] = {"pos_embed": (1, positions**2, hidden)}
    found |= layer("x_embedder.proj", hidden, 16, 2, 2)
    found |= layer("context_embedder", hidden, context)
    for name, inputs in (("t", 256), ("y", pooled)):
        found |= layer(f"{name}_embedder.mlp.0", hidden, inputs)
        found |= layer(f"{name}_embedder.mlp.2", hidden, hidden)
    for number in range(depth):
        for stream in ("x_block", "context_block"):
            block = f"joint_blocks.{number}.{stream}"
            last = stream == "context_block" and number == depth - 1
            twice = stream == "x_block" and number in dual
            for attention in ("attn", "attn2") if twice else ("attn",):
                found |= layer(f"{block}.{attention}.qkv", hidden * 3, hidden)
                if norms:
                    found |= layer(f"{block}.{attention}.ln_q", 64, bias=False)
                    found |= layer(f"{block}.{attention}.ln_k", 64, bias=False)
                if not last:
                    found |= layer(f"{block}.{attention}.proj", hidden, hidden)
            found |= layer(f"{block}.adaLN_modulation.1", hidden * (2 if last else 9 if twice else 6), hidden)
            if not last:
                found |= layer(f"{block}.mlp.fc1", hidden * 4, hidden)
                found |= layer(f"{block}.mlp.fc2", hidden, hidden * 4)
    found |= layer("final_layer.linear", 64, hidden)
    found |= layer("final_layer.adaLN_modulation.1", hidden * 2, hidden)
    return found


_PARAMETERS = {"pos_embed": "pos_embed.pos_embed"}
_DUAL = "joint_blocks.0.x_block.attn2.qkv.weight"

SD3 = Family(
    "sd3",
    "Stable Diffusion 3 and 3.5 large",
    components=(
        denoiser(_places, shapes, parameters=_PARAMETERS),
        CLIP_L,
        CLIP_G,
        T5_THIRD,
    ),
    recognises=lambda shapes: "joint_blocks.0.context_block.attn.qkv.weight" in shapes and _DUAL not in shapes,
)

SD35_MEDIUM = replace(
    SD3,
    name="sd35_medium",
    title="Stable Diffusion 3.5 medium",
    components=(
        denoiser(_places, partial(shapes, depth=24, dual=range(13), positions=384), parameters=_PARAMETERS),
        *SD3.components[1:],
    ),
    recognises=lambda shapes: _DUAL in shapes,
)
