"""Encoding: pictures to latents and captions to conditionings, by the host's own VAE and CLIP; each once, then from the
shelf."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import comfy.sd1_clip
import comfy.text_encoders.sd2_clip
import comfy.utils
import torch
from comfy.ldm.cascade.stage_c_coder import StageC_coder
from torch import Tensor

from ...lora_ops.errors import FileError, TrainingError, shown
from ...lora_ops.train.ahead import ahead
from ...lora_ops.train.buckets import Size
from ...lora_ops.train.cutting import Control, How, Part, Raw, parts, small
from ...lora_ops.train.pixels import Thumb, thumb
from .seeing import Sight
from .shelf import Shelf, Unknown, key, packed, unpacked, weights_key

VERSION = 1  # of how pictures are cut and read: another one finds nothing on the shelf
AHEAD = 3  # pictures read while one is encoded
THUMBS = 24
CASCADE = 42  # pixels of a picture that Stable Cascade's stage C has in one, unless told otherwise
MUCH = 0.25  # share of a picture cut off from which it is told
PLAIN, MIRRORED, MASK, CONTROL = "latent", "mirrored", "mask", "control"

Told = Callable[[int, int], None]  # (done, of)


class Encoded(NamedTuple):
    """A picture in one size: its latents, its mirror image's second, and its masks (1, …, height, width) and the
    latents of its control pictures with each; or else seen, those that the text encoder will be shown."""

    raw: Raw
    size: Size
    latents: tuple[Tensor, ...]
    masks: tuple[Tensor, ...]
    controls: tuple[tuple[Tensor, ...], ...]
    seen: tuple[Control, ...]


@dataclass
class Pictures:
    """What came of pictures. left_out: by name and why; small, cropped: by name; kept: how many the shelf had;
    patched: it has none, for the VAE is not as its file."""

    encoded: list[Encoded] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    small: list[str] = field(default_factory=list)
    cropped: list[str] = field(default_factory=list)
    thumbs: list[Thumb] = field(default_factory=list)
    kept: int = 0
    patched: bool = False


class _Work(NamedTuple):
    """A part of a picture, with what the shelf has of it, or else its pixels (1, height, width, 3), its mask and those
    of its control pictures."""

    part: Part
    seen: tuple[Control, ...]
    key: str
    found: Mapping[str, Tensor] | None
    pixels: Tensor | None
    mask: Tensor | None
    controls: Sequence[Tensor]
    thumb: Thumb | None


def latents_of(
    vae: Any,
    raws: Sequence[Raw],
    how: How,
    shelf: Shelf | None,
    told: Told,
    caption: Callable[[Raw], str],
    *,
    seen: bool = False,
) -> Pictures:
    """Pictures as latents, read and cut in threads while the VAE works. What cannot be read is left out by name.
    caption is what a thumbnail shows. seen: control pictures are for the text encoder, and not encoded here.

    Raises TrainingError for a VAE that is not one for pictures of this step, and what told raises.
    """
    _require(vae, how)
    wanted = (MASK, PLAIN, MIRRORED) if how.mirrored else (MASK, PLAIN)
    settings = None if shelf is None else settings_of(vae)

    def work(numbered: tuple[int, Raw]) -> list[_Work] | FileError:
        number, raw = numbered
        found: list[_Work] = []
        try:
            for whole in parts(raw, how):
                part, shown = (whole._replace(controls=()), whole.controls) if seen else (whole, ())
                name = "" if settings is None else key(settings, *_content(part), wanted)
                there = shelf.get(name) if shelf is not None and name else None
                looked = number < THUMBS and not found
                pixels = part.pixels() if there is None or looked else None
                mask = part.shown() if pixels is not None else None
                controls = [each.pixels() for each in whole.controls] if pixels is not None else []
                small = thumb(pixels, mask, caption(raw), controls) if looked and pixels is not None else None
                found.append(_Work(part, shown, name, there, pixels, mask, [] if seen else controls, small))
        except FileError as error:
            return error
        return found

    pictures = Pictures(patched=shelf is not None and settings is None)
    with closing(ahead(work, enumerate(raws), AHEAD)) as works:
        for number, (raw, found) in enumerate(zip(raws, works, strict=True), 1):
            if isinstance(found, FileError):
                pictures.left_out.append((raw.name, _why(raw, found)))
            else:
                _collect(pictures, vae, raw, found, how, shelf)
            told(number, len(raws))
    return pictures


def _content(part: Part) -> Sequence[Any]:
    """What latents are made of. A part without control pictures has the key that it had before there were any."""
    controls = [(each.sha256, each.size) for each in part.controls]
    return part.picture.sha256, part.mask_of, part.size, *([controls] if controls else [])


def _why(raw: Raw, error: FileError) -> str:
    """What is wrong with a picture, or with its mask, which is named."""
    file = Path(error.file or raw.name).name
    where = "" if file == Path(raw.name).name else f"{file} "
    return f"{where}{error.what} {error.remedy}".strip()


def _collect(pictures: Pictures, vae: Any, raw: Raw, found: Sequence[_Work], how: How, shelf: Shelf | None) -> None:
    for work in found:
        tensors = work.found
        if tensors is None:
            assert work.pixels is not None
            tensors = _encoded(vae, work.pixels, work.mask, work.controls, how.mirrored)
            if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
                raise TrainingError(
                    f"The VAE makes NaN of '{shown(raw.name)}'.", remedy="Start ComfyUI with --fp32-vae or --bf16-vae."
                )
            if shelf is not None and work.key:
                shelf.put(work.key, tensors)
        else:
            pictures.kept += 1
        guises = (PLAIN, MIRRORED) if how.mirrored else (PLAIN,)
        latents = tuple(tensors[guise] for guise in guises)
        numbers = range(len(work.part.controls))
        controls = tuple(tuple(tensors[f"{CONTROL} {n} {guise}"] for n in numbers) for guise in guises if numbers)
        mask = tensors.get(MASK)
        masks = () if mask is None else (mask, mask.flip(-1))[: len(latents)]
        pictures.encoded.append(Encoded(raw, work.part.size, latents, masks, controls, work.seen))
        if work.thumb is not None:
            pictures.thumbs.append(work.thumb)
    part = found[0].part
    if small(part, how):
        pictures.small.append(raw.name)
    if max(work.part.lost for work in found) > MUCH:
        pictures.cropped.append(raw.name)


def _encoded(
    vae: Any, pixels: Tensor, mask: Tensor | None, controls: Sequence[Tensor], mirrored: bool
) -> dict[str, Tensor]:
    """One at a time: a VAE for video would take two pictures for two frames."""
    if isinstance(vae.first_stage_model, StageC_coder):
        pixels = _compressed(pixels, int(vae.spacial_compression_encode()))
    found: dict[str, Tensor] = {}
    for of, each in (("", pixels), *((f"{CONTROL} {n} ", control) for n, control in enumerate(controls))):
        found[of + PLAIN] = vae.encode(each)[0]
        if mirrored:
            found[of + MIRRORED] = vae.encode(each.flip(2))[0]
    if mask is not None:
        height, width = found[PLAIN].shape[-2:]
        small = torch.nn.functional.adaptive_avg_pool2d(mask, (height, width))
        found[MASK] = small.reshape(1, *(1 for _ in found[PLAIN].shape[3:]), height, width)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}


def _compressed(pixels: Tensor, each: int) -> Tensor:
    """A picture as Stable Cascade's StageC_VAEEncode node has it: its latents are so many times smaller than it."""
    height, width = (side // CASCADE * each for side in pixels.shape[1:3])
    return comfy.utils.common_upscale(pixels.movedim(-1, 1), width, height, "bicubic", "center").movedim(1, -1)


def _require(vae: Any, how: How) -> None:
    if vae is None:
        raise TrainingError("Pictures need a VAE, which makes latents of them.", remedy="Connect a VAE.")
    if getattr(vae, "latent_dim", 2) == 1 or getattr(vae, "extra_1d_channel", None) is not None:
        raise TrainingError("The VAE is one for sound.", remedy="Connect the VAE of a model for pictures.")
    each = int(vae.spacial_compression_encode())
    if how.step % each:
        what = f"A latent's pixel stands for {each} by {each} of a picture, and the buckets' step is {how.step}."
        raise TrainingError(what, remedy=f"Use a multiple of {each} for it.")


def settings_of(vae: Any) -> Sequence[Any] | None:
    """All that a latent depends on beside the picture; None where that cannot be told."""
    try:
        weights = weights_key(vae.patcher)
    except Unknown:
        return None
    kind = type(vae.first_stage_model).__name__
    return VERSION, weights, kind, str(vae.vae_dtype), int(vae.spacial_compression_encode())


class Texts(NamedTuple):
    """The conditioning of each text; kept: how many the shelf had; patched: it has none, for the CLIP is not as its
    file."""

    conditions: Mapping[str | Sight, Any]
    kept: int
    patched: bool


def conditions_of(clip: Any, texts: Iterable[str | Sight], shelf: Shelf | None, told: Told) -> Texts:
    """What CLIPTextEncode gives for each text, and for each sight what its own node gives. Raises TrainingError without
    a CLIP, and what told raises."""
    wanted = list(dict.fromkeys(texts))
    if clip is None and wanted:
        raise TrainingError("Captions need a CLIP, which makes conditionings of them.", remedy="Connect a CLIP.")
    found: dict[str | Sight, Any] = {}
    kept = 0
    settings = _clip_settings(clip) if shelf is not None and wanted else None
    for number, text in enumerate(wanted, 1):
        tokens = text.content if isinstance(text, Sight) else clip.tokenize(text)
        try:
            name = "" if settings is None else key(settings, tokens)
        except Unknown:
            name = ""
        there = shelf.get(name) if shelf is not None and name else None
        if there is not None:
            found[text] = unpacked(there)
            kept += 1
        else:
            seen = text.encode(clip) if isinstance(text, Sight) else clip.encode_from_tokens_scheduled(tokens)
            found[text] = _finite(_on_cpu(seen), text.text if isinstance(text, Sight) else text)
            if shelf is not None and name:
                _keep(shelf, name, found[text])
        told(number, len(wanted))
    return Texts(found, kept, bool(wanted) and shelf is not None and settings is None)


def _keep(shelf: Shelf, name: str, condition: Any) -> None:
    try:
        shelf.put(name, packed(condition))
    except Unknown:
        return  # a text encoder that says more than tensors: made anew each time


def _clip_settings(clip: Any) -> Sequence[Any] | None:
    if clip.use_clip_schedule or clip.apply_hooks_to_conds:
        return None
    try:
        weights = weights_key(clip.patcher)
    except Unknown:
        return None
    return VERSION, weights, type(clip.cond_stage_model).__name__, clip.layer_idx


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {name: _on_cpu(each) for name, each in value.items()}
    return type(value)(map(_on_cpu, value)) if isinstance(value, list | tuple) else value


def _finite(condition: Any, text: str) -> Any:
    if not all(torch.isfinite(entry[0]).all() for entry in condition):
        raise TrainingError(f"The CLIP makes NaN of '{shown(text)}'.", remedy="Start ComfyUI with --fp32-text-enc.")
    return condition


def native(clip: Any, vae: Any) -> int:
    """The resolution in pixels that a model of these was made for: 512 with SD1.5's text encoder and a VAE of 4
    channels, 768 with SD2's, else 1024."""
    if clip is None or getattr(vae, "latent_channels", 4) != 4:
        return 1024
    kind = type(clip.cond_stage_model)
    return {comfy.sd1_clip.SD1ClipModel: 512, comfy.text_encoders.sd2_clip.SD2ClipModel: 768}.get(kind, 1024)
