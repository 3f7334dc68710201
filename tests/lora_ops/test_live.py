"""Live: the same function as with the update in the weights, and no trace afterwards."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from lora_ops.adapters import Adapter, Additive, DoRA, Full, LowRank, build
from lora_ops.errors import TargetError
from lora_ops.landing import Piece, add_, merged
from lora_ops.live import Live
from lora_ops.live.terms import Turned
from lora_ops.lora import Band


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def low_rank(rows: int, *inputs: int, rank: int = 3, seed: int = 0, alpha: float | None = None) -> LowRank:
    ones = [1] * (len(inputs) - 1)
    return LowRank(rand(rows, rank, *ones, seed=seed), rand(rank, *inputs, seed=seed + 50), alpha)


# name -> (module, its input, pieces at strengths 1, -0.5 and 0.3 by row, times their factors)
CASES = {
    "linear": (
        nn.Linear(8, 12),
        rand(2, 5, 8),
        [Piece(low_rank(12, 8), None, 1.0, 0), Piece(low_rank(12, 8, rank=2, seed=1, alpha=4.0), None, -0.5, 1)],
    ),
    "bands of a fused linear": (
        nn.Linear(8, 24),
        rand(2, 5, 8),
        [
            Piece(low_rank(8, 8), Band(0, 8), 1.0, 0),
            Piece(low_rank(8, 8, seed=1), Band(16, 8), 1.0, 0),
            Piece(low_rank(8, 8, seed=2), Band(16, 8), -0.5, 1),
            Piece(low_rank(24, 8, seed=3), None, 0.3, 2),
        ],
    ),
    "factors of selectors": (
        nn.Linear(8, 24),
        rand(2, 5, 8),
        [
            Piece(low_rank(8, 8), Band(0, 8), 0.25, 0, 0.25),
            Piece(low_rank(16, 8, seed=1), Band(8, 16), 1.0, 0),
            Piece(low_rank(24, 8, seed=2), None, -1.5, 1, 3.0),
        ],
    ),
    "conv with stride, padding and dilation": (
        nn.Conv2d(8, 12, 3, stride=2, padding=2, dilation=2),
        rand(2, 8, 9, 9),
        [Piece(low_rank(12, 8, 3, 3), None, 1.0, 0), Piece(low_rank(12, 8, 3, 3, seed=1), None, -0.5, 1)],
    ),
    "conv that wraps around": (
        nn.Conv2d(8, 12, 3, padding=1, padding_mode="circular"),
        rand(2, 8, 9, 9),
        [Piece(low_rank(12, 8, 3, 3), None, 1.0, 0)],
    ),
    "1x1 conv with a matrix": (
        nn.Conv2d(8, 12, 1),
        rand(2, 8, 4, 4),
        [Piece(low_rank(12, 8), None, 1.0, 0), Piece(low_rank(12, 8, 1, 1, seed=1), None, -0.5, 1)],
    ),
    "conv3d": (nn.Conv3d(8, 12, (1, 3, 3)), rand(1, 8, 2, 5, 5), [Piece(low_rank(12, 8, 1, 3, 3), None, 1.0, 0)]),
    "conv with a flat kernel": (
        nn.Conv2d(8, 12, 3, padding=1),
        rand(2, 8, 5, 5),
        [Piece(LowRank(rand(12, 3), rand(3, 72, seed=1)), None, 1.0, 0)],
    ),
    "differences of a fused linear": (
        nn.Linear(8, 24),
        rand(2, 5, 8),
        [
            Piece(Full(rand(8, 8), 0.5), Band(16, 8), 1.0, 0),
            Piece(low_rank(24, 8, seed=3), None, -0.5, 1),
            Piece(Full(rand(24, 8, seed=4)), None, 0.6, 2, 2.0),
        ],
    ),
    "difference of a conv": (
        nn.Conv2d(8, 12, 3, stride=2, padding=1),
        rand(2, 8, 9, 9),
        [Piece(Full(rand(12, 8, 3, 3)), None, 1.0, 0)],
    ),
    "difference of a 1x1 conv": (nn.Conv2d(8, 12, 1), rand(2, 8, 4, 4), [Piece(Full(rand(12, 8)), None, -0.5, 1)]),
    "difference of a layer norm": (nn.LayerNorm(8), rand(2, 5, 8), [Piece(Full(rand(8)), None, -0.5, 1)]),
    "difference of an RMS norm": (nn.RMSNorm(8, eps=1e-3), rand(2, 5, 8), [Piece(Full(rand(8)), None, 0.3, 2)]),
    "difference of a group norm": (nn.GroupNorm(2, 8), rand(2, 8, 4, 4), [Piece(Full(rand(8)), None, 1.0, 0)]),
    "conv1d": (nn.Conv1d(8, 12, 3), rand(2, 8, 9), [Piece(low_rank(12, 8, 3), None, 1.0, 0)]),
}


def loha(rows: int, *inputs: int, rank: int = 2, core: bool = False, seed: int = 0) -> Additive:
    """Of rank 2 it runs as a pair of rank 4, of rank 4 it is built, and so it is with a core."""
    a, b = ((rank, rows), (rank, inputs[0])) if core else ((rows, rank), (rank, math.prod(inputs)))
    shapes = {"w1_a": a, "w1_b": b, "w2_a": a, "w2_b": b}
    shapes |= dict.fromkeys(("t1", "t2"), (rank, rank, *inputs[1:])) if core else {}
    factors = {f"hada_{name}": rand(*shape, seed=seed + i) / 2 for i, (name, shape) in enumerate(shapes.items())}
    return build({**factors, "alpha": torch.tensor(3.0)})


def lokr(rows: int, *inputs: int, form: str = "low rank", seed: int = 0) -> Additive:
    """Two outer inputs, three outer rows."""
    inner, columns, kernel = rows // 3, inputs[0] // 2, inputs[1:]
    shapes = {
        "whole": {"w2": (inner, columns, *kernel)},
        "low rank": {"w2_a": (inner, 2), "w2_b": (2, columns * math.prod(kernel))},
        "core": {"w2_a": (2, inner), "w2_b": (2, columns), "t2": (2, 2, *kernel)},
    }[form]
    factors = {f"lokr_{name}": rand(*shape, seed=seed + i) for i, (name, shape) in enumerate(shapes.items())}
    return build({"lokr_w1": rand(3, 2, seed=seed + 9), **factors, "alpha": torch.tensor(3.0)})


def locon(rows: int, *inputs: int, seed: int = 0) -> Additive:
    shapes = {"up": (rows, 3), "mid": (3, 3, *inputs[1:]), "down": (3, inputs[0])}
    return build({name: rand(*shape, seed=seed + i) for i, (name, shape) in enumerate(shapes.items())})


CONVOLUTIONS = {
    "conv1d": (nn.Conv1d(8, 12, 3, padding=1), rand(2, 8, 9)),
    "conv2d": (nn.Conv2d(8, 12, (3, 2), stride=2, padding=2, dilation=2, padding_mode="circular"), rand(2, 8, 9, 9)),
    "conv3d": (nn.Conv3d(8, 12, (2, 3, 3), padding=1), rand(2, 8, 3, 5, 5)),
}
for name, (module, x) in CONVOLUTIONS.items():
    shape = tuple(module.weight.shape)
    for kind, adapters in {
        "LoRA with a core": [locon(*shape), low_rank(*shape), locon(*shape, seed=5)],
        "LoHa": [loha(*shape), loha(*shape, core=True, seed=9), low_rank(*shape)],
        "LoKr": [lokr(*shape, form=form, seed=seed) for seed, form in enumerate(("whole", "low rank", "core"))],
    }.items():
        CASES[f"{kind}, {name}"] = (
            module,
            x,
            [Piece(a, None, (1.0, -0.5, 0.3)[number], number) for number, a in enumerate(adapters)],
        )
CASES["LoHa, linear"] = (
    nn.Linear(8, 12),
    rand(2, 5, 8),
    [
        Piece(loha(12, 8), None, 1.0, 0),
        Piece(loha(12, 8, rank=4, seed=9), None, -0.5, 1),
        Piece(low_rank(12, 8), None, 0.3, 2),
    ],
)
CASES["LoKr, bands of a linear"] = (
    nn.Linear(8, 24),
    rand(2, 5, 8),
    [
        Piece(lokr(12, 8), Band(0, 12), 1.0, 0),
        Piece(lokr(12, 8, form="whole"), Band(12, 12), 1.0, 0),
        Piece(lokr(24, 8, seed=4).narrowed(5, 9), Band(5, 9), -1.5, 1, 3.0),
        Piece(lokr(24, 8, seed=4).swapped, None, 0.3, 2),
        Piece(low_rank(12, 8), Band(0, 12), 0.3, 2),
    ],
)
CASES["LoKr, 1x1 conv with matrices"] = (nn.Conv2d(8, 12, 1), rand(2, 8, 4, 4), [Piece(lokr(12, 8), None, 1.0, 0)])


def dora(inner: Additive, width: int, of_inputs: bool = False, seed: int = 0) -> DoRA:
    return DoRA(inner, 2 + rand(width, seed=seed).abs(), of_inputs)


def transforms(rows: int, *inputs: int) -> dict[str, Adapter]:
    """Each that runs beside a weight of this shape."""
    ones = [1] * (len(inputs) - 1)
    mix = {"a1": (inputs[0], 2, *ones), "a2": (2, inputs[0], *ones), "b1": (rows, 2, *ones), "b2": (2, *inputs)}
    blocks, stages = rand(rows // 4, 4, 4, seed=5) / 3, rand(2, rows // 2, 2, 2, seed=6) / 2
    rescale, norm = 1 + rand(rows, seed=8) / 4, float((blocks - blocks.mT).norm())
    found = {
        "DoRA": dora(low_rank(rows, *inputs, alpha=2.0), rows),
        "DoRA per input": dora(low_rank(rows, *inputs), inputs[0], True),
        "DoRA around LoHa": dora(loha(rows, *inputs), rows),
        "DoRA around LoKr": dora(lokr(rows, *inputs), inputs[0], True),
        "(IA)3": build({"ia3_weight": rand(rows), "ia3_on_input": torch.tensor(0)}),
        "(IA)3 per input": build({"ia3_weight": rand(inputs[0]), "ia3_on_input": torch.tensor(1)}),
        "GLoRA": build({f"glora_{name}": rand(*shape, seed=len(name)) / 2 for name, shape in mix.items()}),
        "Diag-OFT": build({"oft_blocks": blocks, "rescale": rescale}),
        "Diag-OFT, constrained": build({"oft_blocks": blocks, "alpha": torch.tensor(norm / 3 / rows)}),
        "Diag-OFT, swapped": build({"oft_blocks": blocks, "rescale": rescale}).swapped,
        "BOFT": build({"oft_blocks": stages}),
        "BOFT, swapped": build({"oft_blocks": stages, "rescale": rescale}).swapped,
    }
    if math.prod(inputs[1:]) == 1:
        found["OFT"] = build({"oft_R": rand(2, 6, seed=9) / 8})
        found["OFT of one block"] = build({"oft_R": rand(1, 6, seed=9) / 8})
    return found


MODULES = {"linear": (nn.Linear(8, 12), rand(2, 5, 8)), "1x1 conv": (nn.Conv2d(8, 12, 1), rand(2, 8, 4, 4))}
for name, (module, x) in (*MODULES.items(), *CONVOLUTIONS.items()):
    shape = tuple(module.weight.shape)
    for kind, adapter in transforms(*shape).items():
        between = [Piece(low_rank(*shape, seed=3), None, 1.0, 0), Piece(adapter, None, -0.5, 1)]
        CASES[f"{kind}, {name}"] = (module, x, [*between, Piece(low_rank(*shape, seed=4), None, 0.3, 2)])
CASES["one Transform after the other"] = (
    nn.Linear(8, 12),
    rand(2, 5, 8),
    [Piece(adapter, None, (1.0, -0.5, 0.3)[n % 3], n % 3) for n, adapter in enumerate(transforms(12, 8).values())],
)
CASES["Transforms on bands"] = (
    nn.Linear(8, 24, bias=False),
    rand(2, 5, 8),
    [
        Piece(low_rank(24, 8), None, 1.0, 0),
        *(
            Piece(adapter, Band(start, 12), (-0.5, 0.3)[n % 2], 1 + n % 2)
            for n, (kind, adapter) in enumerate(transforms(12, 8).items())
            for start in ((0, 12, 6) if kind in ("DoRA", "BOFT", "OFT") else (12,))
        ),
        Piece(dora(low_rank(24, 8, seed=6), 24).narrowed(3, 6), Band(3, 6), 1.0, 0),
    ],
)
STRENGTHS = [1.0, -0.5, 0.3]


def test_what_is_small_is_never_built():
    """Else a live LoHa or LoKr would take the memory of the weights."""
    for adapter, built in (
        (loha(12, 8), False),
        (loha(12, 8, rank=4), True),
        (loha(12, 8, 3, core=True), True),
        *((lokr(12, 8, 3, form=form), False) for form in ("whole", "low rank", "core")),
        (locon(12, 8, 3), False),
    ):
        product = adapter.product()
        assert (product is None) == built


def by_entry(strengths, pieces):
    return {piece.entry: strengths[piece.entry] for piece in pieces}


def assert_near(found, exact):
    """float32 against float64: each entry is a sum of some dozens of products, each rounded at 6e-8."""
    assert (found.detach().double() - exact.detach()).norm() <= 1e-6 * exact.detach().norm()


@pytest.fixture(params=CASES)
def case(request):
    module, x, pieces = CASES[request.param]
    return module, x, pieces, Live({"m": module}, {"m": pieces})


def expected(module, x, pieces):
    """What the module gives with the update in its weight, in float64."""
    changed = type(module).__new__(type(module))
    changed.__dict__ = {**module.__dict__, "_parameters": {k: p for k, p in module._parameters.items()}}
    changed.__dict__.pop("forward", None)
    exact = module.weight.detach().double()
    add_(exact, pieces)
    changed._parameters["weight"] = nn.Parameter(exact)
    if changed._parameters.get("bias") is not None:
        changed._parameters["bias"] = nn.Parameter(module.bias.detach().double())
    return changed(x.double())


def test_live_is_the_module_with_the_update_in_its_weight(case):
    module, x, pieces, live = case
    before = module.weight.clone()
    live.set_strengths(by_entry(STRENGTHS, pieces))
    live.install()
    try:
        found = module(x)
    finally:
        live.remove()
    assert_near(found, expected(module, x, pieces))
    assert torch.equal(module.weight, before)


def pointers(term):
    if isinstance(term, Turned):
        return [*(matrix.data_ptr() for matrix in term.matrices), term.gains.data_ptr()]
    return [tensor.data_ptr() for tensor in (*term.product, term.gains) if tensor is not None]


def test_a_changed_strength_is_read_at_the_next_call_and_changes_no_tensor_but_one(case):
    module, x, pieces, live = case
    live.set_strengths(by_entry(STRENGTHS, pieces))
    live.install()
    try:
        module(x)
        terms = [pointers(term) for term in live._hooks[0].terms]
        live.set_strengths(by_entry([2.0, 0.0, -1.0], pieces))
        found = module(x)
        assert terms == [pointers(term) for term in live._hooks[0].terms]
    finally:
        live.remove()
    changed = [Piece(p.adapter, p.band, [2.0, 0.0, -1.0][p.entry] * p.factor, p.entry) for p in pieces]
    assert_near(found, expected(module, x, changed))


def test_gradients_pass_through_what_was_read_in_inference_mode(case):
    """As the host reads files. Twice: what the first pass has made is kept."""
    module, x, pieces, _ = case
    with torch.inference_mode():
        read = [replace(each, adapter=Piece.unpacked(each.packed(), torch.clone).adapter) for each in pieces]
        live = Live({"m": module}, {"m": read})
        live.set_strengths(by_entry(STRENGTHS, pieces))
    exact = x.double().requires_grad_()
    truth = expected(module, exact, pieces)
    wanted = rand(*truth.shape, seed=11)
    (true,) = torch.autograd.grad((truth * wanted).sum(), exact)
    try:
        live.install()
        for _ in range(2):
            ours = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad((module(ours) * wanted).sum(), ours)
            assert (gradient - true).norm() <= 1e-5 * true.norm()
    finally:
        live.remove()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_costs_its_rounding_and_no_more(case, dtype):
    module, x, pieces, _ = case
    module, x = copy.deepcopy(module).to(dtype), x.to(dtype)
    live = Live({"m": module}, {"m": pieces})
    live.set_strengths(by_entry(STRENGTHS, pieces))
    live.install()
    found, exact = module(x), expected(module, x, pieces)
    assert found.dtype == dtype
    # inputs, factors and sums in between are rounded, some of them larger than what comes out
    assert (found.double() - exact).norm() <= 4 * torch.finfo(dtype).eps * exact.norm()


def test_removing_leaves_nothing_behind(case):
    module, x, _, live = case
    attributes, before = set(module.__dict__), module(x)
    for _ in range(3):
        live.install()
        live.install()  # twice is once
        live.remove()
        live.remove()
    assert set(module.__dict__) == attributes and torch.equal(module(x), before)


class Bound:
    """Hooks the way the host's bypass does: it keeps the forward it found and puts it back."""

    def __init__(self, module):
        self.module, self.original = module, None

    def install(self):
        self.original = self.module.forward
        self.module.forward = self.forward

    def remove(self):
        self.module.forward = self.original

    def forward(self, x):
        return self.original(x) + 100


