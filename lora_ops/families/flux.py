"""FLUX.1 (dev, schnell): Black Forest Labs' names and diffusers', which splits the fused projections."""

from __future__ import annotations

from collections.abc import Iterator

from .base import Component, Family, Naming, Shapes, table
from .text import CLIP_L, T5_SECOND


def _stream(native: str, norms: str, feed_forward: str, norm: str, projections: str, output: str) -> Iterator[Naming]:
    """One stream (image or text) of a double block."""
    block, diffusers = "double_blocks.{}", "transformer_blocks.{}"
    names = tuple(f"{diffusers}.attn.{projections.format(name)}" for name in "qkv")
    yield Naming(f"{block}.{native}_attn.qkv", names)
    yield Naming(f"{block}.{native}_attn.proj", (f"{diffusers}.attn.{output}",))
    yield Naming(f"{block}.{native}_mlp.0", (f"{diffusers}.{feed_forward}.net.0.proj",))
    yield Naming(f"{block}.{native}_mlp.2", (f"{diffusers}.{feed_forward}.net.2",))
    yield Naming(f"{block}.{native}_mod.lin", (f"{diffusers}.{norm}.linear",))
    yield Naming(f"{block}.{native}_attn.norm.query_norm", (f"{diffusers}.attn.{norms.format('q')}",))
    yield Naming(f"{block}.{native}_attn.norm.key_norm", (f"{diffusers}.attn.{norms.format('k')}",))


_SINGLE, _DIFFUSERS = "single_blocks.{}", "single_transformer_blocks.{}"
_EMBEDDER = "time_text_embed.{}_embedder.linear_{}"

ROWS = (
    *_stream("img", "norm_{}", "ff", "norm1", "to_{}", "to_out.0"),
    *_stream("txt", "norm_added_{}", "ff_context", "norm1_context", "add_{}_proj", "to_add_out"),
    Naming(
        f"{_SINGLE}.linear1",
        (*(f"{_DIFFUSERS}.attn.to_{name}" for name in "qkv"), f"{_DIFFUSERS}.proj_mlp"),
    ),
    Naming(f"{_SINGLE}.linear2", (f"{_DIFFUSERS}.proj_out",)),
    Naming(f"{_SINGLE}.modulation.lin", (f"{_DIFFUSERS}.norm.linear",)),
    Naming(f"{_SINGLE}.norm.query_norm", (f"{_DIFFUSERS}.attn.norm_q",)),
    Naming(f"{_SINGLE}.norm.key_norm", (f"{_DIFFUSERS}.attn.norm_k",)),
    Naming("img_in", ("x_embedder",)),
    Naming("txt_in", ("context_embedder",)),
    *(
        Naming(f"{native}_in.{layer}_layer", (_EMBEDDER.format(name, number),))
        for native, name in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance"))
        for layer, number in (("in", 1), ("out", 2))
    ),
    Naming("final_layer.linear", ("proj_out",)),
    # Black Forest Labs store shift before scale, diffusers scale before shift.
    Naming("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap=True),
)


def shapes(
    *,
    hidden: int = 3072,
    double: int = 19,
    single: int = 38,
    context: int = 4096,
    vector: int = 768,
    guidance: bool = True,
) -> Shapes:
    """The weights of a FLUX.1 transformer: dev with guidance, schnell without."""
    found: dict[str, tuple[int, ...]] = {}

    def linear(name: str, inputs: int, outputs: int) -> None:
        found[f"{name}.weight"] = (outputs, inputs)
        found[f"{name}.bias"] = (outputs,)

    def norms(name: str) -> None:
        for norm in ("query_norm", "key_norm"):
            found[f"{name}.{norm}.weight"] = (128,)  # the size of a head

    linear("img_in", 64, hidden)
    linear("txt_in", context, hidden)
    for name, inputs in (("time", 256), ("vector", vector), *((("guidance", 256),) if guidance else ())):
        linear(f"{name}_in.in_layer", inputs, hidden)
        linear(f"{name}_in.out_layer", hidden, hidden)
    for number in range(double):
        for stream in ("img", "txt"):
            block = f"double_blocks.{number}.{stream}"
            linear(f"{block}_mod.lin", hidden, hidden * 6)
            linear(f"{block}_attn.qkv", hidden, hidden * 3)
            norms(f"{block}_attn.norm")
            linear(f"{block}_attn.proj", hidden, hidden)
            linear(f"{block}_mlp.0", hidden, hidden * 4)
            linear(f"{block}_mlp.2", hidden * 4, hidden)
    for number in range(single):
        block = f"single_blocks.{number}"
        linear(f"{block}.linear1", hidden, hidden * 7)
        linear(f"{block}.linear2", hidden * 5, hidden)
        norms(f"{block}.norm")
        linear(f"{block}.modulation.lin", hidden, hidden * 3)
    linear("final_layer.linear", hidden, 64)
    linear("final_layer.adaLN_modulation.1", hidden, hidden * 2)
    return found


def _recognises(shapes: Shapes) -> bool:
    """FLUX.2 shares its modulation between blocks, Chroma has none of its own, HunyuanVideo refines its text."""
    marks = ("double_blocks.0.img_attn.qkv", "double_blocks.0.img_mod.lin", "vector_in.in_layer", "txt_in")
    return all(f"{mark}.weight" in shapes for mark in marks)


FLUX = Family(
    "flux",
    "FLUX.1",
    components=(
        Component(
            part="model",
            places=table(ROWS),
            published=shapes,
            sources=("diffusion_model.", "model.diffusion_model.", ""),
            prefixes={
                "comfy": ("diffusion_model.",),
                "kohya": ("lora_unet_",),
                "diffusers": ("transformer.",),
                "peft": ("base_model.model.",),
            },
        ),
        CLIP_L,
        T5_SECOND,
    ),
    recognises=_recognises,
)
