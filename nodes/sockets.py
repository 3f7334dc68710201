"""What travels on the wires: LORA_MODEL (core's dict of tensors) and LORA_STACK (the packs' list of rows)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..lora_ops.errors import FileError, StackError, shown
from ..lora_ops.files import TensorFile
from ..lora_ops.lora import Lora, from_file
from ..lora_ops.stack import Row, finite


class LoraModel(dict[str, Tensor]):
    """A LORA_MODEL that remembers its Lora: the file's own keys, with `.alpha` where core would read another scale."""

    def __init__(self, file: TensorFile, lora: Lora) -> None:
        super().__init__(file.tensors)
        self.lora = lora
        for module, adapter in lora.modules.items():
            if adapter.alpha is not None:
                self[f"{module}.alpha"] = torch.tensor(adapter.scale * adapter.rank)


def lora_of(wire: Mapping[str, Tensor]) -> Lora:
    """The Lora on a LORA_MODEL wire, ours or another node's (core's Train LoRA). Raises FileError for NaN or Inf."""
    if isinstance(wire, LoraModel):
        return wire.lora
    for name, tensor in wire.items():
        if not torch.isfinite(tensor).all():
            raise FileError(f"tensor '{shown(name)}' holds NaN or Inf.", file="LORA_MODEL", remedy="Train it again.")
    return from_file(TensorFile("LORA_MODEL", wire))


def rows_of(wire: Any) -> tuple[Row, ...]:
    """The rows of a LORA_STACK wire (None: not connected)."""
    rows = []
    for number, item in enumerate(wire or (), 1):
        if not isinstance(item, tuple | list) or len(item) != 3 or not isinstance(item[0], str):
            raise StackError(f"Row {number} of the LORA_STACK is no (name, model strength, CLIP strength).")
        name, strength, clip = item
        rows.append(Row(name, finite(strength, f"The strength of row {number}"), finite(clip, "Its CLIP strength")))
    return tuple(rows)


def require_tellable(rows: tuple[Row, ...]) -> None:
    """Raises StackError for a row that says more than the three values of a LORA_STACK row."""
    for row in rows:
        if not row.schedule.constant:
            what = f"'{shown(row.name)}' has a schedule, which LORA_STACK cannot carry."
            raise StackError(what, remedy="Put the row into the last stack, or disconnect the LORA_STACK output.")


def wire_of(rows: tuple[Row, ...]) -> list[tuple[str, float, float]]:
    """A LORA_STACK of the rows that are on."""
    return [(row.name, row.strengths["model"], row.strengths["clip"]) for row in rows if row.on]
