"""Places: which targets of a model train, each with its rank and alpha."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import StackError, TargetError, shown
from ..lora import Target, TargetMap
from ..select import Pattern, Selector, choose

# What diffusers trains if it is not told otherwise, and the same projections where a family calls them otherwise; of
# text encoders, too.
PROJECTIONS = ("*.to_q", "*.to_k", "*.to_v", "*.to_out.0", "*.to_query", "*.to_key", "*.to_value", "*.out_layer")
TEXT_PROJECTIONS = ("*.q_proj", "*.k_proj", "*.v_proj", "*.out_proj")
TEXT_PROJECTIONS += tuple(f"*.SelfAttention.{name}" for name in "qkvo")  # T5's


@dataclass(frozen=True)
class Aim:
    """The targets that a pattern means, and the rank and alpha (None: the rank) they train at; rank 0 leaves them out.

    Without a pattern it means the projections of attention. Of several aims that mean a target the last counts.
    """

    pattern: Pattern | None = None
    rank: int = 16
    alpha: float | None = None


class Place(NamedTuple):
    """A target that trains, and the module name that its adapter gets."""

    module: str
    target: Target
    rank: int
    alpha: float


def places(targets: TargetMap, aims: Sequence[Aim], part: str = "model") -> tuple[Place, ...]:
    """The places of the denoiser, or of the part "clip", that these aims mean, none overlapping another.

    A name means the weight or band that has it; a role, or a pattern that means several cuts of one weight, its
    smallest parts (q, k and v of FLUX's fused matrices).

    Raises StackError for an aim that chooses nothing, TargetError if nothing is left to train.
    """
    choose([Selector(aim.pattern, 1.0) for aim in aims if aim.pattern], targets)  # told by name: what no model has
    found: list[Place] = []
    used: set[int] = set()
    decided: dict[str, list[Target]] = {}
    trainable = (target for target in targets.targets if target.part == part and _trains(target))
    for target in sorted(trainable, key=lambda target: target.rows.length):
        numbers = [number for number, aim in enumerate(aims) if _means(aim.pattern, target)]
        there = decided.setdefault(target.key, [])
        if not numbers or any(_overlap(target, other) for other in there):
            used.update(numbers)
            continue
        there.append(target)
        used.update(numbers)
        aim = aims[numbers[-1]]
        if aim.rank:
            alpha = float(aim.rank) if aim.alpha is None else aim.alpha
            found.append(Place(module_of(target, targets), target, aim.rank, alpha))
    for number, aim in enumerate(aims):
        if number not in used:
            chosen = f"'{shown(aim.pattern.text)}'" if aim.pattern else "Attention's projections"
            what = f"{chosen} chooses no weight that can be trained."
            remedy = f"Choose weights of the {'denoiser' if part == 'model' else 'text encoder'}."
            raise StackError(what, remedy=remedy, pattern=aim.pattern)
    if not found:
        raise TargetError("Nothing is left to train.", remedy="Choose at least one place with a rank above 0.")
    order = {(target.key, target.band): number for number, target in enumerate(targets.targets)}
    return tuple(sorted(found, key=lambda place: order[place.target.key, place.target.band]))


_ATTENTION = {
    "model": tuple(Pattern.parse(text) for text in PROJECTIONS),
    "clip": tuple(Pattern.parse(text) for text in TEXT_PROJECTIONS),
}


def _means(pattern: Pattern | None, target: Target) -> bool:
    """A band answers to its own names: its weight's key is the name of all rows."""
    if pattern is None:
        kind = "attn" if target.part == "model" else "text"
        return kind in target.role and any(_means(each, target) for each in _ATTENTION[target.part])
    return pattern.matches(target.names if target.band is None else target.names[:-1], target.role)


def _trains(target: Target) -> bool:
    """Whether it is a matrix, or rows of one that have a name of their own; a text encoder's embeddings are looked up,
    not multiplied with."""
    named = target.band is None or len(target.names) > 1
    table = target.part == "clip" and any(sign in target.key for sign in ("embedding", "attention_bias", "shared."))
    return len(target.shape) > 1 and named and not target.swap and not table


def _overlap(one: Target, other: Target) -> bool:
    return one.rows.start < other.rows.end and other.rows.start < one.rows.end


def module_of(target: Target, targets: TargetMap) -> str:
    """The name under which a target's adapter is read again as this target's."""
    for name in _names(target):
        named = targets.names.get(name)
        if named is not None and named.target == target:
            return name
    raise TargetError("has no name that a file could call it by.", module=target.key, remedy="Choose other places.")


def _names(target: Target) -> Iterator[str]:
    """Those that the host reads come first."""
    if target.part == "clip":
        yield f"text_encoders.{target.key.removesuffix('.weight')}"
    for prefix in ("diffusion_model.", "transformer.", "unet.", ""):
        yield from (prefix + name for name in target.names)
