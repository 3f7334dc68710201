"""State: a run on disk, from which it goes on as if it had never stopped.

A safetensors file, replaced whole or not at all. All randomness is told by the seed and the step (randomness.py), and
so is the place in the data: the step says both.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import files
from ..errors import TrainingError, shown
from ..files import TensorFile
from .loop import Run

KEY = "lora_ops.training"
VERSION = 1


def save(path: str | os.PathLike[str], run: Run) -> None:
    """Raises FileError like files.write; the file that was there stays then."""
    tensors: dict[str, Tensor] = {f"parameter/{name}": p.detach() for name, p in run.parameters.items()}
    tensors |= {f"average/{name}": tensor for name, tensor in run.average.items()}
    tensors |= {f"taken_off/{name}": tensor for name, tensor in _taken_off(run).items()}
    optimizer = run.optimizer.state_dict()
    numbers: dict[str, dict[str, Any]] = {}
    for index, values in optimizer["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{name}"] = value
            else:
                numbers.setdefault(str(index), {})[name] = value
    told = {
        "version": VERSION,
        "step": run.step,
        "smoothed": None if math.isnan(run.smoothed) else run.smoothed,
        "best": None if math.isinf(run.best) else run.best,
        "places": _places(run),
        "algebra": run.plan.algebra,
        "optimizer": run.plan.descent.optimizer,
        "seed": run.plan.seed,
        "groups": optimizer["param_groups"],
        "numbers": numbers,
        "schedule": {key: value for key, value in run.schedule.state_dict().items() if _is_plain(value)},
        "scaler": run.scaler.state_dict() if run.scaler is not None else None,
        "plan": run.plan.told(),
    }
    files.write(path, tensors, {KEY: json.dumps(told)}, overwrite=True)


def restore(path: str | os.PathLike[str], run: Run) -> None:
    """Put a run where the one was that wrote the file. The plan's steps, rate and schedule may be others.

    Raises FileError for what is no such file, TrainingError, naming both, for another place, rank, alpha, algebra,
    optimizer or seed.
    """
    file = files.read(path)
    told = _told(file)
    for name, ours in (
        ("algebra", run.plan.algebra),
        ("optimizer", run.plan.descent.optimizer),
        ("seed", run.plan.seed),
    ):
        if told[name] != ours:
            raise _other(file, name, told[name], ours)
    _require_places(file, told["places"], _places(run))
    for kind, name, has in (
        ("average/", "moving average", bool(run.average)),
        ("taken_off/", "start that is taken off", bool(_taken_off(run))),
    ):
        if has != any(key.startswith(kind) for key in file.tensors):
            raise _other(file, name, *(("none", "one") if has else ("one", "none")))
    with torch.no_grad():
        for kind, there in (
            ("parameter", run.parameters),
            ("average", run.average),
            ("taken_off", _taken_off(run)),
        ):
            for name, tensor in there.items():
                tensor.copy_(file.tensors[f"{kind}/{name}"])
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in told["numbers"].items()}
    for key, tensor in file.tensors.items():
        kind, _, rest = key.partition("/")
        if kind == "optimizer":
            index, _, name = rest.partition("/")
            state.setdefault(int(index), {})[name] = tensor
    groups = [_tuples(group) for group in told["groups"]]
    run.optimizer.load_state_dict({"state": state, "param_groups": groups})
    run.schedule.load_state_dict(told["schedule"])
    if run.scaler is not None and told["scaler"] is not None:
        run.scaler.load_state_dict(told["scaler"])
    run.step = told["step"]
    run.smoothed = math.nan if told["smoothed"] is None else told["smoothed"]
    run.best = math.inf if told["best"] is None else told["best"]


def step_of(path: str | os.PathLike[str]) -> int:
    """How far the run was that wrote the file, by its header. Raises FileError or TrainingError like restore."""
    return int(_told(TensorFile(str(path), {}, files.read_header(path).metadata))["step"])


def _tuples(group: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: tuple(value) if key in ("betas", "eps") and isinstance(value, list) else value
        for key, value in group.items()
    }


def _is_plain(value: object) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def _taken_off(run: Run) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for each in run.trained:
        if each.taken_off is not None:
            found |= {f"{each.place.module}.{name}": tensor for name, tensor in each.factors_taken_off().items()}
    return found


def _places(run: Run) -> list[list[Any]]:
    return [[each.place.module, each.place.rank, each.place.alpha] for each in run.trained]


def _told(file: TensorFile) -> dict[str, Any]:
    try:
        told = json.loads(file.metadata[KEY])
    except (KeyError, ValueError) as error:
        remedy = "Choose a state that training has saved; to go on from a LoRA give it as the start."
        raise TrainingError("is no state of a training run.", file=file.source, remedy=remedy) from error
    if told.get("version") != VERSION:
        what = f"is a state of version {shown(told.get('version'))}; this one reads {VERSION}."
        raise TrainingError(what, file=file.source)
    return told


def _require_places(file: TensorFile, theirs: list[list[Any]], ours: list[list[Any]]) -> None:
    there, here = ({module: (rank, alpha) for module, rank, alpha in places} for places in (theirs, ours))
    for module in sorted(there.keys() ^ here.keys()):
        missing = "the plan does not train" if module in there else "the state does not have"
        what = f"trains {len(there)} places, the plan {len(here)}: this one {missing}."
        raise TrainingError(what, file=file.source, module=module, remedy="Use the plan that it was made with.")
    for module, found in there.items():
        if found != here[module]:
            told = (f"rank {rank} and alpha {alpha:g}" for rank, alpha in (found, here[module]))
            raise _other(file, "", *told, module=module)


def _other(file: TensorFile, name: str, theirs: object, ours: object, module: str | None = None) -> TrainingError:
    what = f"has {f'the {name} ' if name else ''}{shown(theirs)}, the plan {shown(ours)}."
    remedy = "Use the plan that it was made with, or begin a run of its own."
    return TrainingError(what, file=file.source, module=module, remedy=remedy, found=theirs, expected=ours)
