"""PEFT as the oracle: what it saves, merged by us, equals what it merges itself."""

from __future__ import annotations

import json

import pytest
import torch

from lora_ops.files import TensorFile
from lora_ops.landing import Piece, merged
from lora_ops.lora import from_file, read_lora

peft = pytest.importorskip("peft", reason="peft is the oracle here; it is in the test environment")


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(24, 16)
        self.conv = torch.nn.Conv2d(6, 10, 3)
        self.point = torch.nn.Conv2d(6, 10, 1)

    def forward(self, x):
        return x


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_a_lora_that_peft_saved_is_merged_as_peft_merges_it(rank):
    torch.manual_seed(rank)
    base = Small()
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    # alpha = rank: PEFT keeps alpha outside the file, a file alone means scale 1
    config = peft.LoraConfig(
        r=rank, lora_alpha=rank, target_modules=["linear", "conv", "point"], init_lora_weights=False
    )
    model = peft.get_peft_model(base, config)
    saved = peft.get_peft_model_state_dict(model)
    lora = from_file(TensorFile("peft", saved))
    assert not lora.leftover and set(lora.modules) == {f"base_model.model.{n}" for n in ("linear", "conv", "point")}
    truth = model.merge_and_unload().state_dict()
    for name, adapter in lora.modules.items():
        key = f"{name.removeprefix('base_model.model.')}.weight"
        ours = merged(weights[key], [Piece(adapter, None, 1.0)])
        # both in float32; PEFT sums convolutions in another order
        torch.testing.assert_close(ours, truth[key], rtol=1e-5, atol=1e-6)
        assert not torch.equal(ours, weights[key])


def test_kohya_alpha_equals_pefts_scale():
    up, down = torch.randn(16, 4), torch.randn(4, 24)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["linear"], init_lora_weights=False)
    model = peft.get_peft_model(Small(), config)
    layer = model.base_model.model.linear
    layer.lora_A["default"].weight.data.copy_(down)
    layer.lora_B["default"].weight.data.copy_(up)
    kohya = {"m.lora_up.weight": up, "m.lora_down.weight": down, "m.alpha": torch.tensor(6.0)}
    ours = from_file(TensorFile("kohya", kohya)).modules["m"].delta((16, 24))
    torch.testing.assert_close(ours, layer.get_delta_weight("default").detach(), rtol=1e-5, atol=1e-6)


# PEFT's switches that change a scale, alone and together. Patterns are regular expressions for the end of a name.
SWITCHES = {
    "alpha": {},
    "alpha = rank": {"lora_alpha": 4},
    "rslora": {"use_rslora": True},
    "alpha pattern": {"alpha_pattern": {"linear": 20}},
    "rank pattern": {"rank_pattern": {"inner.linear": 2}},
    "both patterns": {"alpha_pattern": {"conv": 3, "linear": 20}, "rank_pattern": {"conv": 8, "linear": 2}},
    "rslora and both patterns": {"use_rslora": True, "alpha_pattern": {"conv": 3}, "rank_pattern": {"conv": 8}},
    "the first pattern that fits": {"alpha_pattern": {"inner.linear": 9, "linear": 20, "inner.*": 30}},
    "a pattern from the start": {"alpha_pattern": {"^linear": 20}, "rank_pattern": {"^inner.linear": 2}},
    "expressions": {"alpha_pattern": {r"inner\.(linear|conv)": 20}, "rank_pattern": {".*conv": 2}},
    "a pattern that is no whole name": {"alpha_pattern": {"near": 20, "lin": 30}},
}
each_switch = pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)


class Nested(Small):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Small()


def trained(switches, **more):
    torch.manual_seed(0)
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["linear", "conv"], "init_lora_weights": False}
    return peft.get_peft_model(Nested(), peft.LoraConfig(**config | switches | more))


