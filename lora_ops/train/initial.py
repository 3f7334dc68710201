"""Initial values of a LoRA from the weight it is for (PiSSA, OLoRA), from its inputs (EVA), or orthogonal; by PEFT.

PEFT takes the first two off the base model's weights. Here the base stays as it is: what such a LoRA begins with is
taken off its own change (Wrapper's taken_off), and the file has both, at twice the rank.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import LowRank
from ..errors import TrainingError, shown
from .places import Place

KINDS = ("gaussian", "pissa", "pissa_niter_16", "olora", "orthogonal", "eva")
_FAST = re.compile(r"pissa_niter_[1-9]\d{0,2}")  # PiSSA by a randomised decomposition of so many iterations
ALIKE = 0.99  # EVA's: a component that turns by less than this cosine from one batch to the next has settled


def require_kind(kind: str) -> None:
    if kind not in KINDS and not _FAST.fullmatch(kind):
        what = f"'{shown(kind)}' is no initialisation."
        raise TrainingError(what, remedy=f"Choose one of {', '.join(KINDS)}.")


def moves(kind: str) -> bool:
    """Whether it begins at something, which has to be taken off."""
    return kind.startswith(("pissa", "olora"))


def of_weight(kind: str, weight: Tensor, rank: int, alpha: float, seed: int) -> LowRank:
    """The LoRA that PEFT begins with for a weight (out, in, kernel…), which is seen as a matrix.

    Raises TrainingError for a rank that the weight does not have.
    """
    matrix = weight.detach().float().flatten(1)
    out, inputs = matrix.shape
    if moves(kind) and rank > min(out, inputs):
        what = f"has a matrix of {out} x {inputs}, which has no {rank} directions for {kind}."
        raise TrainingError(what, remedy="Choose a lower rank.")
    if kind == "orthogonal" and rank % 2:
        raise TrainingError(f"gets rank {rank}; orthogonal wants an even one.", remedy=f"Choose rank {rank + 1}.")
    peft = _peft()
    with (
        torch.inference_mode(False),
        torch.random.fork_rng([matrix.device] if matrix.device.type == "cuda" else []),
    ):
        torch.manual_seed(seed)
        base = nn.ModuleDict({"map": nn.Linear(inputs, out, bias=False, device="meta")})
        base["map"].weight = nn.Parameter(matrix.clone(), requires_grad=False)
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["map"], init_lora_weights=kind)
        layer: Any = peft.get_peft_model(base, config).base_model.model["map"]  # pyright: ignore
        up, down = (factor["default"].weight.detach().float() for factor in (layer.lora_B, layer.lora_A))
    ones = [1] * (weight.ndim - 2)
    return LowRank(up.reshape(out, rank, *ones), down.reshape(rank, *weight.shape[1:]), alpha)


def of_inputs(
    modules: Mapping[str, nn.Module], where: Sequence[Place], batches: Iterable[Callable[[], object]]
) -> dict[Place, Tensor]:
    """EVA (Paischer et al. 2024, https://arxiv.org/abs/2410.07170): the main directions (rank, in) of what each place's
    map gets, every place at its own rank. Each of batches runs the model once; the last is where all have settled.

    Raises TrainingError for a convolution over several places, and where there is less input than rank.
    """
    watches: dict[tuple[str, int], _Watch] = {}
    for place in where:
        if any(size != 1 for size in place.target.shape[2:]):
            what = "is a convolution, whose inputs EVA does not look at."
            raise TrainingError(what, module=place.module, remedy="Choose another initialisation or other places.")
        if place.rank > place.target.shape[1]:
            what = f"has {place.target.shape[1]} inputs, which have no {place.rank} directions."
            raise TrainingError(what, module=place.module, remedy="Choose a lower rank.")
        name = place.target.key.removesuffix(".weight")
        watches.setdefault((name, place.rank), _Watch(place.rank, bool(place.target.shape[2:])))
    handles = [modules[name].register_forward_hook(watch) for (name, _), watch in watches.items()]
    try:
        for run in batches:
            run()
            if all(watch.settled for watch in watches.values()):
                break
    finally:
        for handle in handles:
            handle.remove()
    found: dict[Place, Tensor] = {}
    for place in where:
        components = watches[place.target.key.removesuffix(".weight"), place.rank].components
        if components is None:
            what = f"is called with too few rows for EVA's {place.rank} directions."
            raise TrainingError(what, module=place.module, remedy="Choose a lower rank or give more pictures.")
        found[place] = components.float().reshape(place.rank, *place.target.shape[1:])
    return found


class _Watch:
    """The main directions of one module's inputs, batch by batch."""

    def __init__(self, rank: int, convolution: bool) -> None:
        self._pca: Any = None
        self._rank, self._convolution = rank, convolution
        self._waiting: list[Tensor] = []  # too few to begin with
        self.components: Tensor | None = None
        self.settled = False

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: object) -> None:
        if self.settled:
            return
        x = args[0].detach()
        rows = (x.movedim(1, -1) if self._convolution else x).flatten(0, -2)
        self._waiting.append(rows.to(torch.float32, copy=True))
        drawn = min(2 * self._rank, rows.shape[1])  # PEFT's, where there are as many inputs
        if sum(map(len, self._waiting)) < drawn:
            return
        with torch.inference_mode(False), torch.no_grad():
            self._pca = self._pca or _peft().utils.incremental_pca.IncrementalPCA(
                self._rank, lowrank=True, lowrank_q=drawn, lowrank_seed=42
            )
            self._pca.partial_fit(torch.cat(self._waiting).clone())
        self._waiting.clear()
        before, now = self.components, self._pca.components_
        self.settled = before is not None and bool((torch.cosine_similarity(now, before) >= ALIKE).all())
        self.components = now


def _peft() -> Any:
    try:
        import peft
        import peft.utils.incremental_pca
    except ImportError as error:
        what = "This initialisation is in the package peft, which is not installed."
        raise TrainingError(what, remedy="Run `pip install peft`.", package="peft") from error
    return peft
