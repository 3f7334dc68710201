"""PEFT as the oracle: what it saves, merged by us, equals what it merges itself."""

from __future__ import annotations

import json

import pytest
import torch

from lora_ops.files import TensorFile
from lora_ops.landing import Piece, merged
from lora_ops.lora import from_file

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


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("patterns", [{}, {"linear": 20}])
def test_an_alpha_in_diffusers_metadata_gives_pefts_scale(stabilised, patterns):
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=stabilised,
        alpha_pattern=patterns,
        target_modules=["linear", "conv"],
        init_lora_weights=False,
    )
    model = peft.get_peft_model(Small(), config)
    saved = peft.get_peft_model_state_dict(model)
    tensors = {key.replace("base_model.model.", "unet."): tensor for key, tensor in saved.items()}
    written = {f"unet.{key}": value for key, value in config.to_dict().items() if isinstance(value, int | dict)}
    lora = from_file(TensorFile("diffusers", tensors, {"lora_adapter_metadata": json.dumps(written)}))
    assert {lora.alpha_source(module) for module in lora.modules} == {"metadata"}
    for name in ("linear", "conv"):
        layer = getattr(model.base_model.model, name)
        ours = lora.modules[f"unet.{name}"].delta(tuple(layer.weight.shape))
        torch.testing.assert_close(ours, layer.get_delta_weight("default").detach(), rtol=1e-5, atol=1e-6)
