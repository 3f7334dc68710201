"""HunyuanVideo: FLUX.1's blocks with refined text; Tencent's names beside the host's, and diffusers'."""

from __future__ import annotations

from .base import Family, Naming, Shapes, denoiser, layer, table
from .flux import ROWS as FLUX_ROWS
from .flux import block_shapes, embedder_shapes
from .language import LLAMA
from .text import CLIP_L_SECOND

_RENAMED = (  # by the host -> by Tencent
    ("_attn.qkv", "_attn_qkv"),
    ("_attn.proj", "_attn_proj"),
    ("_attn.norm.query_norm", "_attn_q_norm"),
    ("_attn.norm.key_norm", "_attn_k_norm"),
    (".norm.query_norm", ".q_norm"),
    (".norm.key_norm", ".k_norm"),
    ("mlp.0", "mlp.fc1"),
    ("mlp.2", "mlp.fc2"),
    ("_mod.lin", "_mod.linear"),
    (".modulation.lin", ".modulation.linear"),
    ("time_in.in_layer", "time_in.mlp.0"),
    ("time_in.out_layer", "time_in.mlp.2"),
    ("guidance_in.in_layer", "guidance_in.mlp.0"),
    ("guidance_in.out_layer", "guidance_in.mlp.2"),
    ("t_embedder.in_layer", "t_embedder.mlp.0"),
    ("t_embedder.out_layer", "t_embedder.mlp.2"),
    ("c_embedder.in_layer", "c_embedder.linear_1"),
    ("c_embedder.out_layer", "c_embedder.linear_2"),
)


def _original(native: str) -> str | None:
    return next((native.replace(here, there) for here, there in _RENAMED if here in native), None)


_REFINER, _REFINER_DIFFUSERS = (
    "txt_in.individual_token_refiner.blocks.{}",
    "context_embedder.token_refiner.refiner_blocks.{}",
)
_NAMES = (
    *(row for row in FLUX_ROWS if row.native not in ("img_in", "txt_in")),
    Naming("img_in.proj", ("x_embedder.proj",)),
    Naming("txt_in.input_embedder", ("context_embedder.proj_in",)),
    *(
        Naming(
            f"txt_in.{native}_embedder.{layer}_layer",
            (f"context_embedder.time_text_embed.{name}_embedder.linear_{number}",),
        )
        for native, name in (("t", "timestep"), ("c", "text"))
        for layer, number in (("in", 1), ("out", 2))
    ),
    Naming(f"{_REFINER}.self_attn.qkv", tuple(f"{_REFINER_DIFFUSERS}.attn.to_{name}" for name in "qkv")),
    Naming(f"{_REFINER}.self_attn.proj", (f"{_REFINER_DIFFUSERS}.attn.to_out.0",)),
    Naming(f"{_REFINER}.mlp.0", (f"{_REFINER_DIFFUSERS}.ff.net.0.proj",)),
    Naming(f"{_REFINER}.mlp.2", (f"{_REFINER_DIFFUSERS}.ff.net.2",)),
    Naming(f"{_REFINER}.norm1", (f"{_REFINER_DIFFUSERS}.norm1",)),
    Naming(f"{_REFINER}.norm2", (f"{_REFINER_DIFFUSERS}.norm2",)),
    Naming(f"{_REFINER}.adaLN_modulation.1", (f"{_REFINER_DIFFUSERS}.norm_out.linear",)),  # two gates, in one order
)
ROWS = tuple(row._replace(original=_original(row.native)) for row in _NAMES)


def shapes(*, hidden: int = 3072, double: int = 20, single: int = 40, context: int = 4096) -> Shapes:
    """The weights of the HunyuanVideo transformer, as the host names them."""
    found = block_shapes(hidden, double, single)
    found |= layer("img_in.proj", hidden, 16, 1, 2, 2)
    for name, inputs in (
        ("time_in", 256),
        ("vector_in", 768),
        ("guidance_in", 256),
        ("txt_in.t_embedder", 256),
        ("txt_in.c_embedder", context),
    ):
        found |= embedder_shapes(name, hidden, inputs)
    found |= layer("txt_in.input_embedder", hidden, context)
    for number in range(2):
        block = f"txt_in.individual_token_refiner.blocks.{number}"
        found |= layer(f"{block}.adaLN_modulation.1", hidden * 2, hidden)
        found |= layer(f"{block}.norm1", hidden)
        found |= layer(f"{block}.self_attn.qkv", hidden * 3, hidden)
        found |= layer(f"{block}.self_attn.proj", hidden, hidden)
        found |= layer(f"{block}.norm2", hidden)
        found |= layer(f"{block}.mlp.0", hidden * 4, hidden)
        found |= layer(f"{block}.mlp.2", hidden, hidden * 4)
    found |= layer("final_layer.linear", 64, hidden)
    return found | layer("final_layer.adaLN_modulation.1", hidden * 2, hidden)


HUNYUAN_VIDEO = Family(
    "hunyuan_video",
    "HunyuanVideo",
    components=(
        denoiser(table(ROWS), shapes),
        LLAMA,
        CLIP_L_SECOND,
    ),
    recognises=lambda shapes: "txt_in.individual_token_refiner.blocks.0.norm1.weight" in shapes,
)
