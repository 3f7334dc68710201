"""The host's name rules on placeholders: what they rename, and what they compute, of which tensors."""

from __future__ import annotations

import pytest
import torch

SHAPE = 4


@pytest.fixture(scope="module")
def rules(pack):
    """The rules that compute: OpenCLIP's fused projections, in both directions."""
    from comfy import supported_models as models

    return {kind.__name__: kind({}) for kind in (models.SDXL, models.SDXLRefiner, models.SD20)}


def encoders(config) -> dict[str, torch.Tensor]:
    """Text encoders by the host's names, a layer each, every value another."""
    made: dict[str, torch.Tensor] = {}
    for prefix in {"SDXL": ("clip_l", "clip_g"), "SDXLRefiner": ("clip_g",), "SD20": ("clip_h",)}[
        type(config).__name__
    ]:
        layer = f"{prefix}.transformer.text_model.encoder.layers.0"
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1"):
            made[f"{layer}.{name}.weight"], made[f"{layer}.{name}.bias"] = torch.rand(SHAPE, SHAPE), torch.rand(SHAPE)
        made[f"{prefix}.transformer.text_model.final_layer_norm.weight"] = torch.rand(SHAPE)
        made[f"{prefix}.transformer.text_projection.weight"] = torch.rand(SHAPE, SHAPE)
    return made


@pytest.mark.parametrize("kind", ["SDXL", "SDXLRefiner", "SD20"])
def test_what_a_rule_makes_of_values_is_what_the_placeholders_say(kind, rules, ours):
    renaming = ours("nodes.host.renaming")
    config = rules[kind]
    live = encoders(config)
    saved = check(renaming, config.process_clip_state_dict_for_saving, live)
    back = check(renaming, config.process_clip_state_dict, saved)
    assert all(torch.equal(back[key], live[key]) for key in live if key in back)
    fused = [key for key in saved if key.endswith("in_proj_weight")]
    assert len(fused) == 1


def check(renaming, rule, values) -> dict[str, torch.Tensor]:
    holders = {key: renaming.Placeholder.of(key, tuple(each.shape), each.dtype) for key, each in values.items()}
    wanted, found = rule(dict(values)), renaming.renamed(rule, holders)
    assert found.keys() == wanted.keys()
    for key, (tensor, origins, whole) in found.items():
        assert (tuple(tensor.shape), tensor.dtype) == (tuple(wanted[key].shape), wanted[key].dtype)
        if not origins:
            assert torch.equal(tensor, wanted[key])  # a constant
        elif whole:
            assert wanted[key] is values[next(iter(origins))]
        else:
            given = {origin: values[origin] for origin in origins}
            assert torch.equal(renaming.computed(rule, holders, given)[key], wanted[key])
    return wanted
