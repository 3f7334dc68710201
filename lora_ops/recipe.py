"""Recipe: which LoRAs a checkpoint holds, in its metadata, so that anybody can tell and take them off again."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import StackError, shown
from .landing import Landing
from .select import parse_selectors
from .stack import PARTS, finite

KEY = "lora_ops.recipe"  # in a file's metadata
VERSION = 1


@dataclass(frozen=True)
class Ingredient:
    """A LoRA that was merged: its name, the SHA-256 of its tensors ("": unknown), its strengths, and its blocks."""

    lora: str
    sha256: str
    strengths: Mapping[str, float]
    blocks: str = ""


@dataclass(frozen=True)
class Recipe:
    """The LoRAs in a checkpoint, in the order in which they were merged."""

    loras: tuple[Ingredient, ...] = ()

    @property
    def text(self) -> str:
        rows = [
            {"lora": each.lora, "sha256": each.sha256, "strengths": dict(each.strengths), "blocks": each.blocks}
            for each in self.loras
        ]
        return json.dumps({"version": VERSION, "loras": rows}, ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """The inverse of text; empty text is an empty recipe. Raises StackError for what would have to be guessed."""
        if not text:
            return cls()
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise StackError("The recipe is no valid JSON.") from error
        if not isinstance(value, dict) or not isinstance(value.get("loras"), list):
            raise StackError('The recipe should be {"version": 1, "loras": [...]}.')
        if value.get("version") != VERSION or isinstance(value["version"], bool):
            remedy = "Use the version of LoRA Ops that wrote it."
            raise StackError(f"The recipe is of version {shown(value.get('version'))}.", remedy=remedy)
        return cls(tuple(_ingredient(number, row) for number, row in enumerate(value["loras"], 1)))

    @classmethod
    def of_metadata(cls, metadata: Mapping[str, str], file: str) -> Recipe:
        """The recipe in a file's metadata, an empty one where there is none. Raises StackError like parse."""
        try:
            return cls.parse(metadata.get(KEY, ""))
        except StackError as error:
            error.file = file
            raise

    def joined(self, other: Recipe) -> Recipe:
        """This one, and then the other."""
        return Recipe((*self.loras, *other.loras))


def _ingredient(number: int, row: object) -> Ingredient:
    fields = {"lora": str, "sha256": str, "strengths": dict, "blocks": str}
    if not isinstance(row, dict) or row.keys() != fields.keys():
        raise StackError(f"LoRA {number} of the recipe should have the fields {', '.join(fields)}.")
    for name, kind in fields.items():
        if not isinstance(row[name], kind):
            raise StackError(f"LoRA {number} of the recipe: {name} is {shown(row[name])}.")
    if not re.fullmatch(r"([0-9a-f]{64})?", row["sha256"]):
        raise StackError(f"LoRA {number} of the recipe: sha256 should be 64 hex digits.")
    if unknown := row["strengths"].keys() - set(PARTS):
        raise StackError(f"LoRA {number} of the recipe has a strength for {shown(', '.join(sorted(unknown)))}.")
    parse_selectors(row["blocks"])
    strengths = {part: finite(each, f"A strength of LoRA {number}") for part, each in row["strengths"].items()}
    return Ingredient(row["lora"], row["sha256"], strengths, row["blocks"])


def of(landing: Landing) -> Recipe:
    """What a landing puts into a model: each LoRA with its strengths on the parts where it lands. At strength 0 it
    changes nothing and is no ingredient."""
    found = []
    for row in landing.rows:
        strengths = {
            part: row.entry.strengths[part]
            for part in PARTS
            if part in landing.parts and row.entry.strengths[part] and row.matched(part)
        }
        if strengths:
            blocks = ", ".join(map(str, row.entry.blocks))
            found.append(Ingredient(row.entry.lora.name, row.entry.sha256, strengths, blocks))
    return Recipe(tuple(found))
