"""Nodes that read LoRA files."""

from __future__ import annotations

import json

from ..lora_ops.errors import LoraOpsError, shown
from ..lora_ops.report import joined, report, trigger_words
from .host import caches, names
from .host.api import io
from .sockets import LoraModel, lora_of, rows_of
from .widgets import LoraModelType, LoraStackType, told


class LoraOpsLoad(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoraOpsLoad",
            display_name="Load LoRA (LoRA Ops)",
            category="model/loaders",
            description="Reads a LoRA file, checks every byte of it, and tells what it is.",
            search_aliases=["lora", "load lora", "lora loader", "lora info", "inspect lora"],
            inputs=[
                io.Combo.Input(
                    "lora_name",
                    options=names.listed(),
                    tooltip="A file in models/loras. Back slashes and moved files are understood.",
                ),
            ],
            outputs=[
                LoraModelType.Output(display_name="lora", tooltip="The LoRA, for Apply LoRA and for core's nodes."),
                io.String.Output(display_name="trigger_words", tooltip="The words it answers to, from its metadata."),
                io.String.Output(display_name="info", tooltip="What the file is, as JSON."),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def validate_inputs(cls, lora_name=None):
        try:
            return lora_name is None or bool(names.path_of(lora_name))
        except LoraOpsError as error:
            return str(error)

    @classmethod
    def fingerprint_inputs(cls, lora_name=None):
        return names.fingerprint_of_all() if lora_name is None else names.fingerprint([lora_name])

    @classmethod
    def execute(cls, lora_name):
        loaded = caches.load(lora_name)
        found = report(loaded.lora)
        words = joined(found.data["trigger_words"])
        info = json.dumps(found.data, ensure_ascii=False)
        return io.NodeOutput(LoraModel(loaded.file, loaded.lora), words, info, ui=told(found.data, found.text))


class LoraOpsTriggerWords(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoraOpsTriggerWords",
            display_name="LoRA Trigger Words (LoRA Ops)",
            category="model/loaders",
            description="The words that LoRAs answer to, from their files' metadata, for a prompt.",
            search_aliases=["trigger words", "activation text", "lora tags"],
            inputs=[
                LoraModelType.Input("lora", optional=True, tooltip="A LoRA."),
                LoraStackType.Input("lora_stack", optional=True, tooltip="A stack of LoRAs."),
            ],
            outputs=[io.String.Output(display_name="trigger_words", tooltip="The words, separated by commas.")],
            has_intermediate_output=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs):
        """The rows of a stack are read here, and they come over a wire: any changed LoRA file counts."""
        return names.fingerprint_of_all() if "lora_stack" in inputs else ""

    @classmethod
    def execute(cls, lora=None, lora_stack=None):
        loras = [] if lora is None else [lora_of(lora)]
        loras += [caches.load(row.name).lora for row in rows_of(lora_stack)]
        words = joined(list(dict.fromkeys(word for found in loras for word in trigger_words(found.metadata))))
        return io.NodeOutput(words, ui=told({"trigger_words": words}, shown(words) or "no trigger words"))
