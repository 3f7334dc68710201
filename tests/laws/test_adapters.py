"""What holds for every adapter that adds a ΔW. A new algebra adds its branches to CASES."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from lora_ops.adapters import ALGEBRAS, Additive, Full, LowRank, add_all_, build
from lora_ops.adapters import lora as lora_module
from lora_ops.errors import AdapterError, ShapeError


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def lora(*, seed: int = 0, alpha: float | None = None, dtype: torch.dtype = torch.float32) -> LowRank:
    return LowRank(rand(12, 3, seed=seed, dtype=dtype), rand(3, 8, seed=seed + 1, dtype=dtype), alpha)


# name of the branch -> (adapter, shape of its weight, ΔW in float64 written out by hand)
def cases():
    linear = lora()
    yield "LoRA linear", linear, (12, 8), linear.up.double() @ linear.down.double()
    scaled = lora(alpha=1.5)
    yield "LoRA alpha", scaled, (12, 8), 0.5 * scaled.up.double() @ scaled.down.double()
    zero = lora(alpha=0.0)
    yield "LoRA alpha 0 means rank", zero, (12, 8), zero.up.double() @ zero.down.double()
    half = lora(alpha=6.0, dtype=torch.bfloat16)
    yield "LoRA bf16", half, (12, 8), 2 * half.up.double() @ half.down.double()
    conv = LowRank(rand(12, 3, 1, 1), rand(3, 8, 3, 3, seed=1), 3.0)
    kernel = torch.einsum("or,rikl->oikl", conv.up.double()[:, :, 0, 0], conv.down.double())
    yield "LoRA conv", conv, (12, 8, 3, 3), kernel
    flattened = LowRank(rand(12, 3), conv.down.flatten(1), 3.0)
    yield "LoRA conv with a flat kernel", flattened, (12, 8, 3, 3), kernel
    point = LowRank(rand(12, 3), rand(3, 8, seed=1), None)
    yield "LoRA matrix on a 1x1 conv", point, (12, 8, 1, 1), (point.up.double() @ point.down.double())[..., None, None]
    flat = LowRank(rand(12, 3, 1, 1), rand(3, 8, 1, 1, seed=1), None)
    yield "LoRA 1x1 conv on a linear", flat, (12, 8), flat.up.flatten(1).double() @ flat.down.flatten(1).double()
    video = LowRank(rand(12, 3, 1, 1, 1), rand(3, 8, 1, 3, 3, seed=1), None)
    clip = torch.einsum("or,ritkl->oitkl", video.up.double()[:, :, 0, 0, 0], video.down.double())
    yield "LoRA conv3d", video, (12, 8, 1, 3, 3), clip
    yield from fulls()
    yield from tuckers()
    yield from lohas()
    yield from lokrs()


KERNELS = {"linear": (), "conv1d": (3,), "conv2d": (3, 2), "conv3d": (2, 3, 2)}


def tuckers():
    for kind, kernel in KERNELS.items():
        ones = [1 for _ in kernel]
        factors = {"up": rand(12, 3, *ones), "down": rand(3, 8, *ones, seed=1), "mid": rand(3, 3, *kernel, seed=2)}
        up, down, mid = (factor.double() for factor in factors.values())
        exact = torch.einsum("oa,ab...,bi->oi...", up.flatten(1), mid, down.flatten(1)) / 2
        yield f"LoRA Tucker {kind}", build({**factors, "alpha": torch.tensor(1.5)}), (12, 8, *kernel), exact


def lohas():
    for kind, kernel in KERNELS.items():
        columns = 8 * math.prod(kernel)
        shapes = {"w1_a": (12, 2), "w1_b": (2, columns), "w2_a": (12, 2), "w2_b": (2, columns)}
        factors = {f"hada_{n}": rand(*shape, seed=i) for i, (n, shape) in enumerate(shapes.items())}
        a1, b1, a2, b2 = (factor.double() for factor in factors.values())
        exact = ((a1 @ b1) * (a2 @ b2)).reshape(12, 8, *kernel)
        yield f"LoHa {kind}", build(factors), (12, 8, *kernel), exact
        shapes = {"w1_a": (12, 9), "w1_b": (9, columns), "w2_a": (12, 9), "w2_b": (9, columns)}
        factors = {f"hada_{n}": rand(*shape, seed=i) / 3 for i, (n, shape) in enumerate(shapes.items())}
        a1, b1, a2, b2 = (factor.double() for factor in factors.values())
        exact = ((a1 @ b1) * (a2 @ b2)).reshape(12, 8, *kernel)
        yield f"LoHa {kind} of a rank above most", build(factors), (12, 8, *kernel), exact
        shapes = {"w1_a": (2, 12), "w1_b": (2, 8), "w2_a": (2, 12), "w2_b": (2, 8)}
        cores = {"t1": (2, 2, *kernel), "t2": (2, 2, *kernel)}
        factors = {f"hada_{n}": rand(*shape, seed=i) for i, (n, shape) in enumerate({**shapes, **cores}.items())}
        a1, b1, a2, b2, t1, t2 = (factor.double() for factor in factors.values())
        halves = [torch.einsum("ao,ab...,bi->oi...", a, t, b) for a, t, b in ((a1, t1, b1), (a2, t2, b2))]
        exact = 1.5 * halves[0] * halves[1]
        yield f"LoHa Tucker {kind}", build({**factors, "alpha": torch.tensor(3.0)}), (12, 8, *kernel), exact


def kron(w1, w2):
    """Block (i, j) is w1[i, j] · w2."""
    return torch.cat([torch.cat([x * w2 for x in row], dim=1) for row in w1])


def lokrs():
    """12 rows are 3 blocks of 4, 8 inputs 2 blocks of 4."""
    for kind, kernel in KERNELS.items():
        rank, columns = 2, 4 * math.prod(kernel)
        w1, w1_a, w1_b = rand(3, 2), rand(3, rank, seed=1), rand(rank, 2, seed=2)
        w2, w2_a, w2_b = rand(4, 4, *kernel, seed=3), rand(4, rank, seed=4), rand(rank, columns, seed=5)
        t1, t2 = rand(rank, rank, *(1 for _ in kernel), seed=6), rand(rank, rank, *kernel, seed=7)
        inner, outer = rand(rank, 4, seed=8), rand(rank, 3, seed=9)  # Tucker factors have the rank first
        low, core = (
            w1_a.double() @ w1_b.double(),
            torch.einsum("ao,ab,bi->oi", outer.double(), t1.double().flatten(1).reshape(rank, rank), w1_b.double()),
        )
        lows = {
            "whole": ({"lokr_w1": w1}, w1.double()),
            "low rank": ({"lokr_w1_a": w1_a, "lokr_w1_b": w1_b}, low),
            "Tucker": ({"lokr_w1_a": outer, "lokr_w1_b": w1_b, "lokr_t1": t1}, core),
        }
        product = (w2_a.double() @ w2_b.double()).reshape(4, 4, *kernel)
        tucker = torch.einsum("ao,ab...,bi->oi...", inner.double(), t2.double(), rand(rank, 4, seed=5).double())
        kernels = {
            "whole": ({"lokr_w2": w2}, w2.double()),
            "low rank": ({"lokr_w2_a": w2_a, "lokr_w2_b": w2_b}, product),
            "low rank with a kernel": ({"lokr_w2_a": w2_a, "lokr_w2_b": w2_b.reshape(rank, 4, *kernel)}, product),
            "Tucker": ({"lokr_w2_a": inner, "lokr_w2_b": rand(rank, 4, seed=5), "lokr_t2": t2}, tucker),
        }
        for first, (left, one) in lows.items():
            for second, (right, other) in kernels.items():
                scale = 1.0 if first == second == "whole" else 2.5
                made = build({**left, **right, "alpha": torch.tensor(5.0)})
                yield f"LoKr {kind}, {first} and {second}", made, (12, 8, *kernel), scale * kron(one, other)


def fulls():
    matrix = Full(rand(12, 8))
    yield "full linear", matrix, (12, 8), matrix.diff.double()
    kernels = Full(rand(12, 8, 3, 3))
    yield "full conv", kernels, (12, 8, 3, 3), kernels.diff.double()
    pointed = Full(rand(12, 8, 1, 1))
    yield "full 1x1 conv on a linear", pointed, (12, 8), pointed.diff.double().flatten(1)
    norm = Full(rand(12))
    yield "full norm", norm, (12,), norm.diff.double()
    bias = Full(rand(12, dtype=torch.bfloat16), 1.5)
    yield "full bias of a LoRA", bias, (12,), 1.5 * bias.diff.double()


CASES = {name: case for name, *case in cases()}
each_branch = pytest.mark.parametrize("name", CASES)
# float32 sums of a few products: some units in the last place (6e-8) of the largest term
NEAR = {"rtol": 1e-5, "atol": 1e-5}


def test_every_algebra_is_held_to_the_laws():
    additive = {algebra for algebra in ALGEBRAS if issubclass(algebra, Additive)}
    assert {type(adapter) for adapter, _, _ in CASES.values()} == additive


@each_branch
def test_delta_is_the_formula(name):
    adapter, shape, exact = CASES[name]
    torch.testing.assert_close(adapter.delta(shape).double(), exact, **NEAR)
    torch.testing.assert_close(adapter.delta(shape, torch.float64), exact, rtol=1e-12, atol=1e-12)


@each_branch
@pytest.mark.parametrize("strength", [1.0, 0.37, -2.0])
def test_adding_in_place_is_adding_the_delta(name, strength):
    adapter, shape, exact = CASES[name]
    weight = rand(*shape, seed=7)
    changed = weight.clone()
    adapter.add_(changed, strength)
    torch.testing.assert_close(changed.double(), weight.double() + strength * exact, **NEAR)


@each_branch
def test_adding_works_on_memory_that_is_no_matrix(name):
    adapter, shape, exact = CASES[name]
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shape))
    weight = rand(*shape, seed=7)
    weight = weight.to(memory_format=last) if last else weight.movedim(0, -1).contiguous().movedim(-1, 0)
    changed = weight.clone(memory_format=torch.preserve_format)
    adapter.add_(changed, 0.5)
    torch.testing.assert_close(changed.double(), weight.double() + 0.5 * exact, **NEAR)


@each_branch
def test_energy_is_the_squared_norm_of_the_delta(name):
    adapter, _, exact = CASES[name]
    assert adapter.energy() == pytest.approx(float((exact**2).sum()), rel=1e-5)  # float32 Gram matrices


@each_branch
def test_swapping_exchanges_the_halves_of_the_rows(name):
    adapter, shape, exact = CASES[name]
    swapped = torch.cat((exact[6:], exact[:6]))
    torch.testing.assert_close(adapter.swapped.delta(shape, torch.float64), swapped, rtol=1e-12, atol=1e-12)


@each_branch
def test_narrowing_takes_rows_of_the_delta(name):
    adapter, shape, exact = CASES[name]
    narrow = adapter.narrowed(3, 5)
    torch.testing.assert_close(narrow.delta((5, *shape[1:]), torch.float64), exact[3:8], rtol=1e-12, atol=1e-12)
    assert adapter.narrowed(3, 5) is narrow and adapter.narrowed(3, 4) is not narrow


@each_branch
@pytest.mark.parametrize("factors", [[0.7], [2.0], [0.0] * 4 + [0.3] * 8], ids=["all", "power of two", "by rows"])
def test_scaled_factors_make_rows_so_many_times_as_large(name, factors):
    adapter, shape, exact = CASES[name]
    rows = torch.tensor(factors, dtype=torch.float64)
    changed = adapter.scaled(rows)
    delta = replace(adapter, **changed).delta(shape, torch.float64)
    expected = exact * rows.reshape(-1, *(1 for _ in shape[1:]))
    # the factors are rounded once, to float32 at the least; nothing is rounded where they can hold the product
    bound = 0 if factors == [2.0] else 2**-23 * float(exact.abs().max()) * 4
    torch.testing.assert_close(delta, expected, rtol=1e-12, atol=1e-12 + bound)
    kept = {getattr(adapter, name).dtype == tensor.dtype for name, tensor in changed.items()}
    # bfloat16 cannot hold 0.7 · x; the two that have it hold the double
    assert kept == {True} or (adapter.packed()[0].dtype == torch.bfloat16 and factors != [2.0])


def test_factors_too_large_to_be_held_are_refused():
    with pytest.raises(AdapterError, match="infinities"):
        lora().scaled(torch.tensor([1e300], dtype=torch.float64))


@each_branch
def test_packing_loses_nothing(name):
    adapter, shape, _ = CASES[name]
    again = type(adapter).unpacked(adapter.packed())
    assert torch.equal(again.delta(shape), adapter.delta(shape))


@each_branch
@pytest.mark.parametrize("block", [lora_module.BLOCK, 7])
def test_terms_together_have_the_same_sum(name, block, monkeypatch):
    monkeypatch.setattr(lora_module, "BLOCK", block)
    adapter, shape, exact = CASES[name]
    weight = rand(*shape, seed=7, dtype=torch.float64)
    changed = weight.clone()
    add_all_(changed, [(adapter, 0.8), (adapter, -0.3), (adapter, 1.0)])
    torch.testing.assert_close(changed, weight + 1.5 * exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_loras_of_different_types_add_up_and_stay_as_they_were(dtype):
    """Of one type, and beside one of another."""
    mine = [LowRank(rand(6, 2, seed=n).to(dtype), rand(2, 5, seed=n + 9).to(dtype), 1.0) for n in range(2)]
    other = LowRank(rand(6, 3), rand(3, 5), None)
    for adapters in (mine[:1], mine, [*mine, other]):
        kept = [(each.up.clone(), each.down.clone()) for each in adapters]
        exact = sum(0.3 * each.scale * (each.up.double() @ each.down.double()) for each in adapters)
        changed = torch.zeros(6, 5, dtype=torch.float64)
        add_all_(changed, [(each, 0.3) for each in adapters])
        torch.testing.assert_close(changed, exact, rtol=1e-12, atol=1e-12)
        for each, (up, down) in zip(adapters, kept, strict=True):
            assert torch.equal(each.up.double(), up.double()) and torch.equal(each.down.double(), down.double())


@each_branch
def test_inputs_are_never_changed(name):
    adapter, shape, _ = CASES[name]
    before = [value.clone() if isinstance(value, torch.Tensor) else value for value in adapter.packed()]
    for dtype in (torch.float32, torch.float64):
        adapter.add_(rand(*shape, dtype=dtype), 0.5)
        add_all_(rand(*shape, dtype=dtype), [(adapter, 2.0), (adapter, 3.0)])
    assert adapter.swapped is adapter.swapped
    for old, new in zip(before, adapter.packed(), strict=True):
        assert torch.equal(old, new) if isinstance(old, torch.Tensor) else old == new


@each_branch
def test_a_weight_of_another_shape_is_refused_without_multiplying(name):
    adapter, shape, _ = CASES[name]
    adapter.require_fit(shape)
    wrong = [(shape[0] + 1, *shape[1:])]
    if len(shape) == 1:
        wrong += [(shape[0] // 2, 2), (shape[0], 1)]
    else:  # transposed; with the same number of elements; with another kernel
        wrong += [(shape[0], shape[1] + 1, *shape[2:]), (shape[1], shape[0], *shape[2:])]
        wrong += [(shape[0] * 2, shape[1] // 2, *shape[2:]), (*shape[:2], 5, 5)]
    for other in wrong:
        with pytest.raises(ShapeError):
            adapter.require_fit(other)


def test_factors_of_a_kronecker_product_scale_only_the_rows_they_can():
    adapter = build({"lokr_w1": rand(3, 2), "lokr_w2": rand(4, 4)})
    within = torch.tensor([1.0, 0.5, 1.0, 2.0] * 3, dtype=torch.float64)
    delta = replace(adapter, **adapter.scaled(within)).delta((12, 8))
    torch.testing.assert_close(delta, adapter.delta((12, 8)) * within.float()[:, None])
    for rows in ([1.0] * 2 + [0.5] * 10, [1.0] * 11 + [0.0]):
        with pytest.raises(AdapterError, match="cannot be scaled by these rows"):
            adapter.scaled(torch.tensor(rows, dtype=torch.float64))


def test_rows_of_rows_of_a_kronecker_product():
    adapter = build({"lokr_w1": rand(3, 2), "lokr_w2": rand(4, 4)})
    whole, cut = adapter.delta((12, 8)), adapter.swapped.narrowed(2, 9)
    exact = torch.cat((whole[6:], whole[:6]))[2:11]
    torch.testing.assert_close(cut.delta((9, 8)), exact)
    torch.testing.assert_close(cut.narrowed(3, 5).delta((5, 8)), exact[3:8])
    assert cut.energy() == pytest.approx(float((exact**2).sum()), rel=1e-5)


def test_whole_factors_of_a_kronecker_product_have_scale_1_whatever_alpha_says():
    whole = {"lokr_w1": rand(3, 2), "lokr_w2": rand(4, 4), "alpha": torch.tensor(7.0)}
    assert build(whole).scale == 1
    parts = {"lokr_w1": rand(3, 2), "lokr_w2_a": rand(4, 2), "lokr_w2_b": rand(2, 4), "alpha": torch.tensor(7.0)}
    assert build(parts).scale == 3.5 and build(parts).rank == 2


@pytest.mark.parametrize("kernel", [(3, 1), (1, 3)])
def test_a_kernel_is_not_turned(kernel):
    """PEFT writes the Tucker core of a Conv1d with a kernel (3, 1): that is no (1, 3)."""
    adapter = build({"up": rand(12, 3), "down": rand(3, 8), "mid": rand(3, 3, 3, 1)})
    adapter.require_fit((12, 8, 3))
    if kernel == (3, 1):
        return adapter.require_fit((12, 8, *kernel))
    with pytest.raises(ShapeError):
        adapter.require_fit((12, 8, *kernel))


def test_a_zero_start_changes_no_bit():
    adapter = LowRank(torch.zeros(12, 3), rand(3, 8))
    weight = rand(12, 8)
    changed = weight.clone()
    adapter.add_(changed, 0.7)
    assert torch.equal(changed, weight) and adapter.idle and not lora().idle


def loha_refusals():
    a, b = {"hada_w1_a": rand(4, 2), "hada_w2_a": rand(4, 2)}, {"hada_w1_b": rand(2, 6), "hada_w2_b": rand(2, 6)}
    turned, cores = {"hada_w1_a": rand(2, 4), "hada_w2_a": rand(2, 4)}, {"hada_t1": rand(2, 2, 3)}
    yield a, AdapterError, "lacks its hada_w1_b, hada_w2_b"
    yield {**a, **b, **cores}, AdapterError, "lacks its hada_t2"
    yield {**a, **b, "hada_w1_b": rand(3, 6)}, ShapeError, "different shapes"
    yield {**a, **b, "hada_w1_a": rand(5, 2)}, ShapeError, "different shapes"
    yield {**a, "hada_w1_b": rand(3, 6), "hada_w2_b": rand(3, 6)}, ShapeError, "do not share one rank"
    yield {**turned, **b}, ShapeError, "do not share one rank"
    yield {**turned, **b, "hada_t1": rand(2, 2, 3), "hada_t2": rand(2, 2, 5)}, ShapeError, "cores do not fit"
    yield {**turned, **b, "hada_t1": rand(2, 3, 3), "hada_t2": rand(2, 3, 3)}, ShapeError, "cores do not fit"
    yield {**a, **b, "hada_w1_a": rand(4, 2).int()}, AdapterError, "not a float type"
    yield {**a, **b, "hada_w1_a": rand(4)}, ShapeError, "no matrix"
    yield {**a, **b, "alpha": rand(2)}, ShapeError, "alpha has the shape"


def lokr_refusals():
    parts = {"lokr_w2_a": rand(4, 2), "lokr_w2_b": rand(2, 4)}
    yield {"lokr_w1": rand(2, 2)}, AdapterError, "lacks its lokr_w2"
    yield {"lokr_w1": rand(2, 2), "lokr_w2_b": rand(2, 4)}, AdapterError, "lacks its lokr_w2_a"
    yield {"lokr_w2": rand(2, 2), "lokr_w1_a": rand(2, 4)}, AdapterError, "lacks its lokr_w1_b"
    yield {"lokr_w1": rand(2, 2), "lokr_t2": rand(2, 2, 3)}, AdapterError, "lacks its lokr_w2"
    yield {"lokr_w1": rand(2, 2), "lokr_w2": rand(4, 4), **parts}, AdapterError, "lokr_w2 whole and in parts"
    yield {"lokr_w1": rand(2, 2), "lokr_w2": rand(4, 4), "lokr_t2": rand(2, 2, 3)}, AdapterError, "whole and in parts"
    yield {"lokr_w1": rand(2, 2), "lokr_w2_a": rand(4, 3), "lokr_w2_b": rand(2, 4)}, ShapeError, "share no rank"
    yield {"lokr_w1": rand(2, 2), **parts, "lokr_t2": rand(2, 2, 3)}, ShapeError, "do not share one rank"
    yield {"lokr_w1_a": rand(4, 3), "lokr_w1_b": rand(3, 4), **parts}, ShapeError, "ranks 3 and 2"
    yield {"lokr_w1": rand(2, 2, 3, 3), "lokr_w2": rand(4, 4)}, ShapeError, "a kernel belongs in the second"
    yield {"lokr_w1": rand(2, 2), "lokr_w2": rand(4, 4).int()}, AdapterError, "not a float type"
    yield {"lokr_w1": rand(2), "lokr_w2": rand(4, 4)}, ShapeError, "no matrix"


def glora_refusals():
    shapes = {"a1": (6, 2), "a2": (2, 6), "b1": (4, 2), "b2": (2, 6)}
    good = {f"glora_{name}": rand(*shape) for name, shape in shapes.items()}
    yield {**good, "glora_b1": rand(4, 3)}, ShapeError, "do not share one rank"
    yield {**good, "glora_a1": rand(5, 2)}, ShapeError, "do not fit each other"
    yield {**good, "glora_b1": rand(4, 2, 3)}, ShapeError, "do not fit each other"
    yield {**good, "glora_bm": rand(2, 3, 3)}, ShapeError, "no core"
    yield {**good, "glora_b2": rand(2, 6, 3), "glora_bm": rand(2, 2, 3)}, ShapeError, "no core"
    yield {**good, "glora_a1": rand(6, 2).int()}, AdapterError, "not a float type"
    yield {name: factor for name, factor in good.items() if name != "glora_b1"}, AdapterError, "lacks its glora_b1"


@pytest.mark.parametrize(
    ("factors", "error", "words"),
    [
        ({"up": rand(4, 2)}, AdapterError, "lacks its down"),
        ({"alpha": torch.tensor(1.0)}, AdapterError, "lacks its down, up"),
        ({"up": rand(4, 2), "down": rand(3, 4)}, ShapeError, "do not share one rank"),
        ({"up": rand(4, 2, 3, 3), "down": rand(2, 4, 3, 3)}, ShapeError, "do not share one rank"),
        ({"up": rand(4), "down": rand(4)}, ShapeError, "no matrix"),
        ({"up": rand(4, 0), "down": rand(0, 4)}, ShapeError, "no matrix"),
        ({"up": rand(4, 2), "down": rand(2, 4).int()}, AdapterError, "not a float type"),
        ({"up": rand(4, 2), "down": rand(2, 4), "alpha": rand(2)}, ShapeError, "alpha has the shape"),
        ({"magnitude": rand(4)}, AdapterError, "lacks its down, up"),
        ({"up": rand(4, 2), "down": rand(2, 4), "magnitude": rand(2, 2)}, ShapeError, "no vector"),
        ({"up": rand(4, 2), "down": rand(2, 4), "dora_scale": rand(4).int()}, AdapterError, "not a float type"),
        (
            {"up": rand(4, 2), "down": rand(2, 4), "magnitude": rand(4), "dora_scale": rand(4)},
            AdapterError,
            "dora_scale and magnitude around LoRA",
        ),
        ({"up": rand(4, 2), "down": rand(2, 4), "mid": rand(3, 2, 3, 3)}, ShapeError, "mid .* is no core"),
        ({"up": rand(4, 2), "down": rand(2, 4, 3, 3), "mid": rand(2, 2, 3, 3)}, ShapeError, "is no core"),
        ({"up": rand(4, 2), "down": rand(2, 4), "reshape_weight": rand(2)}, AdapterError, "which no strength scales"),
        ({"oft_diag": rand(4, 2, 2)}, AdapterError, "no algebra of this version"),
        *loha_refusals(),
        *lokr_refusals(),
        *glora_refusals(),
        (
            {"up": rand(4, 2), "down": rand(2, 4), "diff": rand(4, 4)},
            AdapterError,
            "has diff, down, up: they are no one",
        ),
        ({"diff": rand(4, 0)}, ShapeError, "which no weight has"),
        ({"diff": torch.tensor(1.0)}, ShapeError, "which no weight has"),
        ({"diff": rand(4).int()}, AdapterError, "not a float type"),
    ],
)
def test_factors_that_make_no_adapter_are_refused(factors, error, words):
    with pytest.raises(error, match=words):
        build(factors)
