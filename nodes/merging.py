"""Nodes that make LoRAs part of a model's weights."""

from __future__ import annotations

import json
import time

from ..lora_ops.errors import StackError, shown
from ..lora_ops.landing import land, require_coverage
from ..lora_ops.receipt import MARKS, receipt
from ..lora_ops.stack import Entry, finite
from .host import caches, ledger, merging, names, patching
from .host.api import io
from .host.graph import require_inputs
from .host.progress import Meter
from .sockets import lora_of, rows_of
from .widgets import STRAIGHT, STRENGTH, LoraModelType, LoraStackType, min_coverage, told


class LoraOpsMerge(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoraOpsMerge",
            display_name="Merge LoRA (LoRA Ops)",
            category="model/loaders",
            description="Makes every LoRA of LoRA Ops on a model, and those connected here, part of its weights: "
            "merge and unload.",
            search_aliases=["lora", "merge lora", "bake lora", "fuse lora", "merge and unload"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model. Merges every LoRA that LoRA Ops nodes have put on it, patched or live, and "
                    "then those connected here. Other nodes' patches stay patches. The input itself stays as it is.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="The text encoder; the same for the LoRAs on it."),
                LoraModelType.Input("lora", optional=True, tooltip="A LoRA to merge; it comes last."),
                LoraStackType.Input("lora_stack", optional=True, tooltip="Rows of LoRAs to merge, in order."),
                io.Float.Input(
                    "strength_model",
                    default=1.0,
                    **STRENGTH,
                    tooltip="Factor on the model's update by what is connected here; those on the model already keep "
                    f"their strength. Rows of a stack are multiplied by it. {STRAIGHT}",
                ),
                io.Float.Input(
                    "strength_clip",
                    default=1.0,
                    **STRENGTH,
                    tooltip="Factor on the text encoder's update by what is connected here. Without CLIP it has "
                    "nothing to act on.",
                ),
                min_coverage(),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="A model of its own, with the LoRAs in its weights."),
                io.Clip.Output(display_name="CLIP", tooltip="A text encoder of its own, if a LoRA changed it."),
                io.String.Output(display_name="receipt", tooltip="What was merged and how much survives, as JSON."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
            has_intermediate_output=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs):
        """The rows of a stack are read here, and they come over a wire: any changed LoRA file counts."""
        return names.fingerprint_of_all() if "lora_stack" in inputs else ""

    @classmethod
    def execute(cls, model, strength_model, strength_clip, min_coverage, clip=None, lora=None, lora_stack=None):
        require_inputs(cls.hidden, MODEL=model, CLIP=clip)
        factors = {
            "model": finite(strength_model, "strength_model"),
            "clip": finite(strength_clip, "strength_clip"),
        }
        entries = []
        for row in rows_of(lora_stack):
            meant = names.find(row.name)
            strengths = {part: strength * factors[part] for part, strength in row.strengths.items()}
            entries.append(Entry(caches.load(meant.name, meant.path).lora, strengths, asked=meant.asked))
        if lora is not None:
            entries.append(Entry(lora_of(lora), factors))
        there = [*ledger.records(model), *(() if clip is None else ledger.records(clip.patcher))]
        before = [record for record in there if record.how != "merged"]
        if not entries and not before:
            what = "There is nothing to merge: no LoRA is connected, and none of LoRA Ops is on the model."
            raise StackError(what, remedy="Connect a lora or a lora_stack.")
        start = time.perf_counter()
        landing = land(entries, patching.targets(model, clip))
        require_coverage(landing, finite(min_coverage, "min_coverage"))
        seconds = time.perf_counter() - start
        with Meter(cls.hidden.unique_id, "Merging LoRAs") as progress:
            model, clip, weights, survival = merging.merged(landing, model, clip, progress)
        parts = sorted({part for part, _ in landing.pieces} | {record.part for record in before})
        how = dict.fromkeys(parts, "merged")
        found = receipt(landing, seconds, how, survival, predicted=False, weights=weights)
        data = {**found.data, "before": [[each.name, each.part, each.strength] for each in before]}
        lines = [f"{MARKS[True]} {shown(each.name)} ({each.part} {each.strength:g}), on it before" for each in before]
        text = "\n".join([*lines, found.text])
        return io.NodeOutput(model, clip, json.dumps(data, ensure_ascii=False), ui=told(data, text))
