"""Encoders: which text encoders train, what of them, and why others do not."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import TrainingError, shown
from ..families import FAMILIES
from ..lora import TargetMap
from ..select import Pattern
from .places import Aim

# Families whose text encoders train: CLIP, and T5 on request.
TRAINED = ("sd15", "sd2", "sdxl", "sd3", "sd35_medium", "flux", "chroma", "cascade_c")

# Families whose prompts a language model reads: their trainers (musubi-tuner, ai-toolkit) leave it as it is.
LANGUAGE: Mapping[str, str] = {
    "wan": "UMT5-XXL",
    "flux2": "Mistral",
    "flux2_klein": "Qwen3",
    "qwen_image": "Qwen2.5-VL",
    "z_image": "Qwen3",
    "lumina2": "Gemma 2",
    "kandinsky5": "Qwen2.5-VL",
}
T5 = Pattern.parse("*.SelfAttention")
_ALONE = "Train the model alone: set text_encoder to off."


def require_known(family: str) -> None:
    """Raises TrainingError for a text encoder that does not train, by its family's name."""
    if family in TRAINED:
        return
    title = next((each.title for each in FAMILIES if each.name == family), shown(family))
    if family in LANGUAGE:
        what = f"The text encoder of {title} is a language model ({LANGUAGE[family]}), which stays as it is."
    else:
        what = f"The text encoder of {title} is none that this version trains."
    raise TrainingError(what, remedy=_ALONE, family=family)


def text_aims(choice: str, rank: int, alpha: float | None, targets: TargetMap) -> tuple[Aim, ...]:
    """What trains of the text encoder: nothing (off), its attention (on), that of T5 too (with t5). Raises
    TrainingError where it has no such part."""
    if choice == "off":
        return ()
    there = [target for target in targets.targets if target.part == "clip"]
    of_t5 = sum(T5.matches(target.names, target.role) for target in there)
    if choice == "with t5":
        if not of_t5:
            raise TrainingError("The text encoder has no T5.", remedy="Set text_encoder to on, or load it with its T5.")
        return (Aim(None, rank, alpha),)
    if not of_t5:
        return (Aim(None, rank, alpha),)
    if not any("text_model." in target.key for target in there):
        raise TrainingError("The text encoder is T5 alone.", remedy="Set text_encoder to with t5, or to off.")
    return Aim(None, rank, alpha), Aim(T5, 0)
