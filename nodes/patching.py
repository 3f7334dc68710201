"""Nodes that put one LoRA on a model."""

from __future__ import annotations

import json
import time

from ..lora_ops.landing import land, require_coverage
from ..lora_ops.receipt import receipt
from ..lora_ops.stack import Entry, finite
from .host import patching
from .host.api import io
from .host.graph import require_inputs
from .sockets import lora_of
from .widgets import STRAIGHT, STRENGTH, LoraModelType, min_coverage, mode, told


class LoraOpsApply(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoraOpsApply",
            display_name="Apply LoRA (LoRA Ops)",
            category="model/loaders",
            description="Puts a LoRA on a model and says what landed, or stops and says why not.",
            search_aliases=["lora", "apply lora", "lora model"],
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model to change; the input itself stays as it is."),
                io.Clip.Input("clip", optional=True, tooltip="The text encoder, for LoRAs trained on it too."),
                LoraModelType.Input("lora", tooltip="The LoRA, from Load LoRA or a node that makes one."),
                io.Float.Input(
                    "strength_model",
                    default=1.0,
                    **STRENGTH,
                    tooltip="Factor on the model's update. 1 is as trained, 0 is none, below 0 is the opposite. "
                    f"{STRAIGHT}",
                ),
                io.Float.Input(
                    "strength_clip",
                    default=1.0,
                    **STRENGTH,
                    tooltip="Factor on the text encoder's update. Without CLIP connected it has nothing to act on.",
                ),
                min_coverage(),
                mode(),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The model with the LoRA."),
                io.Clip.Output(display_name="CLIP", tooltip="The text encoder with the LoRA."),
                io.String.Output(display_name="receipt", tooltip="What landed and what did not, as JSON."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(cls, model, lora, strength_model, strength_clip, min_coverage, mode, clip=None):
        strengths = {
            "model": finite(strength_model, "strength_model"),
            "clip": finite(strength_clip, "strength_clip"),
        }
        require_inputs(cls.hidden, MODEL=model, CLIP=clip)
        start = time.perf_counter()
        landing = land([Entry(lora_of(lora), strengths)], patching.targets(model, clip))
        require_coverage(landing, finite(min_coverage, "min_coverage"))
        seconds = time.perf_counter() - start
        model, clip, how, survival = patching.applied(landing, mode, model, clip)
        found = receipt(landing, seconds, how, survival)
        return io.NodeOutput(model, clip, json.dumps(found.data, ensure_ascii=False), ui=told(found.data, found.text))
