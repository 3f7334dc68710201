"""Family, Component and Place: how a model's weights are called, as data."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from ..lora import Band

Shapes = Mapping[str, tuple[int, ...]]  # state-dict key -> shape


class Place(NamedTuple):
    """One row of a component's name table: a weight, or a band of it, and its two names."""

    key: str  # the weight's key, as the model has it
    native: str | None  # the name in the model's own code; None for a band that only diffusers names
    diffusers: str | None
    band: Band | None = None
    swap: bool = False
    processor: str | None = None  # where its LoRA hangs on a block's processor under a name of its own (x-flux)


@dataclass(frozen=True)
class Component:
    """One network of a family, and the prefixes under which files speak of it.

    places makes the rows of the name table from the shapes that the network in hand really has, so that
    pruned, small and inpainting variants need no table of their own.
    """

    part: str  # "model" or "clip"
    places: Callable[[Shapes], Iterable[Place]]
    published: Callable[[], Shapes]  # the weights of the published model
    sources: tuple[str, ...]  # prefixes in state dicts and checkpoints, the host's own first
    prefixes: Mapping[str, tuple[str, ...]]  # in LoRA files, by the Dialect's `prefix`; the first is the one we write
    # what is no layer's -> its name in diffusers, {} for each number
    parameters: Mapping[str, str] = field(default_factory=dict)

    def parameter(self, key: str) -> str | None:
        """What diffusers calls a tensor that is no layer's, which no LoRA speaks of; None where that is not known."""
        name = self.parameters.get(_NUMBER.sub("{}", key))
        return name and name.format(*_NUMBER.findall(key))

    def role(self, place: Place, shape: tuple[int, ...]) -> str:
        """What a place does: one of ROLES."""
        if self.part == "clip":
            return "text"
        if len(shape) == 1:
            return "norm"
        for name in (place.key, place.diffusers or ""):
            for role, pattern in _SIGNS:
                if pattern.search(name):
                    return role
        return "conv" if len(shape) > 2 else "mlp"


ROLES = ("attn", "cross-attn", "mlp", "norm", "embed", "conv", "text")

# Signs of a role in a weight's key (else in its diffusers name), the first that is found; embed is all that leads into
# the blocks or out of them. A matrix without a sign is mlp, as are FLUX's fused matrices where no name splits them: the
# mlp has most of their rows.
_SIGNS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (role, re.compile(pattern))
    for role, pattern in (
        ("norm", r"norm|modulation|_mod\.|adaln"),
        ("mlp", r"linear2\.|qkv_mlp"),
        ("embed", r"embed|_emb\b|emb_layers|patchify|mapper|guidance_layer|(time|vector|guidance)_(in|proj\w*)\b"),
        ("cross-attn", r"(?<!x_block\.)attn2|cross_?att"),  # SD3's attn2 is of the picture with itself
        ("attn", r"attn|attention\b|\.proj_(in|out)\b"),
        ("mlp", r"mlp|\bff|feed_?forward"),
        ("embed", r"^(img|txt)_in\b|conv_in|conv_out|^input_blocks\.0\.|^out\.2\.|final_layer|^proj_out\b|^head\b"),
    )
)

# Prefixes of a denoiser's modules in LoRA files, the same for every family: names are looked up, so a prefix that no
# trainer of a family writes costs nothing, and one that a new trainer takes over from another is already understood.
DENOISER: Mapping[str, tuple[str, ...]] = {
    "comfy": ("diffusion_model.", "model.diffusion_model."),
    # Stable Cascade's prior; HunyuanVideo-I2V's own trainer
    "kohya": ("lora_unet_", "lora_prior_unet_", "Hunyuan_video_I2V_lora_"),
    "onetrainer": ("lora_transformer_",),
    "lycoris": ("lycoris_",),
    # The second kind comes from scripts that put their component's name before a name that has it already.
    "diffusers": ("transformer.", "unet.", "transformer.transformer.", "unet.unet."),
    "processor": ("unet.", "", "diffusion_model."),
    "peft": (
        "base_model.model.",
        "unet.base_model.model.",
        "transformer.base_model.model.",
        "base_model.model.unet.",
        "base_model.model.transformer.",
        "base_model.model.diffusion_model.",
        "diffusion_model.base_model.model.",
    ),
    "bare": ("",),  # DiffSynth, OneTrainer's original layout, XLabs, Black Forest Labs
}


