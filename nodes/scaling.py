"""Nodes that change how strong a LoRA is."""

from __future__ import annotations

from ..lora_ops.errors import shown
from ..lora_ops.families import ROLES
from ..lora_ops.files import TensorFile
from ..lora_ops.lora import from_file
from ..lora_ops.receipt import MARKS
from ..lora_ops.scaling import scaled
from ..lora_ops.select import parse_selectors
from ..lora_ops.stack import finite
from .host import patching
from .host.api import io
from .sockets import LoraModel, lora_of, words_of
from .widgets import STRENGTH, LoraModelType, told


class LoraOpsScale(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoraOpsScale",
            display_name="Scale LoRA (LoRA Ops)",
            category="model/loaders",
            description="Multiplies a LoRA, as a whole and block by block, for any node that takes it afterwards.",
            search_aliases=["lora", "scale lora", "lora block weight", "lbw", "lora strength"],
            inputs=[
                LoraModelType.Input("lora", tooltip="The LoRA; the input itself stays as it is."),
                io.Float.Input(
                    "strength", default=1.0, **STRENGTH, tooltip="Factor on the whole update. 1 is as trained."
                ),
                io.String.Input(
                    "blocks",
                    multiline=True,
                    default="",
                    placeholder="double_blocks.0-9=0.5, role:mlp=0",
                    tooltip="Factors by place, separated by commas or lines: double_blocks.0-9=0.5, *.attn.*=0.8, "
                    "role:mlp=0. Where several choose the same place they multiply. "
                    f"Roles: {', '.join(ROLES)}.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The model that blocks are of. Without it: the published model the LoRA looks made for.",
                ),
            ],
            outputs=[LoraModelType.Output(display_name="lora", tooltip="The LoRA with all factors in its tensors.")],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(cls, lora, strength, blocks, model=None):
        found, selectors = lora_of(lora), parse_selectors(blocks)
        file = TensorFile(found.name, dict(lora), found.metadata)
        targets = None if model is None else patching.targets(model, None)
        result = scaled(file, finite(strength, "strength"), selectors, targets)
        chosen = {str(each): count for each, count in zip(selectors, result.chosen, strict=True)}
        data = {"lora": found.name, "strength": strength, "blocks": chosen}
        lines = [f"{MARKS[all(result.chosen)]} {shown(found.name)} × {strength:g}"]
        lines += [f"   {shown(each)}: {count} of {len(found.modules)} modules" for each, count in chosen.items()]
        if result.file is not file:
            lora = LoraModel(result.file, from_file(result.file), words_of(lora))
        return io.NodeOutput(lora, ui=told(data, "\n".join(lines)))
