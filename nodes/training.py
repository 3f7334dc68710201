"""Nodes that train."""

from __future__ import annotations

import json

from ..lora_ops.train.keeping import Folder
from ..lora_ops.train.outcomes import rehearsed, trained
from ..lora_ops.train.plotting import Curves, plot
from ..lora_ops.train.settings import Settings
from .host.api import io
from .host.course import Course, Wires
from .host.destinations import destination
from .host.graph import nothing, upstream
from .host.previews import tensor_of
from .host.runs import workflow_of
from .host.sitting import Sitting
from .sockets import LoraModel
from .training_inputs import inputs
from .widgets import LoraModelType, LossMapType, told


class LoraOpsTrain(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoraOpsTrain",
            display_name="Train LoRA (LoRA Ops)",
            category="model/training",
            description="Trains a LoRA on the model in the graph, draws samples with it while it learns, and goes on "
            "where it stopped.",
            search_aliases=["train lora", "training", "finetune", "fine-tune", "dreambooth", "trainer"],
            is_input_list=True,
            inputs=inputs(),
            outputs=[
                LoraModelType.Output(display_name="lora", tooltip="What was learned, for Apply LoRA and Save LoRA."),
                io.Model.Output(display_name="MODEL", tooltip="The model with the LoRA on it, at strength 1."),
                LossMapType.Output(display_name="loss_map", tooltip="The losses, for Plot Training Loss."),
                io.Image.Output(display_name="samples", tooltip="The last samples that were drawn."),
                io.String.Output(display_name="report", tooltip="What was done and where it is, as JSON."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.dynprompt],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, **inputs):
        hidden, given = cls.hidden, {name: _value(name, each) for name, each in inputs.items()}
        settings = Settings(**{name: each for name, each in given.items() if name in Settings.__dataclass_fields__})
        wires = Wires(
            given["model"],
            given["dataset"],
            given.get("clip"),
            given.get("vae"),
            inputs.get("sample_positive", ()),
            inputs.get("sample_negative", ()),
        )
        to = destination("output", "", f"lora_ops/{given['name']}", hidden.prompt)
        course = Course(settings, wires)
        if settings.dry_run:
            data = course.rehearsed()
            text = rehearsed(data, settings.steps)
            return io.NodeOutput(*(nothing() for _ in range(4)), json.dumps(data), ui=told(data, text))
        recipe = {"version": 1, "node": hidden.unique_id, "prompt": upstream(hidden.prompt, hidden.unique_id)}
        sitting = Sitting(course, Folder(to.path("")), hidden.unique_id, recipe)
        found = sitting.outcome(workflow_of(hidden.extra_pnginfo))
        samples = nothing("No samples were drawn: set sample_every.") if found.samples is None else found.samples
        return io.NodeOutput(
            LoraModel(found.file, found.lora),
            found.model,
            found.loss_map,
            samples,
            json.dumps(found.data, ensure_ascii=False),
            ui=told(found.data, trained(found.data)),
        )


def _value(name, given):
    """One input of a node that takes lists: its value; of a choice its key, under the input's own name, and options."""
    if not isinstance(given, dict):
        return given[0]
    options = {each: values[0] for each, values in given.items()}
    return {"key": options.pop(name), **options}


class LoraOpsLossPlot(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoraOpsLossPlot",
            display_name="Plot Training Loss (LoRA Ops)",
            category="model/training",
            description="Draws a run's losses: raw, smoothed, of held-out pictures, and where it was saved.",
            search_aliases=["loss graph", "loss curve", "plot loss", "training chart"],
            inputs=[
                LossMapType.Input("loss_map", tooltip="The losses, from Train LoRA (core's too)."),
                io.Int.Input("width", default=960, min=200, max=8192, tooltip="Of the picture, in pixels."),
                io.Int.Input("height", default=540, min=150, max=8192, tooltip="Of the picture, in pixels."),
                io.Boolean.Input(
                    "log_scale",
                    default=False,
                    tooltip="Draws losses by their logarithm: small changes late in a run show.",
                ),
            ],
            outputs=[io.Image.Output(display_name="plot", tooltip="The picture.")],
        )

    @classmethod
    def execute(cls, loss_map, width, height, log_scale):
        return io.NodeOutput(tensor_of([plot(Curves.of(loss_map), width, height, log_scale=log_scale)]))