def denoiser(
    places: Callable[[Shapes], Iterable[Place]],
    published: Callable[[], Shapes],
    pipe: str = "transformer",
    parameters: Mapping[str, str] = MappingProxyType({}),
) -> Component:
    """The network of a family that LoRAs are mostly for, where hosts and checkpoints keep it.

    pipe is what diffusers' pipelines call it; that name comes first in their dialect.
    """
    own = f"{pipe}."
    others = (prefix for prefix in DENOISER["diffusers"] if prefix != own)
    prefixes = {**DENOISER, "diffusers": (own, *others)}
    sources = ("diffusion_model.", "model.diffusion_model.", "")
    return Component("model", places, published, sources, prefixes, parameters)


@dataclass(frozen=True, eq=False)
class Family:
    """A kind of model: its components, and how to tell it by its denoiser's shapes (keys without prefix)."""

    name: str
    title: str
    components: tuple[Component, ...]
    recognises: Callable[[Shapes], bool]

    def located(self, shapes: Shapes) -> Iterator[tuple[Component, str, Shapes]]:
        """The components that are there: each with its prefix and its shapes without it.

        The empty prefix is a file of nothing but a denoiser; it counts only for what the family recognises, or the
        keys of any text encoder would pass for a denoiser's.
        """
        for component in self.components:
            for prefix in component.sources:
                inside = under(shapes, prefix)
                if inside and (prefix or self.recognises(inside)):
                    yield component, prefix, inside
                    break

    def published(self) -> Shapes:
        """Keys and shapes of the published model, as the host has them."""
        return {part.sources[0] + key: shape for part in self.components for key, shape in part.published().items()}


class Naming(NamedTuple):
    """A pattern of a name table; `{}` stands for a block's number.

    With several diffusers names the weight is fused: each name takes a band as long as the weight is wide,
    the last takes what is left (q, k, v and the mlp). Of three, q, k and v, the last two share what is left: grouped
    queries have fewer keys and values.
    """

    native: str
    diffusers: tuple[str, ...]
    swap: bool = False
    original: str | None = None  # in the authors' own code, where the host has renamed it


def table(rows: Sequence[Naming]) -> Callable[[Shapes], Iterator[Place]]:
    """The `places` of a component whose names follow these rows; other weights keep their native name only.

    The model in hand may bear the host's names or the authors' own: it answers to both.
    """
    patterns = {name: row for row in rows for name in (row.native, row.original) if name}

    def places(shapes: Shapes) -> Iterator[Place]:
        for key, shape in shapes.items():
            if key.endswith(".weight"):
                name = key.removesuffix(".weight")
                row = patterns.get(name) or patterns.get(_NUMBER.sub("{}", name, count=1)) or Naming(name, ())
                number = (_NUMBER.search(name) or [None])[0]
                names = [diffusers.format(number) for diffusers in row.diffusers]
                yield from placed(key, row.native.format(number), names, shape, swap=row.swap)
                if row.original:
                    yield Place(key, row.original.format(number), None)

    return places


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")  # a block's number


def placed(
    key: str, native: str | None, names: Sequence[str], shape: tuple[int, ...], *, swap: bool = False
) -> Iterator[Place]:
    """The places of one weight: the whole under its native name, and what each diffusers name takes of it."""
    if len(names) <= 1 and not swap:
        yield Place(key, native, names[0] if names else None)
        return
    if native is not None:
        yield Place(key, native, None)
    if swap:
        yield Place(key, None, names[0], swap=True)
        return
    start, width = 0, shape[1]
    for number, name in enumerate(names):
        left = shape[0] - start
        if number == len(names) - 1:
            width = left
        elif len(names) == 3 and number == 1:
            width = left // 2
        yield Place(key, None, name, Band(start, width))
        start += width


def identical(shapes: Shapes) -> Iterator[Place]:
    """The places of a component that has one name in both worlds."""
    for key in shapes:
        if key.endswith(".weight"):
            name = key.removesuffix(".weight")
            yield Place(key, name, name)


def layer(name: str, *shape: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    """The weights of one layer: (out, in, kernel…) of a matrix, (width,) of a norm."""
    weight: dict[str, tuple[int, ...]] = {f"{name}.weight": shape}
    return {**weight, f"{name}.bias": shape[:1]} if bias else weight


def under(shapes: Shapes, prefix: str) -> Shapes:
    """The shapes below a prefix, without it."""
    return {key[len(prefix) :]: shape for key, shape in shapes.items() if key.startswith(prefix)}
