"""Nodes that write files."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch

from ..lora_ops.errors import shown
from .host import destinations, saving
from .host.api import io
from .host.checkpoints import FOLDERS, Part
from .host.progress import Meter
from .widgets import told

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
                    "diffusion model, CLIP, VAE: that alone; a CLIP of several encoders is a file for each.",
                ),
                _dtype("model"),
                _dtype("clip"),
                _dtype("vae"),
                destination("models/checkpoints, diffusion_models, text_encoders or vae, as the layout is"),
                if_exists(),
            ],
            outputs=[
                io.String.Output(display_name="path", tooltip="The file; of several, one a line."),
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
            saved = saving.save(layout, parts, to, if_exists, graph, meter)
        path = "\n".join(str(each.path) for each in saved)
        data = {"version": 1, "files": [each.data for each in saved]}
        return io.NodeOutput(path, json.dumps(data, ensure_ascii=False), ui=told(data, _text(saved)))


def _text(saved: Sequence[saving.Saved]) -> str:
    lines = []
    for each in saved:
        lines += [f"✓ {shown(each.path.name)}: {each.bytes / 1e9:.2f} GB, {each.tensors} tensors ({each.stored})"]
        lines += [f"   {each.verified.text}", *(f"! {note}" for note in each.notes)]
    return "\n".join(lines)
