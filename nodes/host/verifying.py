"""The verified save: a written file, read back through the host's own loading rules, against the live weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ...lora_ops.errors import FileError
from ...lora_ops.files import Header, read_header, read_tensors
from .baking import CHUNK
from .checkpoints import File, Part, placeholders
from .renaming import Rule, computed, renamed


@dataclass(frozen=True)
class Verified:
    """How far a file is from the live weights: of so many, this many are equal, and the worst is so many units in the
    last place away, each of the coarser dtype: rounding to both explains one. loaded: so many patched ones were
    compared with what the host itself had loaded; the others, computed as it would."""

    weights: int = 0
    equal: int = 0
    loaded: int = 0
    worst: str = ""
    ulps: float = 0.0
    relative: float = 0.0  # of the worst weight, in the norm

    def joined(self, other: Verified) -> Verified:
        worst = max(self, other, key=lambda each: each.ulps)
        return replace(
            worst,
            weights=self.weights + other.weights,
            equal=self.equal + other.equal,
            loaded=self.loaded + other.loaded,
        )

    @property
    def text(self) -> str:
        told = f"{self.equal} of {self.weights} weights equal the live ones"
        told += f" ({self.loaded} patched ones as they are loaded)" if self.loaded else ""
        return told + (f"; worst {self.worst}: {self.ulps:.2g} ulp, {self.relative:.1e}" if self.ulps else "")


def verify(path: Path, file: File, kept: Mapping[str, frozenset[str]], more: Callable[[int], None]) -> Verified:
    """Compare each weight that would be loaded from a file, or from a folder's, with the live one, computed anew.

    kept: the names of each part's weights that the layout holds. more hears how many bytes were read each time.
    Raises FileError for a weight that would not be loaded or is further off than rounding explains.
    """
    paths = sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]
    headers, found = [read_header(each) for each in paths], Verified()
    for part in file.parts:
        found = found.joined(_verify(headers, part, file.load[part.name], kept[part.name], more))
    return found


def _verify(
    headers: Sequence[Header], part: Part, rule: Rule, kept: frozenset[str], more: Callable[[int], None]
) -> Verified:
    file = {name: tensor for header in headers for name, tensor in placeholders(header).items()}
    within = {name: header for header in headers for name in header.entries}
    loaded, found = renamed(rule, file), Verified()
    if missing := sorted(kept - loaded.keys()):
        what = f"would be loaded without {len(missing)} of its {len(kept)} weights (first: {missing[0]})."
        raise FileError(what, file=headers[0].path, module=missing[0], remedy="Nothing was saved; please report this.")
    made: dict[frozenset[str], list[str]] = {}
    for key in sorted(kept):  # the tensors that one quantised weight is stored in, together
        made.setdefault(loaded[key].origins, []).append(key)
    for names, keys in made.items():
        values = {name: tensor for each in sorted(names) for name, tensor in read_tensors(within[each], [each])}
        plain = len(keys) == 1 and loaded[keys[0]].whole
        results = {keys[0]: values[next(iter(names))]} if plain else computed(rule, file, values)
        for key in keys:
            found = found.joined(_compared(part, key, results[key], within[min(names)]))
        more(sum(tensor.nbytes for tensor in values.values()))
    return found


def _compared(part: Part, key: str, read: Tensor, header: Header) -> Verified:
    weight = part.weights[key]
    loaded = weight.loaded is not None
    live = weight.rounded(weight.base.dtype) if weight.loaded is None else weight.loaded.to("cpu")
    if read.shape != live.shape:
        raise FileError(f"has the shape {tuple(read.shape)}, not {tuple(live.shape)}.", file=header.path, module=key)
    wide = torch.promote_types(read.dtype, live.dtype)
    if torch.equal(read.to(wide), live.to(wide)):
        return Verified(1, 1, loaded)
    far, relative = distance(read, live)
    if not far <= 1:
        what = f"is {far:.3g} ulp from the live weight, more than rounding explains."
        raise FileError(what, file=header.path, module=key, remedy="Nothing was saved; please report this.", ulps=far)
    return Verified(1, 0, loaded, weight.key, far, relative)


def distance(one: Tensor, other: Tensor) -> tuple[float, float]:
    """How far two tensors are apart: at most so many units in the last place, each of the dtype that is coarser there;
    and the norm of their difference as a share of the other's."""
    kinds = [torch.finfo(dtype) for dtype in {one.dtype, other.dtype}]
    one, other = torch.atleast_1d(one, other)
    rows = max(1, CHUNK // max(1, one[:1].numel() * 8))
    worst, different, whole = 0.0, 0.0, 0.0
    for mine, its in zip(one.split(rows), other.split(rows), strict=True):
        mine, its = mine.double(), its.double()
        same = (mine == its) | (mine.isnan() & its.isnan())
        gap = (mine - its).abs_().nan_to_num_(nan=torch.inf).masked_fill_(same, 0)
        _, exponent = torch.frexp(torch.maximum(mine.abs(), its.abs()).nan_to_num_())
        power = torch.exp2(exponent.double() - 1)
        unit = torch.stack([(power * kind.eps).clamp_min_(kind.eps * kind.tiny) for kind in kinds]).amax(0)
        worst = max(worst, float((gap / unit).max())) if gap.numel() else worst
        different, whole = different + float(gap.square().sum()), whole + float(its.nan_to_num(0, 0, 0).square().sum())
    return worst, (different / whole) ** 0.5 if whole else 0.0
