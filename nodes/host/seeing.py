"""Seeing: texts that a text encoder reads together with control pictures, by the host's own nodes for that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from comfy.text_encoders.qwen_image import QwenImageTEModel
from comfy_extras.nodes_qwen import TextEncodeQwenImageEdit, TextEncodeQwenImageEditPlus

from ...lora_ops.errors import FileError, TrainingError
from ...lora_ops.train.cutting import Control
from .shelf import Unknown

# What the node calls a way -> the host's node, and how many pictures that takes.
WAYS: Mapping[str, tuple[Any, int]] = {
    "edit plus": (TextEncodeQwenImageEditPlus, 3),
    "edit": (TextEncodeQwenImageEdit, 1),
}


def sees(clip: Any) -> bool:
    """Whether a text encoder of the host's is shown the pictures that its model edits."""
    return clip is not None and isinstance(clip.cond_stage_model, QwenImageTEModel)


class Eye(NamedTuple):
    """How control pictures are shown: by a way, and by a VAE with all that its latents depend on (None: unknown)."""

    way: str
    vae: Any
    settings: Sequence[Any] | None


class Sight(NamedTuple):
    """A text with control pictures, or with their mirror images. name is the picture's that they are made into."""

    name: str
    text: str
    controls: tuple[Control, ...]
    mirrored: bool
    eye: Eye

    @property
    def content(self) -> Any:
        """What its conditioning depends on, beside the text encoder."""
        if self.eye.settings is None:
            return Unknown  # which no key can be made of
        shown = [(each.sha256, each.size) for each in self.controls]
        return "seen", self.eye.way, self.eye.settings, self.text, shown, self.mirrored

    def encode(self, clip: Any) -> list[Any]:
        """The CONDITIONING, with the latents of the control pictures in it, as the host's node has them. Raises
        TrainingError for more of them than that takes, FileError for one that cannot be read."""
        node, most = WAYS[self.eye.way]
        if len(self.controls) > most:
            what = f"has {len(self.controls)} control pictures; {self.eye.way} takes {most}."
            raise TrainingError(what, file=self.name, remedy="Take some out.")
        try:
            whole = [each.whole() for each in self.controls]
        except FileError as error:
            error.file = self.name
            raise
        images = [each.flip(2) for each in whole] if self.mirrored else whole
        return node.execute(clip, self.text, self.eye.vae, *images).result[0]
