"""Checkpoints: models on disk, as one value; LoRAs merged into them and taken off again, in little memory."""

from .disk import Checkpoint, Stored, opened
from .merging import DTYPES, contents, merge, metadata
from .unmerging import Bound, Distance, bounds, distance, subtract

__all__ = [
    "DTYPES",
    "Bound",
    "Checkpoint",
    "Distance",
    "Stored",
    "bounds",
    "contents",
    "distance",
    "merge",
    "metadata",
    "opened",
    "subtract",
]
