"""Settings: what a person chooses for a run, by the names they see, and the Plan that it means."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import TrainingError, shown
from ..lora import TargetMap
from ..select import LIMIT, Pattern, decimal
from .encoders import text_aims
from .objectives import Objective
from .optimizers import Descent
from .places import Aim
from .plan import Plan
from .presets import Chosen
from .timesteps import Timesteps

WEIGHTINGS = {"constant": "constant", "min-snr": "min_snr", "debiased": "debiased"}
DRAWS = {"uniform": "uniform", "logit-normal": "logit_normal"}
PRECISIONS = {"auto": None, "bf16": torch.bfloat16}

# Roles that learn, by the name of a choice; () is attention's projections, as an Aim without a pattern has them.
TARGETS: Mapping[str, tuple[str, ...]] = {
    "attention": (),
    "attention and mlp": ("attn", "cross-attn", "mlp"),
    "all": ("attn", "cross-attn", "mlp", "embed", "conv", "norm"),
}


def _choice(key: str, **options: Any) -> Any:
    return field(default_factory=lambda: {"key": key, **options})


@dataclass(frozen=True)
class Settings:
    """Everything has a default. A Mapping is a choice, its key and the options of that key."""

    preset: str = "auto"
    steps: int = 1500
    batch: int = 1
    accumulation: int = 1
    learning_rate: float = 1e-4
    rank: int = 16
    alpha: float = 16.0
    targets: Mapping[str, Any] = _choice("attention")
    adapter: Mapping[str, Any] = _choice("lora", initial="gaussian")
    optimizer: Mapping[str, Any] = _choice("adamw", weight_decay=0.01, lora_plus=1.0)
    schedule: Mapping[str, Any] = _choice("constant", warmup=0)
    objective: Mapping[str, Any] = _choice("auto")
    loss: Mapping[str, Any] = _choice("mse")
    timesteps: Mapping[str, Any] = _choice("auto")
    text_encoder: Mapping[str, Any] = _choice("off")
    sample_prompts: str = ""
    sample_every: int = 250
    save_every: int = 250
    resume: Mapping[str, Any] = _choice("auto")
    seed: int = 0
    sample_width: int = 0
    sample_height: int = 0
    sample_steps: int = 20
    sample_cfg: float = 0.0
    sample_sampler: str = "euler"
    sample_scheduler: str = "auto"
    sample_seed: int = 0
    precision: str = "auto"
    checkpointing: bool = False
    ema: float = 0.0
    dropout: float = 0.0
    clip_norm: float = 1.0
    noise_offset: float = 0.0
    guidance: float = 0.0
    masked: bool = True
    validate_every: int = 50
    dry_run: bool = False
    preservation: Mapping[str, Any] = _choice("off")
    offload: bool = False
    compile: bool = False

    @property
    def trains_text(self) -> bool:
        return self.text_encoder["key"] != "off"

    def plan(self, chosen: Chosen, targets: TargetMap) -> Plan:
        """What it means on a model for which auto is this. Raises TrainingError or StackError for what cannot be."""
        adapter = self.adapter["key"]
        alpha: float | None = self.alpha
        if adapter == "oft":
            if self.alpha != self.rank:
                what = f"alpha is {self.alpha:g}; OFT has none."
                raise TrainingError(what, remedy=f"Set alpha to the rank, {self.rank}.")
            alpha = None
        if self.compile and self.dropout:
            what = "compile is on, and dropout draws its masks anew in each step, which cannot be compiled."
            raise TrainingError(what, remedy="Turn compile off or set dropout to 0.")
        return Plan(
            steps=self.steps,
            aims=aims(self.targets, self.rank, alpha, targets),
            text_aims=text_aims(self.text_encoder["key"], self.rank, alpha, targets),
            algebra="lora" if adapter == "rs-lora" else adapter,
            initial=self.adapter.get("initial", "gaussian"),
            rank_stabilised=adapter == "rs-lora",
            dropout=self.dropout,
            batch=self.batch,
            accumulate=self.accumulation,
            seed=self.seed,
            objective=self._objective(chosen),
            timesteps=self._timesteps(chosen),
            descent=self._descent(),
            clip=self.clip_norm,
            ema=self.ema,
            autocast=PRECISIONS[self.precision],
            save_every=self.save_every,
            validate_every=self.validate_every,
        )

    def _objective(self, chosen: Chosen) -> Objective:
        key = self.objective["key"]
        return Objective(
            weighting=chosen.weighting if key == "auto" else WEIGHTINGS[key],
            gamma=self.objective.get("gamma", Objective.gamma),
            loss=self.loss["key"],
            huber_c=self.loss.get("huber_c", Objective.huber_c),
            huber_schedule=self.loss.get("huber_schedule", Objective.huber_schedule),
            noise_offset=self.noise_offset,
        )

    def _timesteps(self, chosen: Chosen) -> Timesteps:
        key = self.timesteps["key"]
        if key == "auto":
            return chosen.timesteps
        options = {name: self.timesteps[name] for name in ("mean", "deviation") if name in self.timesteps}
        return Timesteps(DRAWS[key], shift=self.timesteps["shift"] or None, **options)

    def _descent(self) -> Descent:
        chosen, schedule = self.optimizer, self.schedule
        options = {name: chosen[name] for name in ("d_coef",) if name in chosen}
        words = {"cycles": "num_cycles", "power": "power"}
        return Descent(
            optimizer=chosen["key"],
            rate=self.learning_rate,
            text_rate=self.text_encoder["learning_rate"] if self.trains_text else None,
            weight_decay=chosen["weight_decay"],
            up_factor=chosen.get("lora_plus", 1.0),
            schedule=schedule["key"],
            warmup=schedule["warmup"],
            options=options,
            schedule_options={word: schedule[name] for name, word in words.items() if name in schedule},
        )


def aims(chosen: Mapping[str, Any], rank: int, alpha: float | None, targets: TargetMap) -> tuple[Aim, ...]:
    """Where it trains and how: a choice of TARGETS, or selectors with ranks of their own, to which alpha has the same
    ratio. Raises StackError for what names no place, TrainingError for what is no rank."""
    if chosen["key"] in TARGETS:
        there = {target.role for target in targets.targets if target.part == "model" and len(target.shape) > 1}
        roles = [role for role in TARGETS[chosen["key"]] if role in there]
        return tuple(Aim(Pattern.parse(f"role:{role}"), rank, alpha) for role in roles) or (Aim(None, rank, alpha),)
    items = [item for item in chosen["selectors"].replace("\n", ",").split(",") if item.strip()]
    if not 0 < len(items) <= LIMIT:
        what = f"{len(items)} selectors choose what is trained; it should be 1 to {LIMIT}."
        raise TrainingError(what, remedy="Write one like role:attn=16.")
    return tuple(_aim(item, rank, alpha) for item in items)


def _aim(item: str, rank: int, alpha: float | None) -> Aim:
    pattern, equals, written = item.rpartition("=")
    own = decimal(written) if equals else rank
    if not math.isfinite(own) or own < 0 or own != int(own):
        what = f"The selector '{shown(item.strip())}' has no rank: a whole number, 0 to leave the place out."
        raise TrainingError(what, remedy="Write PATTERN=RANK, like role:mlp=8, or the pattern alone.")
    scaled = alpha if alpha is None or not own else alpha / rank * own
    return Aim(Pattern.parse(pattern if equals else item), int(own), scaled)
