"""Presets: what a family's trainers recommend where the user leaves it open, and what of a family this does not train.

To add one: a line in `PRESETS`. Timesteps are in timesteps.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import TrainingError, shown
from ..families import FAMILIES, UNKNOWN, Family
from .objectives import Sampling, coefficients
from .timesteps import Timesteps, recommended

AUTO = "auto"


@dataclass(frozen=True)
class Preset:
    """weighting is constant, or min_snr where noise is added (a flow model of the family gets constant); guidance is
    what a distilled model is told while it trains. cfg and scheduler are those its pictures are drawn with."""

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
    """What auto means for a model of a family. guidance is None where the model is told none."""

    title: str
    weighting: str
    timesteps: Timesteps
    guidance: float | None
    cfg: float
    scheduler: str


def choose(asked: str, family: Family, sampling: Sampling, *, guided: bool) -> Chosen:
    """The preset that was asked for, on a model of a family with its own sampling; guided: it is told a guidance.

    Raises TrainingError for another family's preset, and for a family that is known and not trained.
    """
    if family is not UNKNOWN and family.name not in PRESETS:
        what = f"{family.title} is not trained by this version."
        raise TrainingError(what, remedy=f"It trains {', '.join(NAMES[1:])}.", family=family.name)
    if asked not in NAMES:
        raise TrainingError(f"'{shown(asked)}' is no preset.", remedy=f"Choose one of {', '.join(NAMES)}.")
    named = family if asked == AUTO else next(each for each in FAMILIES if each.title == asked)
    if family not in (UNKNOWN, named):
        what = f"The preset is for {named.title}; the model is {family.title}."
        raise TrainingError(what, remedy=f"Choose the preset auto or {family.title}.", found=family.name)
    flows = _flows(sampling)
    preset = PRESETS.get(named.name, Preset() if flows else _NOISE)
    return Chosen(
        named.title,
        "constant" if flows else preset.weighting,
        recommended(named.name, sampling),
        preset.guidance if guided else None,
        preset.cfg,
        preset.scheduler,
    )


def _flows(sampling: Sampling) -> bool:
    return coefficients(sampling, sampling.sigmas[len(sampling.sigmas) // 2][None]).interpolates
