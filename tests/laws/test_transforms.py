"""What holds for every adapter whose change depends on the weight in hand. A new one adds its branches to CASES."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from lora_ops.adapters import ALGEBRAS, BOFT, Adapter, DoRA, InputOFT, LowRank, Transform, add_all_, build
from lora_ops.errors import AdapterError, ShapeError
from lora_ops.landing import Piece, add_, merged
from lora_ops.lora import Band


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Case(NamedTuple):
    adapter: Adapter
    shape: tuple[int, ...]  # of its weight
    changed: Callable[[Tensor], Tensor]  # a float64 weight -> what it becomes at strength 1, written out by hand
    narrows: bool = True
    of_inputs: bool = True  # whether it knows how many there are


OUT, IN = 12, 8


def lora(*kernel: int, seed: int = 0) -> dict[str, Tensor]:
    ones = [1 for _ in kernel]
    return {"up": rand(OUT, 3, *ones, seed=seed) / 4, "down": rand(3, IN, *kernel, seed=seed + 1) / 4}


def update(factors: dict[str, Tensor]) -> Tensor:
    return torch.einsum("or,r...->o...", factors["up"].double().flatten(1), factors["down"].double())


def normed(total: Tensor, magnitude: Tensor, axis: int) -> Tensor:
    """Each slice along an axis as long as the magnitude says, in a loop."""
    slices = [
        row * (float(m) / float((row**2).sum()) ** 0.5) for row, m in zip(total.unbind(axis), magnitude, strict=True)
    ]
    return torch.stack(slices, axis)


def doras():
    for kernel in ((), (3, 3), (1, 3, 3)):
        factors, shape, ones = lora(*kernel), (OUT, IN, *kernel), [1 for _ in kernel]
        delta, m, n = update(factors), rand(OUT, seed=3).abs() + 0.5, rand(IN, seed=4).abs() + 0.5
        name = f"DoRA {len(kernel)}-D"
        outputs = lambda w, d=delta, m=m: normed(w + d, m, 0)  # noqa: E731
        inputs = lambda w, d=delta, n=n: normed(w + d, n, 1)  # noqa: E731
        yield f"{name} per output", build({**factors, "dora_scale": m.reshape(-1, 1, *ones)}), shape, outputs
        yield f"{name} per input", build({**factors, "dora_scale": n.reshape(1, -1, *ones)}), shape, inputs, False
        peft = m.reshape(1, -1, *ones) if kernel else m
        yield f"{name} PEFT", build({**factors, "magnitude": peft}), shape, outputs
    factors, m = lora(), rand(OUT, seed=3).abs()
    alpha = build({**factors, "alpha": torch.tensor(1.5), "dora_scale": m})
    yield "DoRA alpha, 1-D dora_scale", alpha, (OUT, IN), lambda w: normed(w + update(factors) / 2, m, 0)
    zeros = build({"up": torch.zeros(OUT, 3), "down": rand(3, IN), "dora_scale": m})
    yield "DoRA of nothing but a magnitude", zeros, (OUT, IN), lambda w: normed(w, m, 0)
    bf16 = {name: factor.bfloat16() for name, factor in factors.items()}
    yield "DoRA bf16", build({**bf16, "magnitude": m}), (OUT, IN), lambda w: normed(w + update(bf16), m, 0)


def gloras():
    for kernel in ((), (3,), (3, 3), (1, 3, 3)):
        ones = [1 for _ in kernel]
        a1, a2, b1 = rand(IN, 2, *ones) / 4, rand(2, IN, *ones, seed=1) / 4, rand(OUT, 2, *ones, seed=2)
        b2, bm = rand(2, IN, *kernel, seed=3), rand(2, 2, *kernel, seed=4)

        def changed(w, below, a1=a1, a2=a2, b1=b1):
            mixing = a1.double().flatten(1) @ a2.double().flatten(1)
            beside = torch.einsum("or,ri...->oi...", b1.double().flatten(1), below.double())
            return w + 1.5 * (torch.einsum("oi...,ij->oj...", w, mixing) + beside)

        new = {"glora_a1": a1, "glora_a2": a2, "glora_b1": b1, "glora_b2": b2, "alpha": torch.tensor(3.0)}
        yield f"GLoRA {len(kernel)}-D", build(new), (OUT, IN, *kernel), lambda w, f=changed, b=b2: f(w, b)
        flat = rand(2, IN, *ones, seed=6)
        core = torch.einsum("ab...,bi->ai...", bm.double(), flat.double().flatten(1))
        tucker = build({**new, "glora_b2": flat, "glora_bm": bm})
        yield f"GLoRA {len(kernel)}-D with a core", tucker, (OUT, IN, *kernel), lambda w, f=changed, b=core: f(w, b)
        if not kernel:
            old = {"glora_a1": a2, "glora_a2": a1, "glora_b1": b2, "glora_b2": b1, "alpha": torch.tensor(3.0)}
            yield "GLoRA of the first files", build(old), (OUT, IN), lambda w, f=changed, b=b2: f(w, b)


def cayley(blocks: Tensor) -> Tensor:
    """(I + Q)(I - Q)⁻¹ of one block, Q skew-symmetric."""
    skew = blocks.double() - blocks.double().T
    eye = torch.eye(len(skew), dtype=torch.float64)
    return (eye + skew) @ torch.linalg.inv(eye - skew)


def rotated(blocks: Tensor, weight: Tensor) -> Tensor:
    """Rᵀ W with R written out whole."""
    return torch.tensordot(torch.block_diag(*map(cayley, blocks)).T, weight, 1)


def butterfly(blocks: Tensor, weight: Tensor) -> Tensor:
    """R of each stage written out whole: row by row, where the block's inputs lie."""
    _, count, size, _ = blocks.shape
    for stage, there in enumerate(blocks):
        whole, apart = torch.zeros(len(weight), len(weight), dtype=torch.float64), 2**stage * size // 2
        places = [g * 2 * apart + k + half * apart for g in range(len(weight) // 2 // apart) for k in range(apart)
                  for half in (0, 1)]  # fmt: skip
        for number in range(count):
            rows = places[number * size : (number + 1) * size]
            for i, row in enumerate(rows):
                whole[row, rows] = cayley(there[number])[i]
        weight = torch.tensordot(whole, weight, 1)
    return weight


def ofts():
    blocks, stages, rescale = rand(3, 4, 4, seed=5) / 3, rand(2, 6, 2, 2, seed=6) / 2, 1 + rand(OUT, seed=8) / 4
    odd = rand(3, 4, 4, seed=5) / 3
    for kernel in ((), (3, 3), (1, 3, 3)):
        shape, column = (OUT, IN, *kernel), (OUT, 1, *(1 for _ in kernel))
        for name, factor, turn in (("Diag-OFT", blocks, rotated), ("BOFT", stages, butterfly)):
            plain = lambda w, b=factor, turn=turn: turn(b, w)  # noqa: E731
            yield f"{name} {len(kernel)}-D", build({"oft_blocks": factor}), shape, plain, False, False
            factors = {"oft_blocks": factor, "rescale": rescale.reshape(column), "alpha": torch.tensor(0.0)}
            scaled = lambda w, b=factor, turn=turn, c=column: turn(b, w) * rescale.double().reshape(c)  # noqa: E731
            yield f"{name} {len(kernel)}-D rescale", build(factors), shape, scaled, False, False
    for name, factor, turn in (("Diag-OFT", odd, rotated), ("BOFT", stages, butterfly)):
        norm = float((factor.double() - factor.double().mT).norm())
        for kind, alpha in (("constraint", norm / 4 / OUT), ("constraint that is kept anyway", norm * 4 / OUT)):
            shorter = min(1.0, alpha * OUT / norm)
            tight = lambda w, b=factor, turn=turn, q=shorter: turn(b.double() * q, w)  # noqa: E731
            factors = {"oft_blocks": factor, "alpha": torch.tensor(alpha, dtype=torch.float64)}
            yield f"{name} {kind}", build(factors), (OUT, IN), tight, False, False


def turned_inputs(vectors: Tensor, weight: Tensor, rotation: Callable[[Tensor], Tensor]) -> Tensor:
    """W Rᵀ with R written out whole, from blocks that one vector each gives the upper triangle of."""
    inputs = weight.flatten(1)
    size = next(n for n in range(1, 99) if n * (n - 1) // 2 == vectors.shape[1])
    blocks = []
    for number in range(inputs.shape[1] // size):
        numbers, skew = iter(vectors[number % len(vectors)].double()), torch.zeros(size, size, dtype=torch.float64)
        for row in range(size):
            for column in range(row + 1, size):
                skew[row, column] = next(numbers)
        blocks.append(rotation(skew - skew.T))
    return (inputs @ torch.block_diag(*blocks).T).reshape(weight.shape)


def series(q: Tensor) -> Tensor:
    return torch.eye(len(q), dtype=q.dtype) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q


def backwards(q: Tensor) -> Tensor:
    return cayley(-q / 2)


def input_ofts():
    shared, each = rand(1, 6, seed=9) / 8, rand(2, 6, seed=9) / 8
    for kernel, count in (((), 2), ((3, 3), 18)):
        vectors, shape = rand(count, 6, seed=9) / 8, (OUT, IN, *kernel)
        for name, there in (("", vectors), (" of one block", shared)):
            whole = lambda w, v=there: turned_inputs(v, w, series)  # noqa: E731
            yield f"OFT {len(kernel)}-D{name}", build({"oft_R": there}), shape, whole
    half = 0.5 / 3**0.5  # 2 √(size - 1)
    yield (
        "OFT scaled",
        build({"oft_R": each * 4, "oft_scaled": torch.tensor(True)}),
        (OUT, IN),
        lambda w: turned_inputs(each.double() * 4 * half, w, series),
    )
    exact = build({"oft_R": each, "oft_terms": torch.tensor(0.0)})
    yield "OFT exact", exact, (OUT, IN), lambda w: turned_inputs(each, w, backwards)


def ia3s():
    outputs, inputs = rand(OUT, seed=5), rand(IN, seed=5)
    for kernel in ((), (3, 3)):
        shape, ones = (OUT, IN, *kernel), [1 for _ in kernel]
        for axis, w in enumerate((outputs, inputs)):
            where = [1 if n != axis else -1 for n in range(len(shape))]
            factors = {"ia3_weight": w.reshape(1, -1, *ones) if kernel else w, "ia3_on_input": torch.tensor(axis)}
            change = lambda weight, w=w, where=where: weight * (1 + w.double()).reshape(where)  # noqa: E731
            yield f"(IA)³ {len(kernel)}-D on {('outputs', 'inputs')[axis]}", build(factors), shape, change
    peft = build({"ia3_l": 1 + inputs[None]})
    yield "(IA)³ PEFT", peft, (OUT, IN), lambda weight: weight * (1 + inputs).double()


CASES = {name: Case(*case) for name, *case in (*doras(), *ofts(), *input_ofts(), *ia3s(), *gloras())}
each_branch = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
# float32 sums of a few products: some units in the last place (6e-8) of the largest term
NEAR = {"rtol": 1e-5, "atol": 1e-5}


def test_every_algebra_is_held_to_the_laws():
    transforms = {algebra for algebra in ALGEBRAS if issubclass(algebra, Transform)} | {BOFT, DoRA}
    assert {type(case.adapter) for case in CASES.values()} == transforms


def truth(case: Case, weight: Tensor, strength: float) -> Tensor:
    weight = weight.double()
    return weight + strength * (case.changed(weight) - weight)


@each_branch
@pytest.mark.parametrize("strength", [1.0, 0.37, -2.0, 3.0])
def test_adding_in_place_is_the_exact_change_on_a_straight_line(case, strength):
    weight = rand(*case.shape, seed=7)
    changed = weight.clone()
    case.adapter.add_(changed, strength)
    torch.testing.assert_close(changed.double(), truth(case, weight, strength), **NEAR)
    assert (changed - weight).abs().max() > 0.1


@each_branch
def test_adding_in_float64_is_exact(case):
    weight = rand(*case.shape, seed=7, dtype=torch.float64)
    changed = weight.clone()
    case.adapter.add_(changed, 0.5)
    torch.testing.assert_close(changed, truth(case, weight, 0.5), rtol=1e-12, atol=1e-12)


@each_branch
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_strength_0_is_bit_identical_to_none(case, dtype):
    weight = rand(*case.shape, seed=7, dtype=dtype)
    changed = weight.clone()
    case.adapter.add_(changed, 0.0)
    assert torch.equal(changed, weight)


@each_branch
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once_at_the_end(case, dtype):
    """As where the host patches per forward: norms and inverses in half precision would be percents wrong."""
    weight = rand(*case.shape, seed=7, dtype=dtype)
    changed = weight.clone()
    case.adapter.add_(changed, 0.8)
    exact = truth(case, weight, 0.8)
    rounded = exact.to(dtype).double()
    near = 0.01 * torch.finfo(dtype).eps * exact.abs() + 1e-6
    assert ((changed.double() - exact).abs() <= (rounded - exact).abs() + near).all()


@each_branch
def test_adding_works_on_memory_that_is_no_matrix(case):
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(case.shape))
    weight = rand(*case.shape, seed=7)
    weight = weight.to(memory_format=last) if last else weight.movedim(0, -1).contiguous().movedim(-1, 0)
    changed = weight.clone(memory_format=torch.preserve_format)
    case.adapter.add_(changed, 0.5)
    torch.testing.assert_close(changed.double(), truth(case, weight, 0.5), **NEAR)


@each_branch
def test_swapping_is_the_same_change_of_swapped_halves(case):
    weight = rand(*case.shape, seed=7, dtype=torch.float64)
    exact, swapped = truth(case, weight, 1.0), torch.cat(weight.chunk(2)[::-1])
    case.adapter.swapped.add_(swapped, 1.0)
    torch.testing.assert_close(torch.cat(swapped.chunk(2)[::-1]), exact, rtol=1e-12, atol=1e-12)
    assert case.adapter.swapped is case.adapter.swapped


@each_branch
def test_narrowing_is_the_same_change_of_these_rows_or_refused(case):
    weight = rand(*case.shape, seed=7, dtype=torch.float64)
    if not case.narrows:
        with pytest.raises(AdapterError, match="cannot be cut") as caught:
            case.adapter.narrowed(3, 5)
        assert caught.value.remedy
        return
    narrow, rows = case.adapter.narrowed(3, 5), weight[3:8].clone()
    narrow.add_(rows, 0.7)
    torch.testing.assert_close(rows, truth(case, weight, 0.7)[3:8], rtol=1e-12, atol=1e-12)
    assert case.adapter.narrowed(3, 5) is narrow


@each_branch
def test_no_factors_make_it_half_as_strong(case):
    with pytest.raises(AdapterError, match="cannot be scaled") as caught:
        case.adapter.scaled(torch.tensor([0.5], dtype=torch.float64))
    assert "Apply LoRA" in caught.value.remedy


@each_branch
def test_packing_loses_nothing(case):
    piece = Piece(case.adapter, Band(0, case.shape[0]), 0.7)
    again = Piece.unpacked(piece.packed(), lambda tensor: tensor)
    weight = rand(*case.shape, seed=7)
    assert torch.equal(merged(weight, [again]), merged(weight, [piece]))


@each_branch
def test_inputs_are_never_changed(case):
    def tensors(value):
        if isinstance(value, tuple):
            return [tensor for each in value for tensor in tensors(each)]
        return [value] if isinstance(value, Tensor) else []

    before = [tensor.clone() for tensor in tensors(case.adapter.packed())]
    weight = rand(*case.shape)
    merged(weight, [Piece(case.adapter, None, 0.5)] * 2)
    assert torch.equal(weight, rand(*case.shape)) and before
    assert all(map(torch.equal, before, tensors(case.adapter.packed())))


@each_branch
def test_a_weight_of_another_shape_is_refused_without_multiplying(case):
    shape = case.shape
    case.adapter.require_fit(shape)
    outputs = not isinstance(case.adapter, InputOFT) and getattr(case.adapter, "on_input", False) is False
    inputs = getattr(case.adapter, "on_input", case.of_inputs) and not (
        isinstance(case.adapter, InputOFT) and len(case.adapter.vectors) == 1
    )
    wrong = [(shape[0] * 2, *shape[1:])] * outputs + [(shape[0], shape[1] * 2, *shape[2:])] * inputs
    for other in (*wrong, (shape[0] + 1, shape[1] + 1, *shape[2:]), (shape[1] + 2, shape[0] + 2, *shape[2:])):
        with pytest.raises(ShapeError):
            case.adapter.require_fit(other)


@each_branch
@pytest.mark.parametrize("order", ["before", "after", "around"])
def test_a_stack_is_applied_in_its_order(case, order):
    """LoRAs before it change the weight that it sees, those after it do not, also where they are on a band."""
    others = [LowRank(lora(*case.shape[2:], seed=s)["up"], lora(*case.shape[2:], seed=s)["down"]) for s in (20, 30, 40)]
    plain = [Piece(other, None, 1.5) for other in others]
    if order == "around":
        for number in (0, 2):  # one band before and after it
            plain[number] = Piece(others[number].narrowed(2, 4), Band(2, 4), 1.5)
    mine, at = Piece(case.adapter, None, 0.6), {"before": 0, "after": 3, "around": 1}[order]
    stack = [*plain[:at], mine, *plain[at:]]
    weight = rand(*case.shape, seed=7)
    exact = weight.double()
    for piece in stack:
        if piece is mine:
            exact = truth(case, exact, 0.6)
        else:
            assert isinstance(piece.adapter, LowRank)
            rows = exact if piece.band is None else exact[piece.band.start : piece.band.end]
            rows += 1.5 * update({"up": piece.adapter.up, "down": piece.adapter.down})
    torch.testing.assert_close(merged(weight, stack).double(), exact, **NEAR)
    turned = merged(weight, stack[::-1]).double()
    assert (turned - exact).abs().max() > 1e-2


def test_a_strength_of_the_host_multiplies_each_piece():
    case = CASES["DoRA 0-D per output"]
    weight = rand(*case.shape, seed=7)
    changed = weight.clone()
    add_(changed, [Piece(case.adapter, None, 0.8)], 0.5)
    torch.testing.assert_close(changed.double(), truth(case, weight, 0.4), **NEAR)


def test_neighbours_are_not_joined_across_one_whose_order_counts():
    dora, plain = CASES["DoRA 0-D per output"].adapter, build(lora())
    terms = [(plain, 1.0), (plain, 1.0), (dora, 1.0), (plain, 1.0), (plain, 1.0)]
    together = rand(OUT, IN, seed=7, dtype=torch.float64)
    one_by_one, last = together.clone(), together.clone()
    add_all_(together, terms)
    for adapter, strength in terms:
        adapter.add_(one_by_one, strength)
    torch.testing.assert_close(together, one_by_one, rtol=1e-12, atol=1e-12)
    add_all_(last, sorted(terms, key=lambda term: term[0] is dora))
    assert (last - together).norm() > 1e-3 * together.norm()


def test_a_row_of_zeros_stays_zero():
    adapter = build({"up": torch.zeros(OUT, 3), "down": rand(3, IN), "magnitude": torch.ones(OUT)})
    weight = rand(OUT, IN)
    weight[4] = 0
    result = merged(weight, [Piece(adapter, None, 1.0)])
    assert not result[4].any() and result.isfinite().all()


def test_the_first_files_of_glora_are_told_on_square_weights():
    """There the shapes of each pair are those of the other way round, at a rank as large as the weight."""
    a, b = (rand(IN, 2), rand(2, IN, seed=1)), (rand(IN, 2, seed=2), rand(2, IN, seed=3))
    new = build({"glora_a1": a[0], "glora_a2": a[1], "glora_b1": b[0], "glora_b2": b[1]})
    old = build({"glora_a1": a[1], "glora_a2": a[0], "glora_b1": b[1], "glora_b2": b[0]})
    weight = rand(IN, IN, seed=7)
    results = [merged(weight, [Piece(adapter, None, 1.0)]) for adapter in (new, old)]
    torch.testing.assert_close(results[0], weight + weight @ a[0] @ a[1] + b[0] @ b[1])
    assert torch.equal(*results)


def test_neighbours_on_other_rows_keep_their_order_too():
    case = CASES["DoRA 0-D per output"]
    mine = Piece(case.adapter, None, 0.6)
    on_rows = Piece(case.adapter.narrowed(2, 4), Band(2, 4), 0.9)
    weight = rand(*case.shape, seed=7)
    exact = weight.double()
    for piece in (on_rows, mine, on_rows):
        rows = slice(0, OUT) if piece is mine else slice(2, 6)
        exact[rows] = truth(case, exact, piece.strength)[rows]
    torch.testing.assert_close(merged(weight, [on_rows, mine, on_rows]).double(), exact, **NEAR)
