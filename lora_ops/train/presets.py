"""Presets: what a family's trainers recommend where the user leaves it open, and what of a family this does not train.

To add one: a line in `PRESETS`. Timesteps are in timesteps.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..families import FAMILIES
from .timesteps import Timesteps

AUTO = "auto"


@dataclass(frozen=True)
class Preset:
    """weighting is min_snr or constant; guidance is what a distilled model is told while it trains. cfg and scheduler
    are those its pictures are drawn with."""

    weighting: str = "constant"
    guidance: float | None = None
    cfg: float = 4.0
    scheduler: str = "simple"


_NOISE = Preset("min_snr", cfg=7.0, scheduler="normal")

# Family -> what its trainers recommend: min-SNR 5 for models of noise (Hang et al. 2023); guidance 1 for FLUX.1 dev
# (sd-scripts' flux_train_network documentation).
PRESETS: Mapping[str, Preset] = {
    "sd15": _NOISE,
    "sd2": _NOISE,
    "sdxl": _NOISE,
    "sd3": Preset(),
    "sd35_medium": Preset(),
    "flux": Preset(guidance=1.0, cfg=1.0),
    "chroma": Preset(),
    "flux2": Preset(guidance=1.0, cfg=1.0),
    "flux2_klein": Preset(),
    "wan": Preset(cfg=5.0),
    "qwen_image": Preset(),
    "z_image": Preset(),
    "lumina2": Preset(),
    "cascade_c": Preset(),
    "anima": Preset(),
    "kandinsky5": Preset(cfg=5.0),
}
NAMES = (AUTO, *(family.title for family in FAMILIES if family.name in PRESETS))


@dataclass(frozen=True)
class Chosen:
    """A preset on a model: its family's name and title as well."""

    family: str
    title: str
    preset: Preset
    timesteps: Timesteps
