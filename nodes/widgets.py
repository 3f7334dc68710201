"""Inputs and results that several nodes share, so that they read and behave alike."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .host.api import io

LoraModelType = io.Custom("LORA_MODEL")
LoraStackType = io.Custom("LORA_STACK")
LoraDatasetType = io.Custom("LORA_DATASET")
LossMapType = io.Custom("LOSS_MAP")
STRENGTH = {"min": -100.0, "max": 100.0, "step": 0.01}
STRAIGHT = (
    "For DoRA, OFT and (IA)³ strength is a straight line from the weight as it is (0) to what was trained (1); "
    "ComfyUI's own nodes differ there."
)


def stack() -> io.Input:
    return io.String.Input(
        "stack",
        multiline=True,
        default="",
        placeholder="<lora:style/ink:0.8>",
        tooltip="The LoRAs in order, with their strengths on the model and on CLIP. "
        f"As text: <lora:style/ink:0.8:0.6> lines, or JSON. {STRAIGHT}",
        extra_dict={"widgetType": "LORA_OPS_STACK"},
    )


def min_coverage() -> io.Input:
    return io.Float.Input(
        "min_coverage",
        default=0.9,
        min=0.0,
        max=1.0,
        step=0.01,
        tooltip="Stop with an error if a smaller share of a LoRA's modules fits the connected parts "
        "(0 to 1). 0.9 lets a few stray modules pass; lower it only to use what fits of a LoRA for another variant.",
    )


def mode() -> io.Input:
    return io.Combo.Input(
        "mode",
        options=["auto", "patch", "live"],
        default="auto",
        tooltip="How the update reaches the model. patch: added to the weights when they are loaded, at no cost per "
        "step. live: added to what each module puts out, for a few percent of a step; exact on fp8 and other quantised "
        "models, and a changed strength costs nothing; other packs' merges and saves do not see it. "
        "auto: live where the weights are quantised, else patch.",
    )


def told(data: Mapping[str, Any], text: str) -> dict[str, list[str]]:
    """The ui of a result: the text that the node shows, and its data."""
    return {"text": [text], "lora_ops": [json.dumps(data, ensure_ascii=False)]}
