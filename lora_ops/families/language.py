"""Text encoders that are language models: Llama 3, Qwen3, Qwen2.5-VL and Gemma 2, in transformers' names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

from .base import Component, Place, Shapes, identical, layer
from .text import prefixes


def _headless(shapes: Shapes) -> Iterator[Place]:
    """diffusers' pipelines and kohya's scripts hold the model without its head, so without `model.`."""
    for place in identical(shapes):
        yield place._replace(diffusers=place.key.removesuffix(".weight").removeprefix("model."))


def _with_eyes(shapes: Shapes) -> Iterator[Place]:
    """transformers has moved both halves of Qwen2.5-VL since it was published (4.52); the host has kept them."""
    for place in identical(shapes):
        name = place.key.removesuffix(".weight")
        head, headless = name.startswith("model."), name.removeprefix("model.")
        yield place._replace(diffusers=f"model.language_model.{headless}" if head else f"model.{name}")
        if head:
            yield place._replace(native=None, diffusers=headless)


def _shapes(
    *,
    vocabulary: int,
    layers: int,
    width: int,
    inner: int,
    queries: int,
    keys: int,
    head: int | None = None,
    bias: bool = False,
    norms: tuple[str, ...] = ("input", "post_attention"),
) -> dict[str, tuple[int, ...]]:
    """A decoder's weights; queries and keys (as many as values) in rows, head where each head has norms of its own."""
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, width),
        "model.norm.weight": (width,),
    }
    for number in range(layers):
        block = f"model.layers.{number}"
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            found |= layer(f"{block}.self_attn.{name}_proj", rows, width, bias=bias)
        found[f"{block}.self_attn.o_proj.weight"] = (width, queries)
        found |= {f"{block}.self_attn.{name}_norm.weight": (head,) for name in "qk" if head}
        found |= {f"{block}.mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        found[f"{block}.mlp.down_proj.weight"] = (width, inner)
        found |= {f"{block}.{name}_layernorm.weight": (width,) for name in norms}
    return found


def _qwen25_vl_shapes() -> Shapes:
    """The 7B model, with the eyes that image editing uses."""
    width, inner, output = 1280, 3420, 3584
    found = _shapes(vocabulary=152064, layers=28, width=output, inner=18944, queries=output, keys=512, bias=True)
    found["visual.patch_embed.proj.weight"] = (width, 3, 2, 14, 14)
    for number in range(32):
        block = f"visual.blocks.{number}"
        found |= {f"{block}.{name}.weight": (width,) for name in ("norm1", "norm2")}
        found |= layer(f"{block}.attn.qkv", width * 3, width) | layer(f"{block}.attn.proj", width, width)
        found |= layer(f"{block}.mlp.gate_proj", inner, width) | layer(f"{block}.mlp.up_proj", inner, width)
        found |= layer(f"{block}.mlp.down_proj", width, inner)
    found["visual.merger.ln_q.weight"] = (width,)
    found |= layer("visual.merger.mlp.0", width * 4, width * 4)
    return found | layer("visual.merger.mlp.2", output, width * 4)


def _encoder(
    host: str,
    published: Callable[[], Shapes],
    places: Callable[[Shapes], Iterable[Place]] = _headless,
    kohya: tuple[str, ...] = ("lora_te_", "lora_te1_"),
) -> Component:
    sources = (f"{host}.transformer.", f"text_encoders.{host}.transformer.")
    return Component("clip", places, published, sources, prefixes(host, "text_encoder", *kohya))


LLAMA = _encoder(  # 3, 8B
    "llama",
    partial(_shapes, vocabulary=128320, layers=32, width=4096, inner=14336, queries=4096, keys=1024),
    kohya=("lora_te1_",),
)
QWEN3_06B = _encoder(
    "qwen3_06b",
    partial(_shapes, vocabulary=151936, layers=28, width=1024, inner=3072, queries=2048, keys=1024, head=128),
)
QWEN3_4B = _encoder(
    "qwen3_4b",
    partial(_shapes, vocabulary=151936, layers=36, width=2560, inner=9728, queries=4096, keys=1024, head=128),
)
QWEN25_VL = _encoder("qwen25_7b", _qwen25_vl_shapes, _with_eyes)
GEMMA2 = _encoder(
    "gemma2_2b",
    partial(
        _shapes,
        vocabulary=256000,
        layers=26,
        width=2304,
        inner=9216,
        queries=2048,
        keys=1024,
        norms=("input", "post_attention", "pre_feedforward", "post_feedforward"),
    ),
)
