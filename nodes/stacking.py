"""Nodes that put several LoRAs on a model."""

from __future__ import annotations

import json
import time
from dataclasses import replace

from ..lora_ops.landing import land, require_coverage
from ..lora_ops.receipt import receipt
from ..lora_ops.stack import finite, parse
from ..lora_ops.words import joined
from .host import names, patching
from .host.api import io
from .host.graph import in_use, require_inputs
from .host.rows import on_disk
from .sockets import require_tellable, rows_of, wire_of
from .widgets import LoraStackType, min_coverage, mode, stack, told


class LoraOpsStack(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoraOpsStack",
            display_name="LoRA Stack (LoRA Ops)",
            category="model/loaders",
            description="Puts any number of LoRAs on a model, in order, and says what landed of each.",
            search_aliases=["lora", "lora stack", "power lora", "multi lora", "lora loader"],
            inputs=[
                stack(),
                io.Model.Input("model", optional=True, tooltip="The diffusion model; the input itself stays as it is."),
                io.Clip.Input("clip", optional=True, tooltip="The text encoder, for LoRAs trained on it too."),
                LoraStackType.Input(
                    "lora_stack", optional=True, tooltip="Rows from another stack node; they come before these."
                ),
                min_coverage(),
                mode(),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The model with all rows that are on."),
                io.Clip.Output(display_name="CLIP", tooltip="The text encoder with all rows that are on."),
                LoraStackType.Output(display_name="LORA_STACK", tooltip="The incoming rows, then these."),
                io.String.Output(display_name="trigger_words", tooltip="The words of all rows, separated by commas."),
                io.String.Output(display_name="receipt", tooltip="What landed and what did not, row by row, as JSON."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
            has_intermediate_output=True,
        )

    @classmethod
    async def validate_inputs(cls, stack=None):
        return await names.checked(lambda: [names.find(row.name, row.sha256) for row in parse(stack or "") if row.on])

    @classmethod
    def fingerprint_inputs(cls, stack="", **inputs):
        """A wired text or stack is None here: then any changed LoRA file counts."""
        if stack is None or "lora_stack" in inputs:
            return names.fingerprint_of_all()
        return names.fingerprint([(row.name, row.sha256) for row in parse(stack) if row.on])

    @classmethod
    def execute(cls, stack, min_coverage, mode, model=None, clip=None, lora_stack=None):
        require_inputs(cls.hidden, MODEL=model, CLIP=clip)
        rows = tuple(row for row in (*rows_of(lora_stack), *parse(stack)) if row.on)
        if in_use(cls.hidden, 2):
            require_tellable(rows)
        meant, loaded, entries = on_disk(rows)
        start = time.perf_counter()
        landing = land(entries, patching.targets(model, clip))
        if landing.parts:
            require_coverage(landing, finite(min_coverage, "min_coverage"))
        seconds = time.perf_counter() - start
        words = [each.words() for each in loaded]
        model, clip, how, survival = patching.applied(landing, mode, model, clip)
        found = receipt(landing, seconds, how, survival)
        return io.NodeOutput(
            model,
            clip,
            wire_of(replace(row, name=each.name) for row, each in zip(rows, meant, strict=True)),
            joined(word for each in words for word in each.words),
            json.dumps(found.data, ensure_ascii=False),
            ui=told(found.data, "\n".join([found.text, *(fault for each in words for fault in each.faults)])),
        )