class Closure(Bound):
    """The same with a plain function, in which nobody can see what is below."""

    def install(self):
        self.original = original = self.module.forward
        self.module.forward = lambda x: original(x) + 100


@pytest.mark.parametrize("kind", [Bound, Closure])
@pytest.mark.parametrize("order", ["ours first", "ours last"])
@pytest.mark.parametrize("removal", ["in order", "in reverse"])
def test_another_hook_below_or_above_is_neither_lost_nor_kept(kind, order, removal):
    module = nn.Linear(8, 12)
    x = rand(2, 8)
    plain = module(x)
    live, other = Live({"m": module}, {"m": [Piece(low_rank(12, 8), None, 1.0)]}), kind(module)
    live.set_strengths(dict(enumerate([1.0])))
    live.install()
    alone = module(x)
    live.remove()
    for _ in range(3):
        hooks = [live, other] if order == "ours first" else [other, live]
        for hook in hooks:
            hook.install()
        torch.testing.assert_close(module(x), alone + 100)
        for hook in hooks if removal == "in order" else hooks[::-1]:
            hook.remove()
        assert torch.equal(module(x), plain)
        live.remove()  # once more, as the host's callback does
        assert torch.equal(module(x), plain)
        assert getattr(module.__dict__.get("forward"), "__self__", module) is module


