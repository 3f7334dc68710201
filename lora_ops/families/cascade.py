"""Stable Cascade (Wuerstchen v3), stages C and B, and the prior of Wuerstchen v2, which only diffusers has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from .base import Family, Place, Shapes, denoiser, identical, layer, placed
from .text import CLIP_G_ALONE


def _places(shapes: Shapes) -> Iterator[Place]:
    """diffusers has no `attn` inside an attention, and one name for what the stages call by two.

    Stability's checkpoints fuse q, k and v, the host splits them like diffusers.
    """
    for key, shape in shapes.items():
        attention, fused, _ = key.partition(".attn.in_proj_weight")
        if fused:
            for place in placed(key, None, [f"{attention}.to_{name}" for name in "qkv"], shape):
                yield place._replace(native=f"{attention}.attn.to_{(place.diffusers or '')[-1]}")
        elif key.endswith(".weight"):
            native = key.removesuffix(".weight")
            name = native.replace(".attn.out_proj", ".to_out.0").replace(".attn.", ".")
            yield Place(key, native, "clip_txt_pooled_mapper" if name == "clip_mapper" else name)


def _res(name: str, width: int, skip: int = 0) -> Shapes:
    found = layer(f"{name}.depthwise", width, 1, 3, 3)
    found |= layer(f"{name}.channelwise.0", width * 4, width + skip)
    found |= {f"{name}.channelwise.2.{norm}": (1, 1, 1, width * 4) for norm in ("gamma", "beta")}
    return found | layer(f"{name}.channelwise.4", width, width * 4)


def _attention(name: str, width: int, condition: int, projections: Sequence[str]) -> Shapes:
    found = layer(f"{name}.kv_mapper.1", width, condition)
    for projection in projections:
        found |= layer(f"{name}.attention.{projection}", width, width)
    return found


_PROJECTIONS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.out_proj")


def _level(
    name: str, width: int, depth: int, *, mappers: Sequence[str], attention: bool, condition: int, skip: int = 0
) -> Shapes:
    """One level of a stage: residual, timestep and perhaps attention blocks in turn."""
    found: dict[str, tuple[int, ...]] = {}
    number = 0
    for turn in range(depth):
        found |= _res(f"{name}.{number}", width, 0 if turn else skip)
        for mapper in mappers:
            found |= layer(f"{name}.{number + 1}.{mapper}", width * 2, 64)
        if attention:
            found |= _attention(f"{name}.{number + 2}", width, condition, _PROJECTIONS)
        number += 2 + attention
    return found


def stage_c_shapes(*, width: int = 2048, depths: tuple[int, int] = (8, 24), condition: int = 2048) -> Shapes:
    """The weights of stage C, the prior: the large one; the lite one is 1536 wide with depths 4 and 12."""
    level = partial(_level, attention=True, condition=condition, mappers=("mapper", "mapper_sca", "mapper_crp"))
    found = layer("clip_txt_mapper", condition, 1280)
    found |= layer("clip_txt_pooled_mapper", condition * 4, 1280)
    found |= layer("clip_img_mapper", condition * 4, 768)
    found |= layer("embedding.1", width, 16, 1, 1)
    found |= level("down_blocks.0", width, depths[0])
    found |= layer("down_downscalers.1.1.blocks.0", width, width, 1, 1)
    found |= level("down_blocks.1", width, depths[1])
    found |= level("up_blocks.0", width, depths[1])
    found |= layer("up_upscalers.0.1.blocks.1", width, width, 1, 1)
    found |= level("up_blocks.1", width, depths[0], skip=width)
    return found | layer("clf.1", 16, width, 1, 1)


def stage_b_shapes(
    *,
    widths: Sequence[int] = (320, 640, 1280, 1280),
    depths: Sequence[int] = (2, 6, 28, 6),
    repeats: Sequence[int] = (2, 2, 3, 3),
    condition: int = 1280,
) -> Shapes:
    """The weights of stage B, the decoder, by level; on the way up a level repeats its blocks so many times."""
    found = layer("clip_mapper", condition * 4, 1280)
    for name, inputs in (("effnet", 16), ("pixels", 3)):
        found |= layer(f"{name}_mapper.0", widths[0] * 4, inputs, 1, 1)
        found |= layer(f"{name}_mapper.2", widths[0], widths[0] * 4, 1, 1)
    found |= layer("embedding.1", widths[0], 16, 1, 1)
    for number, width in enumerate(widths):
        level = partial(
            _level,
            width=width,
            depth=depths[number],
            attention=number > 1,
            condition=condition,
            mappers=("mapper", "mapper_sca"),
        )
        found |= level(f"down_blocks.{number}")
        up = len(widths) - 1 - number
        found |= level(f"up_blocks.{up}", skip=width if up else 0)
        for turn in range(repeats[number] - 1):
            found |= layer(f"up_repeat_mappers.{up}.{turn}", width, width, 1, 1)
        if number:
            above = widths[number - 1]
            found |= layer(f"down_downscalers.{number}.1", width, above, 2, 2)
            found[f"up_upscalers.{up}.1.weight"] = (width, above, 2, 2)  # transposed: inputs first
            found[f"up_upscalers.{up}.1.bias"] = (above,)
    return found | layer("clf.1", 16, widths[0], 1, 1)


def wuerstchen_shapes(*, width: int = 1536, depth: int = 32, condition: int = 1280) -> Shapes:
    """The weights of Wuerstchen v2's prior."""
    found = layer("projection", width, 16, 1, 1)
    found |= layer("cond_mapper.0", width, condition)
    found |= layer("cond_mapper.2", width, width)
    for number in range(0, depth * 3, 3):
        found |= _res(f"blocks.{number}", width)
        found |= layer(f"blocks.{number + 1}.mapper", width * 2, 64)
        found |= _attention(f"blocks.{number + 2}", width, width, ("to_q", "to_k", "to_v", "to_out.0"))
    return found | layer("out.1", 32, width, 1, 1)


_PARAMETERS = {
    (name := f"{blocks}.channelwise.{{}}.{norm}"): name
    for blocks in ("down_blocks.{}.{}", "up_blocks.{}.{}", "blocks.{}")
    for norm in ("gamma", "beta")
}

CASCADE_C = Family(
    "cascade_c",
    "Stable Cascade, stage C",
    components=(denoiser(_places, stage_c_shapes, "prior", _PARAMETERS), CLIP_G_ALONE),
    recognises=lambda shapes: "clip_txt_mapper.weight" in shapes,
)

CASCADE_B = Family(
    "cascade_b",
    "Stable Cascade, stage B",
    components=(denoiser(_places, stage_b_shapes, "decoder", _PARAMETERS), CLIP_G_ALONE),
    recognises=lambda shapes: "effnet_mapper.0.weight" in shapes,
)

WUERSTCHEN = Family(
    "wuerstchen",
    "Wuerstchen v2 (prior)",
    components=(denoiser(identical, wuerstchen_shapes, "prior", _PARAMETERS),),
    recognises=lambda shapes: "cond_mapper.0.weight" in shapes and "blocks.0.depthwise.weight" in shapes,
)
