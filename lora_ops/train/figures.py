"""Figures: what a trained file says of its training, in the words of sd-scripts and ModelSpec."""

from __future__ import annotations

import json
from collections import Counter
from datetime import datetime, timezone

from .dataset import Dataset
from .plan import Plan

UNTOLD = "None"  # sd-scripts' word


def figures(name: str, plan: Plan, dataset: Dataset, step: int, began: float, ended: float) -> dict[str, str]:
    """Of a LoRA after a step of a run; times are seconds since 1970."""
    pictures = [each for each in dataset.pictures if not each.regularisation]
    images = sum(each.repeats for each in pictures)
    behind = sum(each.repeats for each in dataset.pictures if each.regularisation)
    seen, descent, objective = plan.batch * plan.accumulate, plan.descent, plan.objective
    options = {"weight_decay": descent.weight_decay, **descent.options}
    found = {
        "ss_output_name": name,
        "ss_training_started_at": str(began),
        "ss_training_finished_at": str(ended),
        "ss_steps": str(step),
        "ss_max_train_steps": str(plan.steps),
        "ss_num_train_images": str(images),
        "ss_num_reg_images": str(behind),
        "ss_num_epochs": str(-(-step * seen // max(1, images + behind))),
        "ss_batch_size_per_device": str(plan.batch),
        "ss_total_batch_size": str(seen),
        "ss_gradient_accumulation_steps": str(plan.accumulate),
        "ss_learning_rate": str(descent.rate),
        "ss_unet_lr": str(descent.rate),
        "ss_text_encoder_lr": UNTOLD,
        "ss_optimizer": f"{descent.optimizer}({','.join(f'{key}={value}' for key, value in options.items())})",
        "ss_lr_scheduler": descent.schedule,
        "ss_lr_warmup_steps": str(descent.warmup),
        "ss_max_grad_norm": str(plan.clip),
        "ss_seed": str(plan.seed),
        "ss_loss_type": objective.loss,
        "ss_noise_offset": str(objective.noise_offset or UNTOLD),
        "ss_min_snr_gamma": str(objective.gamma) if objective.weighting == "min_snr" else UNTOLD,
        "ss_network_dropout": str(plan.dropout or UNTOLD),
        "ss_caption_dropout_rate": str(dataset.dropout),
        "ss_mixed_precision": str(plan.autocast or "no").removeprefix("torch."),
        "modelspec.title": name,
        "modelspec.date": datetime.fromtimestamp(ended, timezone.utc).isoformat(timespec="seconds"),
    }
    if tags := Counter(tag.strip() for each in pictures for text in each.captions[:1] for tag in text.split(",")):
        del tags[""]
        found["ss_tag_frequency"] = json.dumps({name: dict(tags)}, ensure_ascii=False)
    if sizes := Counter(each.size for each in pictures if each.size):
        ((height, width), _), *_ = sizes.most_common(1)
        found["ss_resolution"] = f"({width}, {height})"
        found["modelspec.resolution"] = f"{width}x{height}"
    return found