def test_other_dtypes_and_gradients_pass_through():
    module = nn.Linear(8, 12)
    live = Live({"m": module}, {"m": [Piece(low_rank(12, 8), None, 1.0)]})
    live.set_strengths(dict(enumerate([1.0])))
    live.install()
    try:
        x = rand(2, 8).requires_grad_()
        module(x).sum().backward()
        full = merged(module.weight.detach(), [Piece(low_rank(12, 8), None, 1.0)])
        torch.testing.assert_close(x.grad, full.sum(0).expand(2, 8))
        exact = rand(2, 8) @ full.T + module.bias.detach()
        half = module.to(torch.bfloat16)(rand(2, 8).bfloat16())
        assert half.dtype == torch.bfloat16 and (half - exact).norm() < 0.02 * exact.norm()
    finally:
        live.remove()


def test_what_cannot_run_live_is_refused_with_the_remedy():
    for module in (nn.LayerNorm(8), nn.Embedding(4, 8), nn.Conv2d(8, 8, 3, groups=8)):
        with pytest.raises(TargetError, match="Use mode patch"):
            Live({"m": module}, {"m": [Piece(low_rank(8, 8), None, 1.0)]})


def test_a_changed_strength_compiles_nothing_again():
    module = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8))
    pieces = {"0": [Piece(low_rank(12, 8), None, 1.0, 0)], "1": [Piece(low_rank(8, 12), None, 1.0, 1)]}
    live = Live({"0": module[0], "1": module[1]}, pieces)
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    compiled = torch.compile(module, backend=backend)
    x = rand(2, 8)
    with torch.no_grad():
        live.set_strengths(dict(enumerate([1.0, 1.0])))
        live.install()
        compiled(x)
        first = compiled(x)
        count = len(compilations)
        live.set_strengths(dict(enumerate([0.25, -2.0])))
        second = compiled(x)
        live.remove()
        live.install()
        again = compiled(x)
        live.remove()
        plain = compiled(x)
    assert count >= 1 and len(compilations) <= count + 1  # one more without hooks
    assert not torch.equal(first, second) and torch.equal(second, again)
    torch.testing.assert_close(plain, module(x).detach())


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.Linear(8, 12), rand(2, 5, 8)),
        (nn.Conv2d(8, 12, 3), rand(2, 8, 9, 9)),
        (nn.LayerNorm(12), rand(2, 12)),
        (nn.GroupNorm(3, 12), rand(2, 12, 4, 4)),
    ],
    ids=["linear", "conv", "layer norm", "group norm"],
)
def test_a_bias_gets_its_difference_beside_its_weight_and_nothing_stays(module, x):
    bias, weight = rand(12), rand(*module.weight.shape, seed=1)
    before = dict(module.__dict__)
    pieces = {
        "m.weight": [Piece(Full(weight), None, 1.0, 0)],
        "m.bias": [Piece(Full(bias, 2.0), None, 1.0, 0), Piece(Full(bias[:4]), Band(2, 4), 1.0, 1)],
    }
    live = Live({"m.weight": module, "m.bias": module}, pieces)
    live.set_strengths({0: 0.5, 1: -0.3})
    exact = bias.double().clone()
    exact[2:6] -= 0.3 * bias[:4].double()
    plain = expected(module, x, [Piece(Full(weight), None, 0.5)])
    for _ in range(2):
        live.install()
        found = module(x)
        live.remove()
        assert_near(found, plain + exact.reshape(-1, *[1] * (x.ndim - 2 if x.ndim == 4 else 0)))
        assert module.__dict__ == before


