"""Nodes that train."""

from __future__ import annotations

from .host.api import io
from .training_inputs import inputs
from .widgets import LoraModelType, LossMapType


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
        raise NotImplementedError


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
        raise NotImplementedError
