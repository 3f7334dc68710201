"""LoHa, LoKr, GLoRA and Tucker cores: equal to the host where it is right, and how it is wrong where it is not."""

from __future__ import annotations

import pytest
import torch

from harness.inside import patched_weights, run

LINEAR = "middle_block.1.transformer_blocks.0.attn1.to_q"  # of SD1.5's small model
CONV = "middle_block.0.in_layers.2"


@pytest.fixture(scope="module")
def model(models):
    return models["sd15"]


@pytest.fixture(scope="module")
def plain(model):
    """What the model gives without any LoRA."""
    return run(model)


def weight_of(model, name):
    return model.model.state_dict()[f"diffusion_model.{name}.weight"]


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def file(name, shapes, alpha=3.0):
    module = "lora_unet_" + name.replace(".", "_")
    tensors = {f"{module}.{factor}": rand(*shape, seed=seed) for seed, (factor, shape) in enumerate(shapes.items())}
    return tensors if alpha is None else tensors | {f"{module}.alpha": torch.tensor(alpha)}


def loha(weight, core=False, rank=4):
    rows, columns = len(weight), weight[0].numel()
    a, b = ((rank, rows), (rank, weight.shape[1])) if core else ((rows, rank), (rank, columns))
    shapes = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b}
    return shapes | (dict.fromkeys(("hada_t1", "hada_t2"), (rank, rank, *weight.shape[2:])) if core else {})


def lokr(weight, form, both=False, rank=4):
    rows, inputs, kernel = len(weight) // 4, weight.shape[1] // 8, weight.shape[2:]
    first = {"lokr_w1_a": (4, rank), "lokr_w1_b": (rank, 8)} if both else {"lokr_w1": (4, 8)}
    return (
        first
        | {
            "whole": {"lokr_w2": (rows, inputs, *kernel)},
            "low rank": {"lokr_w2_a": (rows, rank), "lokr_w2_b": (rank, inputs * kernel.numel())},
            "core": {"lokr_w2_a": (rank, rows), "lokr_w2_b": (rank, inputs), "lokr_t2": (rank, rank, *kernel)},
        }[form]
    )


def glora(weight, core=False, rank=4):
    rows, inputs, *kernel = weight.shape
    ones = [1] * len(kernel)
    shapes = {"a1.weight": (inputs, rank, *ones), "a2.weight": (rank, inputs, *ones), "b1.weight": (rows, rank, *ones)}
    below = {"b2.weight": (rank, inputs, *ones), "bm.weight": (rank, rank, *kernel)} if core else {}
    return shapes | (below or {"b2.weight": (rank, inputs, *kernel)})


def locon(weight, rank=4):
    rows, inputs, *kernel = weight.shape
    ones = [1] * len(kernel)
    up, down = (rows, rank, *ones), (rank, inputs, *ones)
    return {"lora_up.weight": up, "lora_down.weight": down, "lora_mid.weight": (rank, rank, *kernel)}


def both(model, apply, tensors, name, strength):
    """The change of a weight by the host's patch and by ours."""
    import comfy.sd

    weight, key = weight_of(model, name), f"diffusion_model.{name}.weight"
    theirs = patched_weights(comfy.sd.load_lora_for_models(model, None, dict(tensors), strength, 0)[0])
    mine = patched_weights(apply(model, (tensors, strength)))
    return theirs[key] - weight, mine[key] - weight


RIGHT = {
    "LoHa linear": (LINEAR, loha),
    "LoHa conv": (CONV, loha),
    "LoHa conv with cores": (CONV, lambda weight: loha(weight, core=True)),
    "LoKr linear, whole": (LINEAR, lambda weight: lokr(weight, "whole")),
    "LoKr linear, w2 factored": (LINEAR, lambda weight: lokr(weight, "low rank")),
    "LoKr linear, both factored": (LINEAR, lambda weight: lokr(weight, "low rank", both=True)),
    "LoKr conv, whole": (CONV, lambda weight: lokr(weight, "whole")),
    "LoKr conv, w2 factored": (CONV, lambda weight: lokr(weight, "low rank")),
    "GLoRA linear": (LINEAR, glora),
    "GLoRA conv": (CONV, glora),
    "LoRA conv with a core": (CONV, locon),
}


@pytest.mark.parametrize("strength", [1.0, -0.6])
@pytest.mark.parametrize("case", RIGHT)
def test_where_the_host_is_right_we_are_equal(model, apply, case, strength):
    name, shapes = RIGHT[case]
    theirs, mine = both(model, apply, file(name, shapes(weight_of(model, name))), name, strength)
    assert theirs.norm() > 0.1
    assert (mine - theirs).norm() <= 1e-5 * theirs.norm()  # both in float32, sums in another order


def test_the_host_leaves_out_a_lokr_with_a_core(model, apply):
    theirs, mine = both(model, apply, file(CONV, lokr(weight_of(model, CONV), "core")), CONV, 1.0)
    assert not theirs.any() and mine.norm() > 0.1


def test_the_host_leaves_out_the_core_of_glora(model, apply):
    """Without the core b2 is a matrix, whose product with b1 is no kernel: the whole module fails."""
    theirs, mine = both(model, apply, file(CONV, glora(weight_of(model, CONV), core=True)), CONV, 1.0)
    assert not theirs.any() and mine.norm() > 0.1


LIVE = RIGHT | {"LoKr conv with a core": (CONV, lambda weight: lokr(weight, "core"))}


@pytest.mark.parametrize("case", LIVE)
def test_live_is_patch(model, plain, apply, case):
    name, shapes = LIVE[case]
    tensors = file(name, shapes(weight_of(model, name)))
    patched, live = (run(apply(model, (tensors, 7.0), mode=mode)) for mode in ("patch", "live"))
    # one weight of many: the rounding of all the others is some thousandths of what it changes
    assert (live - patched).norm() <= 0.02 * (patched - plain).norm()


def test_the_host_leaves_out_a_core_of_three_dimensions(pack, ours):
    """It takes every core for one of a 2-D convolution."""
    from comfy.weight_adapter.lora import LoRAAdapter

    weight = rand(8, 6, 2, 3, 3)
    factors = {name: rand(*shape, seed=2) for name, shape in locon(weight).items()}
    up, down, mid = factors.values()
    theirs = LoRAAdapter(set(), (up, down, 4.0, mid, None, None))
    with pytest.raises((RuntimeError, ValueError)):
        theirs.calculate_weight(weight.clone(), "w", 1.0, 1.0, None, lambda change: change)
    mine = ours("lora_ops.adapters").build({"up": up, "down": down, "mid": mid})
    exact = torch.einsum("oa,ab...,bi->oi...", up.flatten(1), mid, down.flatten(1))
    torch.testing.assert_close(mine.delta(tuple(weight.shape)), exact)
