"""Wan 2.1 and 2.2: text and image to video of every size, with VACE and Animate; native and diffusers names."""

from __future__ import annotations

from collections.abc import Iterator

from .base import Family, Naming, Shapes, denoiser, layer, table
from .text import UMT5

_ATTENTION = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
    "k_img": "add_k_proj",
    "v_img": "add_v_proj",
    "norm_k_img": "norm_added_k",
}


def _block(block: str) -> Iterator[Naming]:
    for native, diffusers in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        for name, projection in _ATTENTION.items():
            yield Naming(f"{block}.{native}.{name}", (f"{block}.{diffusers}.{projection}",))
    yield Naming(f"{block}.ffn.0", (f"{block}.ffn.net.0.proj",))
    yield Naming(f"{block}.ffn.2", (f"{block}.ffn.net.2",))
    yield Naming(f"{block}.norm3", (f"{block}.norm2",))  # native norm2 and diffusers' norm3 have no weights


_CONDITION = "condition_embedder"
_FUSER, _ADAPTER, _FACE = "face_adapter.fuser_blocks.{}", "face_adapter.{}", "face_encoder"

ROWS = (
    *_block("blocks.{}"),
    *(
        Naming(f"{native}_embedding.{index}", (f"{_CONDITION}.{native}_embedder.linear_{number}",))
        for native in ("time", "text")
        for index, number in ((0, 1), (2, 2))
    ),
    Naming("time_projection.1", (f"{_CONDITION}.time_proj",)),
    *(
        Naming(f"img_emb.proj.{index}", (f"{_CONDITION}.image_embedder.{name}",))
        for index, name in ((0, "norm1"), (1, "ff.net.0.proj"), (3, "ff.net.2"), (4, "norm2"))
    ),
    Naming("patch_embedding", ("patch_embedding",)),
    Naming("head.head", ("proj_out",)),
    # VACE
    *_block("vace_blocks.{}"),
    Naming("vace_blocks.{}.before_proj", ("vace_blocks.{}.proj_in",)),
    Naming("vace_blocks.{}.after_proj", ("vace_blocks.{}.proj_out",)),
    Naming("vace_patch_embedding", ("vace_patch_embedding",)),
    # Animate; its motion encoder stays as it is and keeps its native names
    Naming(f"{_FUSER}.linear1_q", (f"{_ADAPTER}.to_q",)),
    Naming(f"{_FUSER}.linear1_kv", (f"{_ADAPTER}.to_k", f"{_ADAPTER}.to_v")),
    Naming(f"{_FUSER}.linear2", (f"{_ADAPTER}.to_out",)),
    Naming(f"{_FUSER}.q_norm", (f"{_ADAPTER}.norm_q",)),
    Naming(f"{_FUSER}.k_norm", (f"{_ADAPTER}.norm_k",)),
    *(Naming(f"{_FACE}.{name}.conv", (f"{_FACE}.{name}",)) for name in ("conv1_local", "conv2", "conv3")),
    Naming(f"{_FACE}.out_proj", (f"{_FACE}.out_proj",)),
    Naming("pose_patch_embedding", ("pose_patch_embedding",)),
)
PARAMETERS = {
    "head.modulation": "scale_shift_table",
    **{f"{blocks}.{{}}.modulation": f"{blocks}.{{}}.scale_shift_table" for blocks in ("blocks", "vace_blocks")},
}


def shapes() -> Shapes:
    """The weights of 2.1's 14B for image to video: all that text to video has, and how it sees an image."""
    width, inner = 5120, 13824
    found = layer("patch_embedding", width, 36, 1, 2, 2)
    for name, source in (("text", 4096), ("time", 256)):
        found |= layer(f"{name}_embedding.0", width, source) | layer(f"{name}_embedding.2", width, width)
    found |= layer("time_projection.1", width * 6, width)
    for number in range(40):
        block = f"blocks.{number}"
        for attention, seen in (("self_attn", ()), ("cross_attn", ("k_img", "v_img"))):
            for projection in ("q", "k", "v", "o", *seen):
                found |= layer(f"{block}.{attention}.{projection}", width, width)
            found |= {f"{block}.{attention}.norm_{name}.weight": (width,) for name in ("q", "k", *seen[:1])}
        found |= layer(f"{block}.ffn.0", inner, width) | layer(f"{block}.ffn.2", width, inner)
        found |= layer(f"{block}.norm3", width) | {f"{block}.modulation": (1, 6, width)}
    found |= layer("img_emb.proj.0", 1280) | layer("img_emb.proj.1", 1280, 1280)
    found |= layer("img_emb.proj.3", width, 1280) | layer("img_emb.proj.4", width)
    return found | layer("head.head", 64, width) | {"head.modulation": (1, 2, width)}


WAN = Family(
    "wan",
    "Wan 2.1 or 2.2",
    components=(denoiser(table(ROWS), shapes, parameters=PARAMETERS), UMT5),
    recognises=lambda shapes: "head.modulation" in shapes and "blocks.0.self_attn.q.weight" in shapes,
)
