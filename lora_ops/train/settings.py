"""Settings: what a person chooses for a run, by the names they see, and the Plan that it means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


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
