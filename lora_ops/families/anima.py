"""Anima: Cosmos-Predict2's names and diffusers', which keeps the adapter to the language model out of the denoiser."""

from __future__ import annotations

from collections.abc import Iterator

from .base import Component, Family, Naming, Place, Shapes, denoiser, identical, layer, table
from .language import QWEN3_06B

_BLOCK, _DIFFUSERS = "blocks.{}", "transformer_blocks.{}"
_ATTENTION = {
    "q_proj": "to_q",
    "k_proj": "to_k",
    "v_proj": "to_v",
    "output_proj": "to_out.0",
    "q_norm": "norm_q",
    "k_norm": "norm_k",
}


def _modulation(native: str, diffusers: str) -> Iterator[Naming]:
    for number in (1, 2):
        yield Naming(f"{native}.{number}", (f"{diffusers}.linear_{number}",))


ROWS = (
    *(
        Naming(f"{_BLOCK}.{native}.{name}", (f"{_DIFFUSERS}.{diffusers}.{projection}",))
        for native, diffusers in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for name, projection in _ATTENTION.items()
    ),
    Naming(f"{_BLOCK}.mlp.layer1", (f"{_DIFFUSERS}.ff.net.0.proj",)),
    Naming(f"{_BLOCK}.mlp.layer2", (f"{_DIFFUSERS}.ff.net.2",)),
    *(
        row
        for number, name in enumerate(("self_attn", "cross_attn", "mlp"), 1)
        for row in _modulation(f"{_BLOCK}.adaln_modulation_{name}", f"{_DIFFUSERS}.norm{number}")
    ),
    *_modulation("final_layer.adaln_modulation", "norm_out"),
    Naming("final_layer.linear", ("proj_out",)),
    Naming("x_embedder.proj.1", ("patch_embed.proj",)),
    *(Naming(f"t_embedder.1.linear_{number}", (f"time_embed.t_embedder.linear_{number}",)) for number in (1, 2)),
    Naming("t_embedding_norm", ("time_embed.norm",)),
)

_ADAPTER = "llm_adapter."


def _places(shapes: Shapes) -> Iterator[Place]:
    """Of the adapter's weights all speak alike, where they do not speak of it as a component."""
    adapter = {key: shape for key, shape in shapes.items() if key.startswith(_ADAPTER)}
    yield from table(ROWS)({key: shape for key, shape in shapes.items() if key not in adapter})
    yield from identical(adapter)


def _adapter_shapes() -> Shapes:
    width = 1024
    found = layer(f"{_ADAPTER}embed", 32128, width, bias=False)
    for number in range(6):
        block = f"{_ADAPTER}blocks.{number}"
        for attention in ("self_attn", "cross_attn"):
            found |= {f"{block}.{attention}.{name}_proj.weight": (width, width) for name in "qkvo"}
            found |= {f"{block}.{attention}.{name}_norm.weight": (64,) for name in "qk"}
        found |= {f"{block}.norm_{name}.weight": (width,) for name in ("self_attn", "cross_attn", "mlp")}
        found |= layer(f"{block}.mlp.0", width * 4, width) | layer(f"{block}.mlp.2", width, width * 4)
    return found | layer(f"{_ADAPTER}out_proj", width, width) | layer(f"{_ADAPTER}norm", width, bias=False)


def shapes() -> Shapes:
    """The weights of Anima's transformer; it has no biases but the adapter's."""
    width, context, rank, head = 2048, 1024, 256, 128
    found: dict[str, tuple[int, ...]] = {}

    def linear(name: str, inputs: int, outputs: int) -> None:
        found[f"{name}.weight"] = (outputs, inputs)

    linear("x_embedder.proj.1", 68, width)
    linear("t_embedder.1.linear_1", width, width)
    linear("t_embedder.1.linear_2", width, 3 * width)
    found["t_embedding_norm.weight"] = (width,)
    for number in range(28):
        block = f"blocks.{number}"
        for attention, source in (("self_attn", width), ("cross_attn", context)):
            for name, inputs in (("q", width), ("k", source), ("v", source), ("output", width)):
                linear(f"{block}.{attention}.{name}_proj", inputs, width)
            found |= {f"{block}.{attention}.{name}_norm.weight": (head,) for name in "qk"}
        linear(f"{block}.mlp.layer1", width, 4 * width)
        linear(f"{block}.mlp.layer2", 4 * width, width)
        for name in ("self_attn", "cross_attn", "mlp"):
            linear(f"{block}.adaln_modulation_{name}.1", width, rank)
            linear(f"{block}.adaln_modulation_{name}.2", rank, 3 * width)
    linear("final_layer.linear", width, 64)
    linear("final_layer.adaln_modulation.1", width, rank)
    linear("final_layer.adaln_modulation.2", rank, 2 * width)
    return {**found, **_adapter_shapes()}


TEXT_CONDITIONER = Component(
    part="model",
    places=identical,
    published=dict,  # the denoiser has published it
    sources=tuple(f"{source}{_ADAPTER}" for source in ("diffusion_model.", "model.diffusion_model.", "")),
    prefixes={"diffusers": ("text_conditioner.",)},
)

ANIMA = Family(
    "anima",
    "Anima",
    components=(denoiser(_places, shapes), TEXT_CONDITIONER, QWEN3_06B),
    recognises=lambda shapes: f"{_ADAPTER}embed.weight" in shapes and "blocks.0.mlp.layer1.weight" in shapes,
)
