"""Differences of weights, norms and biases on the host: as its own, where that is right; and what its trainer makes."""

from __future__ import annotations

import pytest
import torch

from harness import inside
from harness.inside import FAMILIES, patched_weights, run

from .test_live import footprint, near, quantised, unchanged
from .test_patching import host_apply

each_family = pytest.mark.parametrize("model", FAMILIES, indirect=True)
DENOISER = "diffusion_model."


def noise(shape, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def differences(model, *, norms: tuple[str, str] = (".diff", ".diff_b"), prefix: str = DENOISER, flat: bool = False):
    """A difference for every norm and bias, and for every fifth matrix."""
    shapes = {key: tensor.shape for key, tensor in model.model.state_dict().items() if key.startswith(DENOISER)}
    found = {}
    for number, (key, shape) in enumerate(shapes.items()):
        module, _, kind = key.removeprefix(DENOISER).rpartition(".")
        module = prefix + (module.replace(".", "_") if flat else module)
        of_norm = len(shapes[key.replace(".bias", ".weight")]) == 1
        weight, bias = norms if of_norm else (".diff", ".diff_b")
        if kind == "bias":
            found[module + bias] = noise(shape, number)
        elif len(shape) == 1 or number % 5 == 0:
            found[module + weight] = noise(shape, number)
    return found


@each_family
@pytest.mark.parametrize("strength", [1.0, 0.7, -0.3])
def test_differences_are_the_hosts(model, apply, strength):
    for spelling in ({}, {"norms": (".w_norm", ".b_norm"), "prefix": "lora_unet_", "flat": True}):
        tensors = differences(model, **spelling)
        theirs = patched_weights(host_apply(model, tensors, strength))
        mine = patched_weights(apply(model, (tensors, strength)))
        assert mine.keys() == theirs.keys() and len(mine) == len(tensors)
        for key in mine:  # the host rounds strength · ΔW on the way
            torch.testing.assert_close(mine[key], theirs[key], rtol=2e-7, atol=1e-7)


@each_family
def test_live_equals_patch_and_nothing_stays(model, apply):
    loras = [(differences(model), 0.8), (differences(model, prefix="lora_unet_", flat=True), -0.3)]
    plain, before = run(model), footprint(model)
    patched = run(apply(model, *loras, mode="patch"))
    live = run(apply(model, *loras, mode="live"))
    assert near(live, patched) and not near(plain, patched, 1e-3)
    assert torch.equal(run(model), plain) and unchanged(model, before)


def test_on_an_fp8_base_norms_and_biases_run_live(pack, apply):
    """Small bases lose the update in rounding, so the float32 one tells what is right."""
    tensors = differences(inside.model("flux"))
    base = inside.model("flux", torch.float8_e4m3fn)
    exact = inside.model("flux")
    exact.model.load_state_dict({key: tensor.float() for key, tensor in base.model.state_dict().items()})
    live = apply(base, (tensors, 1.0), mode="auto")
    assert not live.patches
    assert near(run(live), run(apply(exact, (tensors, 1.0), mode="patch")), 1e-4)
    live.detach()


def test_auto_runs_live_where_weights_are_quantised_and_patches_the_others(pack, apply):
    model, _ = quantised("float8_e4m3fn")
    tensors = differences(model) | {f"{DENOISER}single_blocks.0.linear2.diff": noise((128, 640), 1)}
    plain = run(model)
    mixed = apply(model, (tensors, 0.5), mode="auto")
    assert set(mixed.get_attachment("lora_ops_live").pieces) == {f"{DENOISER}single_blocks.0.linear2.weight"}
    assert len(mixed.patches) == len(tensors) - 1
    assert near(run(mixed), run(apply(model, (tensors, 0.5), mode="live")))
    mixed.detach()
    assert torch.equal(run(model), plain)


def test_the_bias_of_a_split_projection_lands_on_its_rows_where_the_host_loses_it(models, apply):
    model = models["flux"]
    tensors = {"transformer.single_transformer_blocks.0.attn.to_k.diff_b": noise((128,), 1)}
    key = f"{DENOISER}single_blocks.0.linear1.bias"
    assert not host_apply(model, tensors, 1.0).patches
    base, changed = model.model.state_dict()[key], patched_weights(apply(model, (tensors, 1.0)))[key]
    expected = base.clone()
    expected[128:256] += next(iter(tensors.values()))
    assert torch.equal(changed, expected)


def test_the_bias_of_a_lora_has_its_scale_where_the_host_drops_it(models, apply, ours):
    model = models["flux"]
    module = f"{DENOISER}single_blocks.0.linear2"
    up, down, bias = noise((128, 4), 1), noise((4, 640), 2), noise((128,), 3)
    tensors = {
        f"{module}.lora_B.bias": bias,
        f"{module}.lora_A.weight": down,
        f"{module}.lora_B.weight": up,
        f"{module}.alpha": torch.tensor(2.0),
    }
    assert set(host_apply(model, tensors, 1.0).patches) == {f"{module}.weight"}
    files, lora, sockets = (ours(name) for name in ("lora_ops.files", "lora_ops.lora", "nodes.sockets"))
    file = files.TensorFile("x", tensors)
    assert sockets.LoraModel(file, lora.from_file(file)).keys() == tensors.keys()  # no alpha for the bias
    mine = apply(model, (tensors, 0.5))
    weights, base = patched_weights(mine), model.model.state_dict()
    torch.testing.assert_close(weights[f"{module}.bias"], base[f"{module}.bias"] + 0.5 * 0.5 * bias)
    torch.testing.assert_close(weights[f"{module}.weight"], base[f"{module}.weight"] + 0.5 * 0.5 * up @ down)
    assert near(run(apply(model, (tensors, 0.5), mode="live")), run(mine))


def trained(model):
    """What core's Train LoRA puts out after two steps."""
    from comfy_extras.nodes_train import TrainLoraNode

    settings = {
        "batch_size": 1,
        "steps": 2,
        "grad_accumulation_steps": 1,
        "learning_rate": 0.01,
        "rank": 4,
        "optimizer": "AdamW",
        "loss_function": "MSE",
        "seed": 0,
        "training_dtype": "fp32",
        "lora_dtype": "fp32",
        "quantized_backward": False,
        "algorithm": "LoRA",
        "gradient_checkpointing": False,
        "checkpoint_depth": 1,
        "offloading": False,
        "existing_lora": "[None]",
        "bucket_mode": False,
        "bypass_mode": False,
    }
    latents, positive = {"samples": noise((1, 4, 16, 16), 1)}, [[noise((1, 7, 768), 2), {}]]
    inputs = {name: [value] for name, value in settings.items()}
    with torch.inference_mode():
        own = model.clone()
        own.cached_patcher_init = (lambda **_: inside.model("sd15"), ())  # it trains on a copy of its own
        return TrainLoraNode.execute(model=[own], latents=[latents], positive=[positive], **inputs).args[0]


def test_what_cores_trainer_makes_lands_whole_and_as_cores_loader_puts_it(pack, ours, models):
    model = models["sd15"]
    tensors = trained(model)
    kinds = {key.rpartition(".")[2] for key in tensors}
    assert kinds == {"weight", "alpha", "diff", "diff_b"}
    landing, patching = ours("lora_ops.landing"), ours("nodes.host.patching")
    entry = ours("lora_ops.stack").Entry(ours("nodes.sockets").lora_of(tensors), {"model": 0.7, "clip": 0.7})
    landed = landing.land([entry], patching.targets(model, None))
    landing.require_coverage(landed, 1.0)
    (row,) = landed.rows
    weights = [key for key in model.model.state_dict() if key.startswith(DENOISER)]
    assert len(row.landed) == len(landed.pieces) == len(weights)
    mine = patched_weights(patching.applied(landed, "patch", model, None).model)
    theirs = patched_weights(host_apply(model, tensors, 0.7))
    assert mine.keys() == theirs.keys()
    base = model.model.state_dict()
    assert sum(not torch.equal(mine[key], base[key]) for key in mine) > len(weights) / 2
    for key in mine:
        torch.testing.assert_close(mine[key], theirs[key], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("strength", [1.0, 0.01, -1.0])
def test_a_control_lora_of_black_forest_labs_replaces_nothing_and_says_so(models, ours, strength):
    """It makes img_in wider and brings norms of its own, which ComfyUI's loader puts in whole at any strength."""
    model = models["flux"]
    files, lora, stack = ours("lora_ops.files"), ours("lora_ops.lora"), ours("lora_ops.stack")
    landing, patching, told = ours("lora_ops.landing"), ours("nodes.host.patching"), ours("lora_ops.receipt")
    norm = "double_blocks.0.img_attn.norm.key_norm.scale"
    width, inputs = model.model.state_dict()["diffusion_model.img_in.weight"].shape
    tensors = {
        "img_in.lora_A.weight": torch.ones(2, 2 * inputs),
        "img_in.lora_B.weight": torch.ones(width, 2),
        "double_blocks.0.img_attn.proj.lora_A.weight": torch.ones(2, width),
        "double_blocks.0.img_attn.proj.lora_B.weight": torch.ones(width, 2),
        norm: torch.full((128,), 7.0),
    }
    found = lora.from_file(files.TensorFile("control", tensors))
    landed = landing.land([stack.Entry(found, {"model": strength})], patching.targets(model, None))
    (row,) = landed.rows
    refused = {refusal.module: refusal for refusal in row.refused}
    assert refused.keys() == {"img_in", norm.removesuffix(".scale")}
    assert f"the weight has ({width}, {inputs})" in refused["img_in"].reason
    assert "set_weight, which no strength scales" in refused[norm.removesuffix(".scale")].reason
    assert "ComfyUI's own loader" in told.receipt(landed, 0.0).text
    assert [key for _, key in landed.pieces] == ["diffusion_model.double_blocks.0.img_attn.proj.weight"]
