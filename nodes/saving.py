"""Nodes that write files."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from ..lora_ops import checkpoints
from ..lora_ops.errors import TargetError, shown
from ..lora_ops.families import FAMILIES, Family, recognise
from ..lora_ops.landing import guess, land, require_coverage
from ..lora_ops.layouts import LAYOUTS, write, write_numbered
from ..lora_ops.lora import Lora
from ..lora_ops.receipt import by_weight, receipt
from ..lora_ops.stack import finite, parse
from ..lora_ops.words import PHRASE, joined
from .host import caches, destinations, names, patching, saving
from .host.api import io
from .host.checkpoints import FOLDERS, Part
from .host.progress import Meter
from .host.rows import on_disk
from .sockets import lora_of, rows_of, words_of
from .widgets import LoraModelType, LoraStackType, min_coverage, stack, told

DTYPES = {"keep": None, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def filename_prefix(default: str) -> io.Input:
    return io.String.Input(
        "filename_prefix",
        default=default,
        tooltip="The name, with folders before it if need be. %date:yyyy-MM-dd% and %Node title.input% stand for the "
        "date and for a value in the graph. A name that leads out of the folder is refused.",
    )


def destination(kinds: str) -> io.Input:
    return io.Combo.Input(
        "destination",
        options=list(destinations.WHERE),
        tooltip=f"output: the output folder. models: {kinds}, where the loaders list it.",
    )


def if_exists() -> io.Input:
    return io.Combo.Input(
        "if_exists",
        options=list(destinations.IF_EXISTS),
        tooltip="number: name_00001_, name_00002_, …, the next one that is free. refuse: the name itself, or an error "
        "if it is taken. No file is ever overwritten.",
    )


def _dtype(part: str) -> io.Input:
    return io.Combo.Input(
        f"dtype_{part}",
        options=list(DTYPES),
        tooltip=f"How the {part} is stored. keep: each tensor as its source file has it. Weights are rounded once.",
    )


class LoraOpsSaveCheckpoint(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoraOpsSaveCheckpoint",
            display_name="Save Checkpoint (LoRA Ops)",
            category="model/merging",
            description="Writes a model with all that is on it, compares the file with the model, and only then names "
            "it.",
            search_aliases=["save model", "save checkpoint", "export checkpoint", "merge save", "bake lora"],
            inputs=[
                io.Model.Input("model", optional=True, tooltip="The diffusion model with its LoRAs, patched or live."),
                io.Clip.Input("clip", optional=True, tooltip="The text encoder with its LoRAs."),
                io.Vae.Input("vae", optional=True, tooltip="The VAE."),
                filename_prefix("checkpoints/LoRA_Ops"),
                io.Combo.Input(
                    "layout",
                    options=list(FOLDERS),
                    tooltip="What is written. full checkpoint: the model, with CLIP and VAE if they are connected. "
                    "diffusion model, CLIP, VAE: that alone; a CLIP of several encoders is a file for each. sharded "
                    "diffusers folder: the model as diffusers keeps it.",
                ),
                _dtype("model"),
                _dtype("clip"),
                _dtype("vae"),
                destination("models/checkpoints, diffusion_models, text_encoders, vae or diffusers, as the layout is"),
                if_exists(),
                io.Float.Input(
                    "max_shard_size",
                    default=5.0,
                    min=0.1,
                    max=1000.0,
                    step=0.1,
                    optional=True,
                    tooltip="In GB, the largest file of a sharded folder; other layouts have one file.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="path", tooltip="The file or folder; of several, one a line."),
                io.String.Output(
                    display_name="receipt", tooltip="What was written and how far it is from the model, as JSON."
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        filename_prefix,
        layout,
        dtype_model,
        dtype_clip,
        dtype_vae,
        destination,
        if_exists,
        max_shard_size=5.0,
        model=None,
        clip=None,
        vae=None,
    ):
        dtypes = {"model": dtype_model, "clip": dtype_clip, "vae": dtype_vae}
        things = {"model": model, "clip": clip, "vae": vae}
        parts = {name: Part(name, thing, DTYPES[dtypes[name]]) for name, thing in things.items() if thing is not None}
        to = destinations.destination(destination, FOLDERS[layout], filename_prefix, cls.hidden.prompt)
        graph = saving.workflow(cls.hidden.prompt, cls.hidden.extra_pnginfo)
        with Meter(cls.hidden.unique_id, to.name) as meter:
            saved = saving.save(layout, parts, to, if_exists, graph, meter, max_shard_size * 1e9)
        path = "\n".join(str(each.path) for each in saved)
        data = {"version": 1, "files": [each.data for each in saved]}
        return io.NodeOutput(path, json.dumps(data, ensure_ascii=False), ui=told(data, _text(saved)))


def _text(saved: Sequence[saving.Saved]) -> str:
    lines = []
    for each in saved:
        lines += [f"✓ {shown(each.path.name)}: {each.bytes / 1e9:.2f} GB, {each.tensors} tensors ({each.stored})"]
        lines += [f"   {each.verified.text}", *(f"! {note}" for note in each.notes)]
    return "\n".join(lines)


class LoraOpsSaveLora(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoraOpsSaveLora",
            display_name="Save LoRA (LoRA Ops)",
            category="model/merging",
            description="Writes a LoRA as another program reads it, with the same effect.",
            search_aliases=["save lora", "export lora", "convert lora"],
            inputs=[
                LoraModelType.Input("lora", tooltip="The LoRA, from Load LoRA, Scale LoRA, Train LoRA, …"),
                filename_prefix("loras/LoRA_Ops"),
                io.Combo.Input(
                    "layout",
                    options=[layout.name for layout in LAYOUTS],
                    tooltip="Whose names it is written in. kohya: sd-scripts and most programs. comfy: the model's own "
                    "names. diffusers. peft: a folder with its adapter_config.json, for one network. lycoris: "
                    "LyCORIS' and SimpleTuner's, which have names for parts of fused weights (FLUX's q, k and v).",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    tooltip="How the factors are stored. keep: each as it is. Else rounded once.",
                ),
                io.String.Input(
                    "trigger_words",
                    default="",
                    tooltip="The words it answers to, separated by commas, written into its metadata. Empty: those it "
                    "has.",
                ),
                destination("models/loras"),
                if_exists(),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The model it is for. Without it: the published model the LoRA looks made for.",
                ),
                io.Clip.Input(
                    "clip", optional=True, tooltip="The text encoder, where a model is connected and the LoRA has both."
                ),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="The file, or PEFT's folder.")],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        lora,
        filename_prefix,
        layout,
        dtype,
        trigger_words,
        destination,
        if_exists,
        model=None,
        clip=None,
    ):
        to = destinations.destination(destination, "loras", filename_prefix, cls.hidden.prompt)
        (chosen,) = (each for each in LAYOUTS if each.name == layout)
        found, shapes = lora_of(lora), patching.shapes(model, clip)
        kept = {key: value for key, value in found.metadata.items() if key not in saving.GRAPH}
        told_too = saving.workflow(cls.hidden.prompt, cls.hidden.extra_pnginfo)
        if words := trigger_words.strip() or joined(words_of(lora).words):
            told_too[PHRASE] = words
        arguments = {
            "lora": replace(found, metadata=kept),
            "layout": chosen,
            "family": recognise(shapes) if shapes else _family(found),
            "shapes": shapes or None,
            "metadata": told_too,
            "dtype": DTYPES[dtype],
        }
        ending = "" if chosen.folder else saving.SUFFIX
        if if_exists == "number":
            path, laid = write_numbered(partial(to.numbered, ending), **arguments)
        else:
            path = to.path(ending)
            laid = write(path, overwrite=False, **arguments)
        to.refresh()
        text = f"✓ {shown(path.name)}: {len(laid.modules)} modules in the layout {layout}"
        data = {"version": 1, "path": str(path), "layout": layout, "modules": len(laid.modules)}
        return io.NodeOutput(str(path), ui=told(data, text))


class LoraOpsMergeFiles(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoraOpsMergeFiles",
            display_name="Merge LoRAs into File (LoRA Ops)",
            category="model/merging",
            description="Merges LoRAs into a model's file without loading the model: any size, little memory.",
            search_aliases=["merge lora", "bake lora", "merge checkpoint", "save merged"],
            inputs=[
                io.Combo.Input(
                    "base",
                    options=names.bases(),
                    tooltip="The file to merge into, of models/checkpoints or models/diffusion_models; it stays as it "
                    "is.",
                ),
                stack(),
                io.Combo.Input(
                    "dtype",
                    options=["keep", *checkpoints.DTYPES],
                    tooltip="How the model and its text encoders are stored. keep: each tensor as it is; what no LoRA "
                    "touches is copied byte for byte. Else all of them rounded once; fp8: the matrices.",
                ),
                filename_prefix("checkpoints/LoRA_Ops"),
                destination("the folder that the base is of"),
                if_exists(),
                LoraStackType.Input(
                    "lora_stack", optional=True, tooltip="Rows from a stack node; they come before these."
                ),
                min_coverage(),
            ],
            outputs=[
                io.String.Output(display_name="path", tooltip="The merged file."),
                io.String.Output(display_name="receipt", tooltip="What landed and what did not, as JSON."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    async def validate_inputs(cls, base=None, stack=None):
        def find() -> None:
            for row in parse(stack or ""):
                if row.on:
                    names.find(row.name, row.sha256)
            if base is not None:
                names.base(base)

        return await names.checked(find)

    @classmethod
    def fingerprint_inputs(cls, base=None, stack="", **inputs):
        """A wired text or stack is None here: then any changed LoRA file counts."""
        if base is None or stack is None or "lora_stack" in inputs:
            return names.fingerprint_of_all()
        loras = names.fingerprint([(row.name, row.sha256) for row in parse(stack) if row.on])
        return f"{names.state(names.base(base).path)}; {loras}"

    @classmethod
    def execute(cls, base, stack, dtype, filename_prefix, destination, if_exists, min_coverage, lora_stack=None):
        rows = tuple(row for row in (*rows_of(lora_stack), *parse(stack)) if row.on)
        found, start = names.base(base), time.perf_counter()
        to = destinations.destination(destination, found.kind, filename_prefix, cls.hidden.prompt)
        checkpoint, loras = checkpoints.opened(found.path), on_disk(rows)
        hashed = [
            replace(entry, sha256=caches.tensor_hash(meant.path))
            for entry, meant in zip(loras.entries, loras.meant, strict=True)
        ]
        landing = land(hashed, checkpoint.targets)
        require_coverage(landing, finite(min_coverage, "min_coverage"))
        tensors, metadata, survival = checkpoints.contents(
            checkpoint, landing, dtype=checkpoints.DTYPES.get(dtype), device=saving.device()
        )
        metadata = {key: value for key, value in metadata.items() if key not in saving.GRAPH}
        metadata |= saving.workflow(cls.hidden.prompt, cls.hidden.extra_pnginfo)
        with Meter(cls.hidden.unique_id, to.name) as meter:
            path = saving.put(to, saving.SUFFIX, if_exists, tensors, metadata, meter)
        to.refresh()
        made = receipt(landing, time.perf_counter() - start, survival=survival, predicted=False)
        data = {**made.data, "path": str(path), "bytes": path.stat().st_size}
        text = f"✓ {shown(path.name)}: {data['bytes'] / 1e9:.2f} GB\n{made.text}"
        whole = {**data, "survival_by_weight": by_weight(survival)}
        return io.NodeOutput(str(path), json.dumps(whole, ensure_ascii=False), ui=told(data, text))


def _family(lora: Lora) -> Family:
    likely = guess(lora)
    for family in FAMILIES:
        if likely and family.name == likely.family:
            return family
    raise TargetError("looks made for no model this version knows.", file=lora.name, remedy="Connect its MODEL.")
