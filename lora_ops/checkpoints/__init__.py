"""Checkpoints: models on disk, as one value; LoRAs merged into them and taken off again, in little memory."""

from .components import STEM, Component, component, shards
from .disk import Checkpoint, Stored, opened
from .merging import DTYPES, contents, merge, metadata
from .unmerging import Bound, Distance, bounds, distance, subtract

__all__ = [
    "DTYPES",
    "STEM",
    "Bound",
    "Checkpoint",
    "Component",
    "Distance",
    "Stored",
    "bounds",
    "component",
    "contents",
    "distance",
    "merge",
    "metadata",
    "opened",
    "shards",
    "subtract",
]
