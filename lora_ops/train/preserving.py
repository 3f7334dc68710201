"""Preserving: what of a data set should stay what the model makes of it without the LoRA."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import TrainingError, shown
from .dataset import Dataset, Picture, controls_in

# Texts -> the CONDITIONING of each.
Encode = Callable[[Sequence[str]], Mapping[str, Any]]


def preserved(dataset: Dataset, choice: Mapping[str, Any], encode: Encode) -> Dataset:
    """The data set with what should stay told, by Settings' choice.

    regularisation pictures: what the model makes of them is learned, instead of them. class word: beside each picture
    the same one with a class word for the trigger word in its captions; what it makes of that should stay (differential
    output preservation, as ai-toolkit calls it). Raises TrainingError where there is nothing that could be preserved.
    """
    if choice["key"] == "off":
        return dataset
    if choice["key"] == "regularisation pictures":
        if not any(each.regularisation for each in dataset.pictures):
            what = "Regularisation pictures are to be preserved, and the data set has none."
            raise TrainingError(what, remedy="Choose a regularisation folder in Training Dataset, or a class word.")
        return replace(dataset, pictures=tuple(replace(each, of_base=each.regularisation) for each in dataset.pictures))
    trigger = choice["trigger_word"].strip() or (dataset.report.get("captions") or {}).get("trigger", "")
    if not trigger:
        what = "A class word stands for the trigger word, and there is none."
        raise TrainingError(what, remedy="Write trigger_word, here or in Training Dataset.")
    texts = {each: _texts(each, trigger, choice["class_word"]) for each in dataset.pictures if not each.regularisation}
    conditions = encode([text for there in texts.values() for text in there])

    def beside(picture: Picture) -> Picture:
        if picture not in texts:
            return picture
        captions = texts[picture]
        pairs = zip(picture.conditions, (conditions[text] for text in captions), strict=True)
        made = tuple(_with_the_rest_of(before, condition) for before, condition in pairs)
        more = {"masks": (), "weight": picture.weight * choice["weight"], "of_base": True}
        return replace(picture, beside=replace(picture, captions=captions, conditions=made, **more))

    return replace(dataset, pictures=tuple(map(beside, dataset.pictures)))


def classed(caption: str, trigger: str, word: str) -> str:
    """A caption with a class word for each trigger word, or without it and its comma where there is none. Raises
    TrainingError where that is the same caption."""
    there = rf"(?<!\w){re.escape(trigger)}(?!\w)"
    found = re.sub(there, lambda _: word, caption, flags=re.IGNORECASE)
    if not word:
        found = ", ".join(filter(None, (" ".join(tag.split()) for tag in found.split(","))))
    if not re.search(there, caption, re.IGNORECASE) or word.casefold() == trigger.casefold():
        what = f"has the caption '{shown(caption)}', in which no '{shown(word)}' can stand for '{shown(trigger)}'."
        raise TrainingError(what, remedy="Use the word that the captions have for what is learned, and another class.")
    return found


def _texts(picture: Picture, trigger: str, word: str) -> tuple[str, ...]:
    try:
        if not picture.captions:
            raise TrainingError("has no caption, of which a class word could make another.", remedy="Give captions.")
        if any(map(controls_in, picture.conditions)):
            what = "shows the text encoder its control picture, which a caption with a class word would not."
            raise TrainingError(what, remedy="Preserve by regularisation pictures, or nothing.")
        return tuple(classed(caption, trigger, word.strip()) for caption in picture.captions)
    except TrainingError as error:
        error.file = picture.name
        raise


def _with_the_rest_of(before: Any, condition: Any) -> Any:
    """A CONDITIONING with what another says beside its text."""
    return [[cross, {**old, **options}] for (_, old), (cross, options) in zip(before, condition, strict=True)]