@pytest.mark.parametrize("name", MODULES)
def test_what_is_of_outputs_turns_the_bias_too(name):
    """PEFT's (IA)³, between differences of the bias and updates of the weight."""
    module, x = MODULES[name]
    shape, factors = tuple(module.weight.shape), build({"ia3_l": 1 + rand(12, 1)})
    pieces = {
        "m.bias": [
            Piece(Full(rand(12, seed=1)), None, 1.0, 0),
            Piece(factors, None, -0.5, 1),
            Piece(Full(rand(4, seed=2)), Band(2, 4), 0.3, 2),
            Piece(factors, None, 0.3, 2),
        ],
        "m.weight": [Piece(low_rank(*shape), None, 1.0, 0), Piece(factors, None, -0.5, 1)],
    }
    exact = copy.deepcopy(module).double()
    with torch.no_grad():
        for key, there in pieces.items():
            add_(getattr(exact, key[2:]), there)
    live = Live({"m.weight": module, "m.bias": module}, pieces)
    live.set_strengths(dict(enumerate(STRENGTHS)))
    live.install()
    try:
        found = module(x)
    finally:
        live.remove()
    assert_near(found, exact(x.double()))


@pytest.mark.parametrize("name", ["m.weight", "m.bias"])
def test_a_low_rank_update_of_a_vector_is_refused(name):
    module = nn.LayerNorm(8) if name == "m.weight" else nn.Linear(8, 8)
    with pytest.raises(TargetError, match="cannot run live"):
        Live({name: module}, {name: [Piece(low_rank(8, 1), None, 1.0)]})
