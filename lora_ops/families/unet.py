"""The UNet of Stable Diffusion 1.5, 2 and XL: native (CompVis) and diffusers names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial

from .base import Family, Place, Shapes, denoiser, placed
from .text import CLIP_G, CLIP_H, CLIP_L, CLIP_L_ALONE

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_REST = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}


def _places(shapes: Shapes) -> Iterator[Place]:
    """Native names count blocks through all levels; diffusers counts within a level. A level ends at its
    down- or upsampler, so the shapes in hand tell the levels of any variant."""
    levels = {
        "input": _levels(shapes, r"input_blocks\.(\d+)\.", r"input_blocks\.(\d+)\.0\.op\.weight"),
        "output": _levels(shapes, r"output_blocks\.(\d+)\.", r"output_blocks\.(\d+)\.\d\.conv\.weight"),
    }
    for key, shape in shapes.items():
        if key.endswith(".weight"):
            native = key.removesuffix(".weight")
            name = _diffusers(native, levels)
            yield from placed(key, native, [name] if name else [], shape)


def _levels(shapes: Shapes, block: str, sampler: str) -> Mapping[int, tuple[int, int]]:
    """Block number -> (level, number within the level)."""
    blocks = sorted({int(match[1]) for key in shapes if (match := re.match(block, key))})
    samplers = {int(match[1]) for key in shapes if (match := re.match(sampler, key))}
    levels: dict[int, tuple[int, int]] = {}
    level = number = 0
    for index in blocks:
        if index == 0 and block.startswith("input"):
            continue  # conv_in
        levels[index] = level, number
        number += 1
        if index in samplers:
            level, number = level + 1, 0
    return levels


def _diffusers(native: str, levels: Mapping[str, Mapping[int, tuple[int, int]]]) -> str | None:
    if native in _REST:
        return _REST[native]
    match = re.match(r"(input|output)_blocks\.(\d+)\.(\d)\.(.+)", native)
    if match:
        side, (level, number), slot, rest = match[1], levels[match[1]][int(match[2])], match[3], match[4]
        blocks = "down_blocks" if side == "input" else "up_blocks"
        if rest in ("op", "conv"):
            return f"{blocks}.{level}.{'downsamplers' if side == 'input' else 'upsamplers'}.0.conv"
        kind = f"resnets.{number}" if slot == "0" else f"attentions.{number}"
        return _inside(f"{blocks}.{level}.{kind}", rest)
    match = re.match(r"middle_block\.(\d)\.(.+)", native)
    return _inside(f"mid_block.{_MIDDLE[match[1]]}", match[2]) if match else None


def _inside(block: str, rest: str) -> str | None:
    """Transformer blocks have one name in both worlds, resnets two."""
    if ".resnets." not in block:
        return f"{block}.{rest}"
    return f"{block}.{_RESNET[rest]}" if rest in _RESNET else None


def shapes(
    *,
    channels: int = 320,
    multipliers: tuple[int, ...],
    depths: tuple[int, ...],
    middle_depth: int,
    context: int,
    linear_projection: bool,
    vector: int | None = None,
) -> Shapes:
    """The weights of a UNet with two resnets a level: channel multipliers and transformer depth by level.

    vector is the width of the pooled embedding (SDXL), None without one.
    """
    time = channels * 4
    found: dict[str, tuple[int, ...]] = {}

    def linear(name: str, inputs: int, outputs: int, *, bias: bool = True) -> None:
        found[f"{name}.weight"] = (outputs, inputs)
        if bias:
            found[f"{name}.bias"] = (outputs,)

    def conv(name: str, inputs: int, outputs: int, kernel: int = 3) -> None:
        found[f"{name}.weight"] = (outputs, inputs, kernel, kernel)
        found[f"{name}.bias"] = (outputs,)

    def norm(name: str, width: int) -> None:
        found[f"{name}.weight"] = found[f"{name}.bias"] = (width,)

    def resnet(name: str, inputs: int, outputs: int) -> None:
        norm(f"{name}.in_layers.0", inputs)
        conv(f"{name}.in_layers.2", inputs, outputs)
        linear(f"{name}.emb_layers.1", time, outputs)
        norm(f"{name}.out_layers.0", outputs)
        conv(f"{name}.out_layers.3", outputs, outputs)
        if inputs != outputs:
            conv(f"{name}.skip_connection", inputs, outputs, 1)

    def transformer(name: str, width: int, depth: int) -> None:
        norm(f"{name}.norm", width)
        project = linear if linear_projection else partial(conv, kernel=1)
        project(f"{name}.proj_in", width, width)
        for number in range(depth):
            block = f"{name}.transformer_blocks.{number}"
            for attention, inputs in (("attn1", width), ("attn2", context)):
                linear(f"{block}.{attention}.to_q", width, width, bias=False)
                linear(f"{block}.{attention}.to_k", inputs, width, bias=False)
                linear(f"{block}.{attention}.to_v", inputs, width, bias=False)
                linear(f"{block}.{attention}.to_out.0", width, width)
            linear(f"{block}.ff.net.0.proj", width, width * 8)
            linear(f"{block}.ff.net.2", width * 4, width)
            for name_of_norm in ("norm1", "norm2", "norm3"):
                norm(f"{block}.{name_of_norm}", width)
        project(f"{name}.proj_out", width, width)

    linear("time_embed.0", channels, time)
    linear("time_embed.2", time, time)
    if vector is not None:
        linear("label_emb.0.0", vector, time)
        linear("label_emb.0.2", time, time)
    conv("input_blocks.0.0", 4, channels)
    width, skips, index = channels, [channels], 1
    for level, multiplier in enumerate(multipliers):
        for _ in range(2):
            resnet(f"input_blocks.{index}.0", width, channels * multiplier)
            width = channels * multiplier
            if depths[level]:
                transformer(f"input_blocks.{index}.1", width, depths[level])
            skips.append(width)
            index += 1
        if level < len(multipliers) - 1:
            conv(f"input_blocks.{index}.0.op", width, width)
            skips.append(width)
            index += 1
    resnet("middle_block.0", width, width)
    transformer("middle_block.1", width, middle_depth)
    resnet("middle_block.2", width, width)
    index = 0
    for level in reversed(range(len(multipliers))):
        for number in range(3):
            resnet(f"output_blocks.{index}.0", width + skips.pop(), channels * multipliers[level])
            width, slot = channels * multipliers[level], 1
            if depths[level]:
                transformer(f"output_blocks.{index}.1", width, depths[level])
                slot = 2
            if number == 2 and level:
                conv(f"output_blocks.{index}.{slot}.conv", width, width)
            index += 1
    norm("out.0", channels)
    conv("out.2", channels, 4)
    return found


def _context(shapes: Shapes) -> int | None:
    """The width of the text embeddings that the cross-attention takes."""
    return next((shape[1] for key, shape in shapes.items() if key.endswith(".attn2.to_k.weight")), None)


_sd_shapes = partial(shapes, multipliers=(1, 2, 4, 4), depths=(1, 1, 1, 0), middle_depth=1)

SD15 = Family(
    "sd15",
    "Stable Diffusion 1.5",
    components=(
        denoiser(
            _places,
            partial(_sd_shapes, context=768, linear_projection=False),
            "unet",
        ),
        CLIP_L_ALONE,
    ),
    recognises=lambda shapes: _context(shapes) == 768 and "label_emb.0.0.weight" not in shapes,
)

SD2 = Family(
    "sd2",
    "Stable Diffusion 2",
    components=(
        denoiser(
            _places,
            partial(_sd_shapes, context=1024, linear_projection=True),
            "unet",
        ),
        CLIP_H,
    ),
    recognises=lambda shapes: (
        _context(shapes) == 1024 and "input_blocks.0.0.weight" in shapes and "label_emb.0.0.weight" not in shapes
    ),
)

SDXL = Family(
    "sdxl",
    "Stable Diffusion XL",
    components=(
        denoiser(
            _places,
            partial(
                shapes,
                multipliers=(1, 2, 4),
                depths=(0, 2, 10),
                middle_depth=10,
                context=2048,
                linear_projection=True,
                vector=2816,
            ),
            "unet",
        ),
        CLIP_L,
        CLIP_G,
    ),
    recognises=lambda shapes: _context(shapes) == 2048 and "label_emb.0.0.weight" in shapes,
)