def require_the_same(model, lora, prefix):
    layers = {n: layer for n, layer in model.base_model.model.named_modules() if hasattr(layer, "get_delta_weight")}
    assert not lora.leftover and {f"{prefix}{name}" for name in layers} == lora.modules.keys() and len(layers) == 4
    for name, layer in layers.items():
        ours = lora.modules[f"{prefix}{name}"].delta(tuple(layer.weight.shape))
        torch.testing.assert_close(ours, layer.get_delta_weight("default").detach(), rtol=1e-5, atol=1e-6)


@each_switch
def test_a_folder_that_peft_saved_has_pefts_scales(switches, tmp_path):
    trained(switches).save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(Nested(), tmp_path)  # which forgets the order of the patterns: PEFT sorts
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        lora = read_lora(str(path))
        require_the_same(model, lora, "base_model.model.")
        assert {lora.alpha_source(module) for module in lora.modules} == {"adapter_config.json"}


@each_switch
@pytest.mark.parametrize("prefix", ["unet.", ""])
def test_an_alpha_in_diffusers_metadata_gives_pefts_scale(switches, prefix):
    model = trained(switches)
    saved = peft.get_peft_model_state_dict(model)
    tensors = {key.replace("base_model.model.", prefix): tensor for key, tensor in saved.items()}
    config = model.peft_config["default"].to_dict()
    written = {f"{prefix}{key}": value for key, value in config.items() if isinstance(value, int | dict)}
    lora = from_file(TensorFile("diffusers", tensors, {"lora_adapter_metadata": json.dumps(written)}))
    require_the_same(model, lora, prefix)
    assert {lora.alpha_source(module) for module in lora.modules} == {"metadata"}


def test_any_name_of_an_adapter_is_read():
    model = trained({})
    tensors = {key: tensor for key, tensor in model.state_dict().items() if "lora_" in key}
    assert all(".default." in key for key in tensors)
    renamed = {key.replace(".default.", ".my-style."): tensor for key, tensor in tensors.items()}
    for file in (tensors, renamed):
        lora = from_file(TensorFile("peft", {f"base_model.model.{k}": t for k, t in file.items()}))
        assert len(lora.modules) == 4 and not lora.leftover


@pytest.mark.parametrize("rslora", [False, True])
def test_the_bias_of_a_lora_is_merged_as_peft_merges_it(rslora, tmp_path):
    model = trained({"lora_bias": True, "use_rslora": rslora})
    for layer in model.base_model.model.modules():
        if hasattr(layer, "get_delta_weight"):
            layer.lora_B["default"].bias.data.normal_()
    model.save_pretrained(tmp_path)
    lora = read_lora(str(tmp_path))
    assert not lora.leftover and len(lora.modules) == 8
    base = {name.replace(".base_layer", ""): t.clone() for name, t in model.base_model.model.state_dict().items()}
    truth = model.merge_and_unload().state_dict()
    for module, adapter in lora.modules.items():
        key = module.removeprefix("base_model.model.")
        key = key if key.endswith(".bias") else f"{key}.weight"
        ours = merged(base[key], [Piece(adapter, None, 1.0)])
        torch.testing.assert_close(ours, truth[key], rtol=1e-5, atol=1e-6)
        assert not torch.equal(ours, base[key])


def test_a_weight_stored_transposed_is_refused(tmp_path):
    """PEFT transposes the update of transformers' Conv1D, and says so in its configuration."""
    transformers = pytest.importorskip("transformers")
    base = torch.nn.Sequential(transformers.pytorch_utils.Conv1D(16, 24))
    config = peft.LoraConfig(r=4, target_modules=["0"], fan_in_fan_out=True, init_lora_weights=False)
    peft.get_peft_model(base, config).save_pretrained(tmp_path)
    (refusal,) = read_lora(str(tmp_path)).leftover
    assert "fan_in_fan_out" in refusal.reason


def test_a_lora_of_a_changed_base_is_refused(tmp_path):
    """PiSSA takes its start out of the base's weights: on the base as published the factors mean something else."""
    trained({"init_lora_weights": "pissa"}, target_modules=["linear"]).save_pretrained(tmp_path)
    assert {"changed base" in refusal.reason for refusal in read_lora(str(tmp_path)).leftover} == {True}
