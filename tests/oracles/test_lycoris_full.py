"""LyCORIS as the oracle: its full and norm modules, as it saves and merges them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_ops.files import TensorFile
from lora_ops.landing import Piece, merged
from lora_ops.lora import from_file

pytest.importorskip("lycoris", reason="LyCORIS is the oracle here")


def lycoris(kind: str, module: nn.Module):
    from lycoris.modules.full import FullModule
    from lycoris.modules.norms import NormModule

    return {"full": FullModule, "norm": NormModule}[kind]("m", module)


@pytest.mark.parametrize(
    ("kind", "module"),
    [
        ("full", nn.Linear(8, 12)),
        ("full", nn.Conv2d(4, 6, 3)),
        ("norm", nn.LayerNorm(8)),
        ("norm", nn.GroupNorm(2, 8)),
    ],
    ids=["linear", "conv", "layer norm", "group norm"],
)
@pytest.mark.parametrize("strength", [1.0, 0.7, -0.3])
def test_a_difference_is_merged_as_lycoris_merges_it(kind, module, strength):
    torch.manual_seed(0)
    made = lycoris(kind, module)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
        truth = made.get_merged_weight(multiplier=strength)
    suffixes = {"weight": ".diff", "bias": ".diff_b"} if kind == "full" else {}
    saved = {f"m{suffixes.get(name, f'.{name}')}": tensor for name, tensor in made.named_parameters()}
    lora = from_file(TensorFile("lycoris", {key: tensor.detach() for key, tensor in saved.items()}))
    assert set(lora.modules) == {"m", "m.bias"} and not lora.leftover
    for name, base, expected in zip(("m", "m.bias"), (module.weight, module.bias), truth, strict=True):
        ours = merged(base.detach(), [Piece(lora.modules[name], None, strength)])
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
        assert not torch.equal(ours, base)
