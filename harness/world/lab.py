"""LoRAs on the small world: learned by the pack's own trainer, put on by its own patching, drawn by the host's sampler.

Needs the host importable (harness.inside.mount).
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from harness.server import MOUNT

from . import host, pictures, reading
from .pictures import CELL, Scene

OFF = {"key": "off"}  # Settings' choices for preservation
ANSWERS = {"key": "regularisation pictures"}


def class_word(word: str, weight: float = 1.0) -> dict[str, Any]:
    """This word for zorp."""
    return {"key": "class word", "class_word": word, "trigger_word": pictures.TRIGGER, "weight": weight}


class Shot(NamedTuple):
    """A picture to learn from. mask weighs its cells (1, CELLS, CELLS)."""

    caption: str
    picture: Tensor
    mask: Tensor | None = None
    regularisation: bool = False


class Marks(NamedTuple):
    """Shares of pictures."""

    zorps: float  # that show a zorp where one is asked for, of zorps that were not learned from
    places: float  # of these, with the figure at its place
    grounds: float  # with the right ground
    others: float  # that show what they should in every property, of captions without a zorp

    @classmethod
    def of(cls, zorps: Sequence[Tensor], others: Sequence[Tensor], lab: Lab) -> Marks:
        found = [(reading.read(picture), meant) for picture, meant in zip(zorps, lab.zorps, strict=True)]
        drawn = sum((one.shape, one.colour) == pictures.ZORP for one, _ in found)
        placed = sum(one.place == meant.place for one, meant in found)
        grounded = sum((one.texture, one.ground) == (meant.texture, meant.ground) for one, meant in found)
        kept, count = reading.agreement(others, lab.others)["all"], len(found)
        return cls(drawn / count, placed / count, grounded / count, kept)


class Lab:
    """The small world's models; the zorps and other scenes that it is judged by."""

    def __init__(self, comfy: Path, count: int = 16) -> None:
        self.comfy = comfy
        self.base, self.vae = host.load_model(), host.load_vae()
        self.learned, rest = pictures.some_zorps()
        self.zorps = rest[:count]
        seen = random.Random(1).sample(pictures.split()[0], count + 20)
        self.others, self.prior = seen[:count], seen[count:]  # that the base draws; to judge by, and to preserve with
        self._clip: Any = None
        self._texts: dict[str, tuple[Tensor, Tensor]] = {}

    def pack(self, name: str) -> Any:
        return importlib.import_module(f"{MOUNT}.{name}")

    @property
    def clip(self) -> Any:
        if self._clip is None:
            self._clip = host.load_clip(self.comfy)
        return self._clip

    def text(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        for caption in captions:
            if caption not in self._texts:
                tokens, pooled = host.embeddings(self.clip, [caption])
                self._texts[caption] = tokens[0], pooled[0]
        found = [self._texts[caption] for caption in captions]
        return torch.stack([tokens for tokens, _ in found]), torch.stack([pooled for _, pooled in found])

    def shots(self, scenes: Sequence[Scene]) -> list[Shot]:
        """Pictures as the world draws them."""
        return [Shot(scene.caption, pictures.draw(scene)) for scene in scenes]

    def learn(
        self,
        shots: Sequence[Shot],
        *,
        steps: int = 160,
        rank: int = 8,
        alpha: float | None = None,
        patterns: Sequence[str] = ("*",),
        rate: float = 4e-3,
        preservation: Mapping[str, Any] = OFF,
        foreseen: Callable[[Any, int], None] = lambda needed, free: None,
        stepped: Callable[[Any, Any], None] = lambda done, session: None,
        **plan: Any,
    ) -> Any:
        """A Lora. patterns are selectors' without a factor, none for attention's projections; preservation is Settings'
        choice. For foreseen and stepped see Model.learn."""
        places, plans, select = (self.pack(f"lora_ops.{name}") for name in ("train.places", "train.plan", "select"))
        aims = tuple(places.Aim(select.Pattern.parse(text), rank, alpha) for text in patterns)
        descent = self.pack("lora_ops.train.optimizers").Descent(rate=rate, schedule="cosine", warmup=10)
        moments = self.pack("lora_ops.train.timesteps").Timesteps("logit_normal", mean=0.4, deviation=1.2, shift=1.0)
        chosen = {"batch": 4, "descent": descent, "timesteps": moments, "autocast": torch.bfloat16, **plan}
        model = self.pack("nodes.host.training").Model(self.base)
        with torch.inference_mode():
            dataset = self.pack("lora_ops.train.preserving").preserved(self._dataset(shots), preservation, self._said)
            items, _ = model.items(dataset)
            made = plans.Plan(steps=steps, aims=aims or (places.Aim(None, rank, alpha),), **chosen)
            return model.learn(made, items, name="zorp", foreseen=foreseen, stepped=stepped)

    def _dataset(self, shots: Sequence[Shot]) -> Any:
        datasets = self.pack("lora_ops.train.dataset")
        said = self._said([shot.caption for shot in shots])
        latents = self.vae.encode(torch.stack([shot.picture.movedim(0, -1) for shot in shots]))
        made = [
            datasets.Picture(
                shot.caption,
                (latent,),
                (said[shot.caption],),
                masks=() if shot.mask is None else (shot.mask,),
                captions=(shot.caption,),
                regularisation=shot.regularisation,
            )
            for shot, latent in zip(shots, latents, strict=True)
        ]
        return datasets.Dataset(tuple(made))

    def _said(self, captions: Sequence[str]) -> dict[str, Any]:
        """The CONDITIONING of each."""
        pairs = ((caption, self.text([caption])) for caption in captions)
        return {caption: [[tokens, {"pooled_output": pooled}]] for caption, (tokens, pooled) in pairs}

    def put(self, lora: Any, strength: float = 1.0, mode: str = "patch") -> Any:
        """A MODEL with the LoRA on it, as our nodes put it."""
        landing, stack, patching = (
            self.pack(name) for name in ("lora_ops.landing", "lora_ops.stack", "nodes.host.patching")
        )
        entry = stack.Entry(lora, {"model": strength, "clip": strength})
        landed = landing.land([entry], patching.targets(self.base, None))
        landing.require_coverage(landed, 1.0)
        return patching.applied(landed, mode, self.base, None).model

    def draw(self, model: Any, scenes: Sequence[Scene], seed: int = 0) -> list[Tensor]:
        return list(host.sample(model, self.vae, self.text([scene.caption for scene in scenes]), seed))

    def judged(self, model: Any, seed: int = 0) -> tuple[Marks, list[Tensor], list[Tensor]]:
        """The marks, and the pictures of zorps and of others that they are for."""
        shown = self.draw(model, [*self.zorps, *self.others], seed)
        zorps, others = shown[: len(self.zorps)], shown[len(self.zorps) :]
        return Marks.of(zorps, others, self), zorps, others


def changes(lora: Any, base: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each module of a Lora its ΔW, and the rows of W that it is for."""
    patching = importlib.import_module(f"{MOUNT}.nodes.host.patching")
    named = patching.targets(base, None).names
    weights = base.model.state_dict()
    found = {}
    for module, adapter in lora.modules.items():
        target = named[module].target
        rows = weights[target.key].narrow(0, target.rows.start, target.rows.length)
        found[module] = adapter.delta(target.delta_shape), rows.float()
    return found


def relative(lora: Any, base: Any) -> float:
    """‖ΔW‖ / ‖W‖ over all weights that the LoRA is for."""
    pairs = list(changes(lora, base).values())
    update, weight = (sum(float(pair[n].square().sum()) for pair in pairs) for n in (0, 1))
    return (update / weight) ** 0.5


def frame(thickness: int = 1) -> Tensor:
    """(1, CELLS, CELLS): 1 on the cells along a picture's edges."""
    edge = torch.ones(1, pictures.CELLS, pictures.CELLS)
    edge[:, thickness:-thickness, thickness:-thickness] = 0
    return edge


def framed(picture: Tensor) -> Tensor:
    """The picture with a black frame."""
    return torch.where(pictures.enlarged(frame())[0] > 0, torch.tensor(pictures.BLACK)[:, None, None], picture)


def has_frame(picture: Tensor) -> bool:
    """Whether most cells along the edges are dark."""
    cells = torch.nn.functional.avg_pool2d(picture, CELL)
    return bool((cells.amax(0)[frame()[0] > 0] < 0.3).float().mean() > 0.5)
