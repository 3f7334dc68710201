"""The node that makes a data set to train on."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ..lora_ops.errors import LoraOpsError, TrainingError, shown
from ..lora_ops.train.cutting import MASKS, How
from ..lora_ops.train.gathering import Gathered, Wording, each_its_own, of_folder, of_images, of_latents
from ..lora_ops.train.telling import text
from .host import datasets, folders
from .host.api import io
from .host.encoding import native
from .host.seeing import WAYS
from .widgets import LoraDatasetType, told

LISTS = ("images", "captions", "masks", "latents", "conditioning", "control_images", "control_latents")


class LoraOpsDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoraOpsDataset",
            display_name="Training Dataset (LoRA Ops)",
            category="model/training",
            description="Makes a data set to train a LoRA on from a folder of pictures, and tells what is in it.",
            search_aliases=["lora", "dataset", "training data", "captions", "buckets", "dreambooth"],
            is_input_list=True,
            is_output_node=True,
            inputs=inputs(),
            outputs=[
                LoraDatasetType.Output(display_name="dataset", tooltip="For Train LoRA."),
                io.Image.Output(
                    display_name="preview",
                    tooltip="The first pictures as they are cut, with their captions; what a mask leaves out is dark.",
                ),
                io.String.Output(display_name="report", tooltip="What was found and what was left out, as JSON."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, folder=None, control_folder=None):
        """A folder that is not there is told before anything runs; None comes over a wire."""
        try:
            for name in {*(folder or ()), *(control_folder or ())} - {None, folders.NONE}:
                folders.find(name)
        except LoraOpsError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, folder, regularisation, control_folder=(), **_):
        return folders.state(*folder, *regularisation, *(control_folder or ()))

    @classmethod
    def execute(cls, **given):
        lists, one = {name: given.pop(name, None) for name in LISTS}, only(given)
        clip, vae = one.get("clip"), one.get("vae")
        source = source_of(one["folder"], lists)
        require_used(one, lists)
        resolutions = resolutions_of(one["resolution"])
        asked = datasets.Asked(
            source=one["folder"] if source == "folder" else source,
            how=How(
                resolutions or (native(clip, vae),),
                one["bucket_step"],
                one["aspect_buckets"],
                one["enlarge"],
                one["mirror"],
                one["mask_from"],
            ),
            wording=Wording(one["trigger_word"].strip(), one["tag_orders"], one["keep_tags"]),
            repeats=one["repeats"],
            unmasked=one["unmasked_weight"],
            dropout=one["caption_dropout"],
            share=one["validation"],
            weight=one["regularisation_weight"],
            auto=not resolutions,
            cached=one["cache"],
            way=one.get("control_seen") or next(iter(WAYS)),
        )
        gathered, entries, conditioning = Gathered(()), [], None
        if source == "latents":
            entries = of_latents(lists["latents"], lists["captions"], lists["conditioning"], lists["control_latents"])
        elif source == "images":
            gathered = of_images(lists["images"], lists["captions"], lists["masks"], lists["control_images"])
            if lists["conditioning"] is not None:
                conditioning = each_its_own(lists["conditioning"], len(gathered.raws), "conditionings")
        else:
            controls = one.get("control_folder") or folders.NONE
            gathered = of_folder(
                folders.find(one["folder"]), controls=None if controls == folders.NONE else folders.find(controls)
            )
        regular = Gathered(())
        if one["regularisation"] != folders.NONE:
            regular = of_folder(folders.find(one["regularisation"]), f"{one['regularisation']}/")
        made = datasets.made(asked, gathered, regular, entries, conditioning, vae, clip, cls.hidden.unique_id)
        report = made.dataset.report
        return io.NodeOutput(
            made.dataset, made.sheet, json.dumps(report, ensure_ascii=False), ui=told(report, text(report))
        )


def inputs() -> list[io.Input]:
    listed = folders.listed()
    return [
        io.Combo.Input(
            "folder",
            options=listed,
            tooltip="A folder of pictures in ComfyUI's input folder, each with its caption in a .txt of the same name. "
            "Folders in it named like 10_name count so many times.",
        ),
        io.Image.Input("images", optional=True, tooltip="Pictures instead of a folder: a list or a batch."),
        io.String.Input(
            "captions",
            optional=True,
            force_input=True,
            tooltip="The captions of images or latents: as many as there are, or one for all.",
        ),
        io.Mask.Input(
            "masks",
            optional=True,
            tooltip="The masks of images, white where they are learned: as many, or one for all.",
        ),
        io.Latent.Input(
            "latents", optional=True, tooltip="Latents instead of pictures, as core's data set nodes give."
        ),
        io.Conditioning.Input(
            "conditioning",
            optional=True,
            tooltip="Conditionings instead of captions, for images or latents: as many as there are, or one for all.",
        ),
        io.Vae.Input("vae", optional=True, tooltip="Makes latents of pictures. The one of the model that is trained."),
        io.Clip.Input(
            "clip", optional=True, tooltip="Makes conditionings of captions. The one of the model that is trained."
        ),
        io.String.Input(
            "resolution",
            default="auto",
            tooltip="Pictures are scaled to about as many pixels as a square of this side has. auto: 512 for SD1.5, "
            "768 for SD2, else 1024. Several, separated by commas: each picture is learned in each.",
        ),
        io.String.Input(
            "trigger_word",
            default="",
            tooltip="A word that every caption shall have: put before those that do not have it. Choose one that means "
            "nothing to the model.",
        ),
        *advanced(listed),
    ]


def advanced(listed: list[str]) -> list[io.Input]:
    return [
        io.Int.Input(
            "repeats",
            default=1,
            min=1,
            max=10_000,
            tooltip="Times that each picture comes in an epoch, beside those for regularisation.",
            advanced=True,
        ),
        io.Boolean.Input(
            "mirror",
            default=False,
            tooltip="Learn each picture's mirror image too. Not for faces, text, and what has a left and a right side.",
            advanced=True,
        ),
        io.Combo.Input(
            "mask_from",
            options=list(MASKS),
            default="files",
            tooltip="Learn only where a mask is white. files: NAME_mask.png beside a picture, or a folder masks; "
            "transparency: without a file, what is not transparent. off: learn everything.",
            advanced=True,
        ),
        io.Float.Input(
            "unmasked_weight",
            default=0.1,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="How much the places outside of a mask count (0: nothing, 1: as much as those inside). A little "
            "keeps the model from painting anything there.",
            advanced=True,
        ),
        io.Int.Input(
            "tag_orders",
            default=1,
            min=1,
            max=100,
            tooltip="In how many orders of its tags (between commas) each caption is learned. 1: as it is written.",
            advanced=True,
        ),
        io.Int.Input(
            "keep_tags",
            default=1,
            min=0,
            max=100,
            tooltip="Tags at a caption's beginning that keep their place in every order, the trigger word among them.",
            advanced=True,
        ),
        io.Float.Input(
            "caption_dropout",
            default=0.05,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="How often a picture comes without its caption (0 to 1). A little keeps guidance working. Captions "
            "only: not without a clip.",
            advanced=True,
        ),
        io.Combo.Input(
            "regularisation",
            options=listed,
            default=folders.NONE,
            tooltip="A folder of pictures of what the model should not forget (DreamBooth's class pictures). "
            "They get no trigger word.",
            advanced=True,
        ),
        io.Float.Input(
            "regularisation_weight",
            default=1.0,
            min=0.0,
            max=100.0,
            step=0.05,
            tooltip="How much those count beside the others (1: as much).",
            advanced=True,
        ),
        io.Float.Input(
            "validation",
            default=0.0,
            min=0.0,
            max=0.5,
            step=0.01,
            tooltip="Share of the pictures (0 to 0.5) that is not learned from but looked at, to see what training "
            "does to pictures it does not know. More than 0 is one picture at least.",
            advanced=True,
        ),
        io.Boolean.Input(
            "aspect_buckets",
            default=True,
            tooltip="Cut each picture to the shape nearest to its own. Off: all to squares.",
            advanced=True,
        ),
        io.Int.Input(
            "bucket_step",
            default=64,
            min=8,
            max=256,
            step=8,
            tooltip="The sides of cut pictures are multiples of this many pixels. A smaller step cuts off less and "
            "makes more sizes; only pictures of one size make a batch.",
            advanced=True,
        ),
        io.Boolean.Input(
            "enlarge",
            default=False,
            tooltip="Enlarge pictures that are smaller than the resolution. Off: they keep their size, and stay sharp.",
            advanced=True,
        ),
        io.Boolean.Input(
            "cache",
            default=True,
            tooltip="Keep latents and conditionings on disk (in ComfyUI's user folder), so that only what changed is "
            "made again.",
            advanced=True,
        ),
        io.Combo.Input(
            "control_folder",
            options=listed,
            default=folders.NONE,
            optional=True,
            tooltip="To train an edit: a folder of the pictures before it, called like those after it in folder. "
            "none: a folder control in folder, or NAME_control.png beside.",
            advanced=True,
        ),
        io.Image.Input(
            "control_images",
            optional=True,
            tooltip="To train an edit: images before it, one for each of images, which are those after it.",
        ),
        io.Latent.Input(
            "control_latents",
            optional=True,
            tooltip="To train an edit: latents before it, one for each of latents, which are those after it.",
        ),
        io.Combo.Input(
            "control_seen",
            options=list(WAYS),
            default=next(iter(WAYS)),
            optional=True,
            tooltip="How Qwen-Image-Edit's text encoder sees control pictures, and so how the LoRA is used: edit plus, "
            "as TextEncodeQwenImageEditPlus (2509 and later, up to 3 pictures); edit, as TextEncodeQwenImageEdit.",
            advanced=True,
        ),
    ]


def only(given: Mapping[str, list[Any]]) -> dict[str, Any]:
    """The one value of each input. Raises TrainingError where a wire brings several."""
    for name, values in given.items():
        if len(values) != 1:
            what = f"{name} has {len(values)} values; a data set has one."
            raise TrainingError(what, remedy="Connect a node that puts out one.")
    return {name: values[0] for name, values in given.items()}


def source_of(folder: str, lists: Mapping[str, Any]) -> str:
    """folder, images or latents. Raises TrainingError for none, for two, and for what does not go with it."""
    there = [name for name in ("images", "latents") if lists[name] is not None]
    there += ["folder"] if folder != folders.NONE else []
    if not there:
        raise TrainingError("There are no pictures.", remedy="Choose a folder, or connect images or latents.")
    if len(there) > 1:
        what = f"There are pictures from {' and from '.join(there)}; a data set has one source."
        raise TrainingError(what, remedy=f"Set the folder to {folders.NONE} or disconnect the others.")
    goes = {
        "folder": (),
        "images": ("captions", "masks", "conditioning", "control_images"),
        "latents": ("captions", "conditioning", "control_latents"),
    }
    for name in ("captions", "masks", "conditioning", "control_images", "control_latents"):
        if lists[name] is not None and name not in goes[there[0]]:
            raise TrainingError(f"{name} do not go with {there[0]}.", remedy=f"Disconnect {name}.")
    if lists["captions"] is not None and lists["conditioning"] is not None:
        raise TrainingError("There are captions and conditionings.", remedy="Disconnect one of the two.")
    return there[0]


def require_used(one: Mapping[str, Any], lists: Mapping[str, Any]) -> None:
    """Raises TrainingError for what is asked for and cannot be done with what is connected."""
    if one["folder"] == folders.NONE and one.get("control_folder", folders.NONE) != folders.NONE:
        what = "control_folder goes with a folder, and there is none."
        raise TrainingError(what, remedy="Connect control_images or control_latents instead.")
    texts = one["trigger_word"].strip() or one["tag_orders"] > 1
    for wire, asked, what, remedy in (
        (
            "latents",
            one["mirror"],
            "mirror is on, and latents have no mirror image.",
            "Turn it off, or connect images.",
        ),
        (
            "conditioning",
            texts,
            "trigger_word and tag_orders change captions, and the pictures come with conditionings.",
            "Connect captions instead.",
        ),
        ("masks", one["mask_from"] == "off", "masks are connected, and mask_from is off.", "Set it to files."),
    ):
        if lists[wire] is not None and asked:
            raise TrainingError(what, remedy=remedy)


def resolutions_of(text: str) -> tuple[int, ...]:
    """The resolutions that are written; none for auto. Raises TrainingError for anything else."""
    if text.strip().lower() in ("auto", ""):
        return ()
    found = [part.strip() for part in re.split(r"[,; ]+", text.strip())]
    if not all(part.isdecimal() and 8 <= int(part) <= 8192 for part in found):
        what = f"'{shown(text)}' is no resolution."
        raise TrainingError(what, remedy="Write auto, or sides in pixels from 8 to 8192, such as 768 or 512, 1024.")
    return tuple(dict.fromkeys(map(int, found)))
