"""Nodes that show what is on a model, and take our LoRAs off again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..lora_ops.errors import StackError, shown
from .host import inspecting, ledger, patching
from .host.api import io
from .host.graph import require_inputs
from .host.names import portable
from .widgets import told


class LoraOpsPatches(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoraOpsPatches",
            display_name="Show Patches (LoRA Ops)",
            category="model/loaders",
            description="Lists everything that is patched or injected on a model, in order of application.",
            search_aliases=["lora", "patches", "inspect model", "loaded loras"],
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model to look at. Nothing is changed."),
                io.Clip.Input("clip", optional=True, tooltip="A text encoder to look at too."),
            ],
            outputs=[io.String.Output(display_name="report", tooltip="The list, as JSON.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, clip=None):
        patchers = {"model": model} if clip is None else {"model": model, "clip": clip.patcher}
        data = {
            "version": 1,
            **{
                part: {"patches": inspecting.patches(patcher), "others": inspecting.others(patcher)}
                for part, patcher in patchers.items()
            },
        }
        text = "\n".join(line for part in patchers for line in _lines(part, data[part]))
        return io.NodeOutput(json.dumps(data, ensure_ascii=False), ui=told(data, text))


def _lines(part: str, found: Mapping[str, Any]) -> Iterator[str]:
    yield f"{part}: {len(found['patches']) or 'no'} patches"
    for each in found["patches"]:
        strength = f"strength {each['strength']:g}"
        if each.get("strength_model", 1.0) != 1:
            strength += f", all before × {each['strength_model']:g}"
        more = f", blocks {shown(each['blocks'])}" if each.get("blocks") else ""
        more += ", scheduled" if each.get("schedule") else ""
        name = shown(each["source"]) if each["ours"] else f"({shown(each['source'])})"
        yield f" {each['order']}. {name}: {strength}{more}, {each['how']}"
        yield f"      {each['weights']} weights, {each['bytes'] / 1e6:.1f} MB"
    for kind, names in found["others"].items():
        yield f" {kind}: {', '.join(map(shown, names))}"


class LoraOpsUnload(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoraOpsUnload",
            display_name="Unload LoRA (LoRA Ops)",
            category="model/loaders",
            description="Takes LoRAs that LoRA Ops has put on a model off again, exactly. Others' patches stay.",
            search_aliases=["lora", "unload lora", "remove lora", "unpatch"],
            inputs=[
                io.Model.Input("model", tooltip="The model to take them off; the input itself stays as it is."),
                io.Clip.Input("clip", optional=True, tooltip="The text encoder to take them off too."),
                io.String.Input(
                    "which",
                    default="all",
                    multiline=True,
                    tooltip="all: every LoRA that LoRA Ops nodes have put on. Or names, one a line, as Show Patches "
                    "lists them; a LoRA that is on twice goes twice. Merged ones are part of the weights and stay.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The model without them."),
                io.Clip.Output(display_name="CLIP", tooltip="The text encoder without them."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(cls, model, which, clip=None):
        require_inputs(cls.hidden, MODEL=model, CLIP=clip)
        there = [*ledger.records(model), *(() if clip is None else ledger.records(clip.patcher))]
        wanted = chosen(which, there)
        rows = {each.row for each in wanted}
        if any(each.row in rows for each in ledger.records(model)):
            model = model.clone()
            patching.take_off(model, rows)
        if clip is not None and any(each.row in rows for each in ledger.records(clip.patcher)):
            clip = clip.clone()
            patching.take_off(clip.patcher, rows)
        data = {"version": 1, "unloaded": [[each.part, each.name, each.strength] for each in wanted]}
        lines = [f"{each.part}: {shown(each.name)} (strength {each.strength:g}) taken off" for each in wanted]
        return io.NodeOutput(model, clip, ui=told(data, "\n".join(lines) or "nothing of LoRA Ops to take off"))


def chosen(which: str, there: Sequence[ledger.Record]) -> list[ledger.Record]:
    """The records that a text of names means, or all. Raises StackError for a name that is not there, or merged."""
    loose = [each for each in there if each.how != "merged"]
    names = {portable(line.strip()) for line in which.splitlines() if line.strip()}
    if names == {"all"}:
        return loose
    if not names:
        raise StackError("No LoRA is named.", remedy="Write all, or names as Show Patches lists them.")
    known = {portable(each.name) for each in loose}
    merged = {portable(each.name) for each in there if each.how == "merged"}
    if missing := sorted(names - known):
        what = "is merged into the weights" if missing[0] in merged else "is not on this model"
        remedy = f"There are: {', '.join(map(shown, sorted(known)))}." if known else "No LoRA of LoRA Ops is on it."
        raise StackError(f"'{shown(missing[0])}' {what}.", remedy=remedy, missing=missing)
    return [each for each in loose if portable(each.name) in names]
