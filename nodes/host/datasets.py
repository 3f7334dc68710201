"""Data sets: what is gathered, encoded by the host, as training takes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...lora_ops.errors import TrainingError, shown
from ...lora_ops.train.buckets import Size
from ...lora_ops.train.cutting import How
from ...lora_ops.train.data import Guises
from ...lora_ops.train.dataset import Dataset, Picture, controls_in
from ...lora_ops.train.gathering import Entry, Gathered, Wording, held_out, masked
from ...lora_ops.train.pixels import Thumb, sheet, thumb
from . import encoding
from .progress import Meter
from .seeing import Eye, Sight, sees
from .shelf import shelf


@dataclass(frozen=True)
class Asked:
    """What the node is asked for. source is for messages; auto: the resolution was chosen here; way is how a text
    encoder is shown control pictures, one of seeing.WAYS."""

    source: str
    how: How
    wording: Wording
    repeats: int = 1
    unmasked: float = 0.0
    dropout: float = 0.0
    share: float = 0.0
    weight: float = 1.0
    auto: bool = False
    cached: bool = True
    way: str = "edit plus"

    def texts(self, caption: str | None, regularisation: bool) -> tuple[str, ...]:
        """A picture for regularisation shows what the trigger word does not mean."""
        wording = replace(self.wording, trigger="") if regularisation else self.wording
        return wording.texts(caption)


class Made(NamedTuple):
    dataset: Dataset
    sheet: Tensor


def made(
    asked: Asked,
    gathered: Gathered,
    regular: Gathered,
    entries: Sequence[Entry],
    conditioning: Sequence[Any] | None,
    vae: Any,
    clip: Any,
    node_id: Any,
) -> Made:
    """The data set of pictures, or of entries that are latents already, and of pictures for regularisation.

    conditioning, where there is one, is of each picture gathered. Raises TrainingError where nothing is left.
    """
    if sees(clip) and any(entry.controls and entry.condition is None for entry in entries):
        what = "The text encoder is shown the control pictures, and there are latents of them alone."
        raise TrainingError(
            what, remedy="Connect images and control_images, or conditionings of TextEncodeQwenImageEdit."
        )
    kept = shelf() if asked.cached else None
    thumbs = [_of_latent(entry) for entry in entries[: encoding.THUMBS]]
    every, pictures = list(entries), encoding.Pictures(left_out=list(gathered.left_out))
    wires = dict(zip((raw.name for raw in gathered.raws), conditioning or (), strict=False))
    for of, regularisation in ((gathered, False), (regular, True)):
        if of.raws:
            with Meter(node_id, "Encoding pictures", "pictures") as meter:
                shown = partial(_shown, asked, regularisation)
                seen = sees(clip) and (regularisation or conditioning is None)
                found = encoding.latents_of(vae, of.raws, asked.how, kept, meter, shown, seen=seen)
            every += [
                Entry(
                    each.raw.name,
                    each.latents,
                    each.masks,
                    each.size,
                    each.raw.caption,
                    None if regularisation else wires.get(each.raw.name),
                    each.raw.repeats,
                    regularisation,
                    each.controls,
                    each.seen,
                )
                for each in found.encoded
            ]
            pictures.left_out += [*(regular.left_out if regularisation else ()), *found.left_out]
            pictures.small += found.small
            pictures.cropped += found.cropped
            pictures.kept += found.kept
            pictures.patched |= found.patched
            thumbs += found.thumbs
    usable = [entry._replace(masks=masked(entry.masks, asked.unmasked)) for entry in every]
    empty = [entry.name for entry in usable if not all((mask > 0).any() for mask in entry.masks)]
    pictures.left_out += [(name, "its mask leaves nothing of it") for name in dict.fromkeys(empty)]
    usable = [entry for entry in usable if entry.name not in empty]
    if all(entry.regularisation for entry in usable):
        raise _nothing(asked, pictures)
    return Made(_dataset(asked, usable, pictures, vae, clip, kept, node_id), sheet(thumbs[: encoding.THUMBS]))


def _dataset(
    asked: Asked, entries: Sequence[Entry], pictures: encoding.Pictures, vae: Any, clip: Any, kept: Any, node_id: Any
) -> Dataset:
    wired = any(_is_shown(entry, clip) for entry in entries)
    dropout = asked.dropout if clip is not None and not wired else 0.0
    eye = Eye(asked.way, vae, encoding.settings_of(vae)) if any(entry.seen for entry in entries) else None

    def texts_of(entry: Entry) -> tuple[str, ...]:
        return () if entry.condition is not None else asked.texts(entry.caption, entry.regularisation)

    def prompts_of(entry: Entry, text: str) -> list[str | Sight]:
        """What the text encoder reads with each latent, or with all."""
        if eye is None or not entry.seen:
            return [text]
        return [Sight(entry.name, text, entry.seen, n > 0, eye) for n in range(len(entry.latents))]

    def condition_of(entry: Entry, text: str) -> Any:
        found = Guises(encoded.conditions[prompt] for prompt in prompts_of(entry, text))
        return found if len(found) > 1 else found[0]

    def empty_of(entry: Entry) -> Any:
        return condition_of(entry, "") if dropout and entry.seen else None

    empty = [""] if dropout else []
    prompts = [each for entry in entries for text in texts_of(entry) for each in prompts_of(entry, text)]
    prompts += [each for entry in entries for text in empty if entry.seen for each in prompts_of(entry, text)]
    with Meter(node_id, "Encoding captions", "captions") as meter:
        encoded = encoding.conditions_of(clip, [*prompts, *empty], kept, meter)
    apart = held_out((entry.name for entry in entries if not entry.regularisation), asked.share)

    def picture(entry: Entry) -> Picture:
        captions = texts_of(entry)
        conditions = tuple(condition_of(entry, text) for text in captions) or (entry.condition,)
        return Picture(
            entry.name,
            entry.latents,
            conditions,
            entry.masks,
            captions,
            entry.repeats * (1 if entry.regularisation else asked.repeats),
            asked.weight if entry.regularisation else 1.0,
            None if entry.size is None else (entry.size.height, entry.size.width),
            entry.regularisation,
            controls=entry.controls,
            empty=empty_of(entry),
        )

    learned = [picture(entry) for entry in entries if entry.regularisation or entry.name not in apart]
    looked_at = [picture(entry) for entry in entries if not entry.regularisation and entry.name in apart]
    notes = []
    if asked.dropout and clip is None:
        notes.append("captions are never left out: that needs a CLIP")
    elif asked.dropout and wired:
        notes.append("captions are never left out: the conditionings show control pictures")
    for name, patched in (("VAE", pictures.patched), ("CLIP", encoded.patched)):
        if patched:
            notes.append(f"the {name} is patched: what it makes is not kept, and made anew each time")
    if kept is not None and kept.fault:
        notes.append(f"the cache cannot be written, all goes on without it: {shown(kept.folder)} {kept.fault}")
    if kept is not None:
        kept.trim()
    report = _report(asked, entries, learned, looked_at, pictures, dropout) | {
        "kept": {
            "latents": [pictures.kept, sum(entry.size is not None for entry in entries)],
            "texts": [encoded.kept, len(encoded.conditions)],
        },
        "notes": notes,
    }
    return Dataset(tuple(learned), tuple(looked_at), encoded.conditions[""] if dropout else None, dropout, report)


def _report(
    asked: Asked,
    entries: Sequence[Entry],
    learned: Sequence[Picture],
    looked_at: Sequence[Picture],
    pictures: encoding.Pictures,
    dropout: float,
) -> dict[str, Any]:
    buckets = Counter(Size(*each.size).text for each in (*learned, *looked_at) if each.size is not None)
    names = dict.fromkeys(each.name for each in learned if not each.regularisation)
    regular = dict.fromkeys(each.name for each in learned if each.regularisation)
    texts = {each.name: each.caption for each in entries if each.condition is None}
    without = [name for name, caption in texts.items() if not caption]
    return {
        "version": 1,
        "source": asked.source,
        "pictures": len(names),
        "held_out": len({each.name for each in looked_at}),
        "regularisation": len(regular),
        "epoch": sum(each.repeats for each in learned),
        "resolutions": list(asked.how.resolutions) if buckets else [],
        "auto": asked.auto,
        "buckets": buckets.most_common(),
        "captions": {"written": len(texts) - len(without), "without": without, "trigger": asked.wording.trigger}
        if texts
        else None,
        "masks": len({each.name for each in (*learned, *looked_at) if each.masks}),
        "controls": len({each.name for each in entries if each.controls or each.seen}),
        "mirrored": asked.how.mirrored,
        "dropout": dropout,
        "small": pictures.small,
        "cropped": pictures.cropped,
        "left_out": [list(each) for each in pictures.left_out],
    }


def _is_shown(entry: Entry, clip: Any) -> bool:
    """Whether a conditioning that came over a wire shows control pictures, or may: without its text is another one."""
    if entry.condition is None:
        return False
    return bool(controls_in(entry.condition) or (entry.controls and sees(clip)))


def _shown(asked: Asked, regularisation: bool, raw: Any) -> str:
    return asked.texts(raw.caption, regularisation)[0]


def _nothing(asked: Asked, pictures: encoding.Pictures) -> TrainingError:
    what = f"None of the pictures of '{shown(asked.source)}' can be used."
    for name, why in pictures.left_out[:3]:
        what += f" {shown(name)}: {shown(why, 300)}"
    return TrainingError(what, left_out=pictures.left_out)


def _of_latent(entry: Entry) -> Thumb:
    """A latent in grey: the mean of its channels."""
    grey = entry.latents[0].float().cpu().mean(0).reshape(-1, *entry.latents[0].shape[-2:])[0]
    grey = (grey - grey.mean()) / (4 * grey.std().clamp_min(1e-6)) + 0.5
    large = torch.nn.functional.interpolate(grey[None, None], scale_factor=8)[0, 0]
    return thumb(large[None, :, :, None].expand(-1, -1, -1, 3), None, entry.caption or entry.name)
