"""Nodes that read LoRA files."""

from __future__ import annotations

import json

from ..lora_ops.errors import LoraOpsError, shown
from ..lora_ops.report import report
from ..lora_ops.words import joined
from .host import caches, names
from .host.api import io
from .sockets import LoraModel, lora_of, rows_of, words_of
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
                    tooltip="A file in models/loras. Names from other systems and moved files are understood.",
                ),
            ],
            outputs=[
                LoraModelType.Output(display_name="lora", tooltip="The LoRA, for Apply LoRA and for core's nodes."),
                io.String.Output(
                    display_name="trigger_words",
                    tooltip="The words it answers to, from its metadata or from a file beside it.",
                ),
                io.String.Output(display_name="info", tooltip="What the file is, as JSON."),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def validate_inputs(cls, lora_name=None):
        try:
            return lora_name is None or bool(names.find(lora_name))
        except LoraOpsError as error:
            return str(error)

    @classmethod
    def fingerprint_inputs(cls, lora_name=None):
        return names.fingerprint_of_all() if lora_name is None else names.fingerprint([(lora_name, "")])

    @classmethod
    def execute(cls, lora_name):
        meant = names.find(lora_name)
        loaded = caches.load(meant.name, meant.path)
        words = loaded.words()
        found = report(loaded.lora, words, meant.asked)
        info = json.dumps(found.data, ensure_ascii=False)
        model = LoraModel(loaded.file, loaded.lora, words)
        return io.NodeOutput(model, joined(words.words), info, ui=told(found.data, found.text))


class LoraOpsTriggerWords(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoraOpsTriggerWords",
            display_name="LoRA Trigger Words (LoRA Ops)",
            category="model/loaders",
            description="The words that LoRAs answer to, for a prompt, and where they are written.",
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
        found = [] if lora is None else [(lora_of(lora).name, words_of(lora))]
        for row in rows_of(lora_stack):
            meant = names.find(row.name)
            found.append((meant.name, caches.load(meant.name, meant.path).words()))
        words = joined(word for _, each in found for word in each.words)
        data = {"trigger_words": words, "trigger_words_from": [[name, each.source] for name, each in found]}
        text = "\n".join(f"{shown(name)}: {each.text}" for name, each in found)
        return io.NodeOutput(words, ui=told(data, text or "no trigger words"))
