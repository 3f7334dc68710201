"""What travels on the wires: LORA_MODEL (core's dict of tensors) and LORA_STACK (the packs' list of rows)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..lora_ops.algebra import exact
from ..lora_ops.errors import FileError, StackError, shown
from ..lora_ops.files import TensorFile
from ..lora_ops.lora import Lora, from_file, split
from ..lora_ops.stack import Row, finite
from ..lora_ops.words import TriggerWords, trigger_words


class LoraModel(dict[str, Tensor]):
    """A LORA_MODEL that remembers its Lora: the file's own keys, with `.alpha` where core would read another scale.

    words are its trigger words; without them, those of its metadata.
    """

    def __init__(self, file: TensorFile, lora: Lora, words: TriggerWords | None = None) -> None:
        super().__init__(file.tensors)
        self.words = words or trigger_words(lora.metadata)
        alphas = {module: key for key in file.tensors for module, factor in [split(key)] if factor == "alpha"}
        for module, adapter in lora.modules.items():
            if adapter.alpha is not None:
                self.pop(alphas.get(module, ""), None)
                stated = adapter.alpha / adapter.rank == adapter.scale
                self[f"{module}.alpha"] = exact(adapter.alpha if stated else adapter.scale * adapter.rank)
        self._lora, self._made_of = lora, dict(self)

    @property
    def lora(self) -> Lora | None:
        """The Lora, None once a node has put in, taken out or replaced a tensor (of a copy, perhaps)."""
        same = self.keys() == self._made_of.keys() and all(self[key] is tensor for key, tensor in self._made_of.items())
        return self._lora if same else None


def lora_of(wire: Any) -> Lora:
    """The Lora on a LORA_MODEL wire, ours or another node's (core's Train LoRA).

    Raises FileError for what is no dict of dense tensors by name, and for NaN or Inf.
    """
    if isinstance(wire, LoraModel) and wire.lora is not None:
        return wire.lora
    remedy = "Connect a node that puts out a LoRA."
    if not isinstance(wire, Mapping):
        raise FileError(f"is a {type(wire).__name__}, not a dict of tensors.", file="LORA_MODEL", remedy=remedy)
    for name, tensor in wire.items():
        if not isinstance(name, str):
            raise FileError(f"has the key {shown(name)}, which is no name.", file="LORA_MODEL", remedy=remedy)
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            kind = tensor.layout if isinstance(tensor, Tensor) else type(tensor).__name__
            raise FileError(f"'{shown(name)}' is a {kind}, not a dense tensor.", file="LORA_MODEL", remedy=remedy)
        if not torch.isfinite(tensor.float()).all():
            raise FileError(f"tensor '{shown(name)}' holds NaN or Inf.", file="LORA_MODEL", remedy="Train it again.")
    metadata = wire._lora.metadata if isinstance(wire, LoraModel) else {}
    return from_file(TensorFile("LORA_MODEL", dict(wire), metadata))


def words_of(wire: Any) -> TriggerWords:
    """The trigger words of the LoRA on a LORA_MODEL wire; other nodes put none there."""
    return wire.words if isinstance(wire, LoraModel) else TriggerWords()


def rows_of(wire: Any) -> tuple[Row, ...]:
    """The rows of a LORA_STACK wire (None: not connected). Raises StackError for what is no list of such rows."""
    if wire is not None and not isinstance(wire, list | tuple):
        raise StackError(f"The LORA_STACK is a {type(wire).__name__}, not a list of rows.")
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
        more = "blocks" if row.blocks else "" if row.schedule.constant else "a schedule"
        if more:
            what = f"'{shown(row.name)}' has {more}, which LORA_STACK cannot carry."
            raise StackError(what, remedy="Put the row into the last stack, or disconnect the LORA_STACK output.")


def wire_of(rows: Iterable[Row]) -> list[tuple[str, float, float]]:
    """A LORA_STACK of the rows that are on."""
    return [(row.name, row.strengths["model"], row.strengths["clip"]) for row in rows if row.on]
