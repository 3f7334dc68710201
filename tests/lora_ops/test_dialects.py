"""Spellings that must mean the same place, written out as the trainers write them."""

from __future__ import annotations

import pytest

from lora_ops.dialects import published_map
from lora_ops.families import FAMILIES
from lora_ops.lora import split

MAPS = {family.name: published_map(family) for family in FAMILIES}
ATTENTION = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
DOWN = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
ENCODER = "text_model.encoder.layers.5.self_attn.k_proj"

# family, weight, (start, length) of the band, spellings
EQUAL = [
    (
        "sd15",
        f"diffusion_model.{ATTENTION}.weight",
        (0, 320),
        [
            "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q",
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
            f"diffusion_model.{ATTENTION}",
            f"unet.{DOWN}.to_q",
            f"unet.{DOWN}.processor.to_q",
            f"{DOWN}.processor.to_q",
            f"base_model.model.{DOWN}.to_q",
        ],
    ),
    (
        "sd15",
        "diffusion_model.input_blocks.4.1.proj_in.weight",
        (0, 640),
        ["lora_unet_input_blocks_4_1_proj_in", "unet.down_blocks.1.attentions.0.proj_in"],
    ),
    (
        "sdxl",
        "diffusion_model.output_blocks.4.0.skip_connection.weight",
        (0, 640),
        ["lora_unet_output_blocks_4_0_skip_connection", "unet.up_blocks.1.resnets.1.conv_shortcut"],
    ),
    (
        "sd15",
        "diffusion_model.output_blocks.5.2.conv.weight",
        (0, 1280),
        ["lora_unet_output_blocks_5_2_conv", "unet.up_blocks.1.upsamplers.0.conv"],
    ),
    (
        "sd15",
        "diffusion_model.input_blocks.3.0.op.weight",
        (0, 320),
        ["lora_unet_input_blocks_3_0_op", "unet.down_blocks.0.downsamplers.0.conv"],
    ),
    (
        "sd15",
        "diffusion_model.middle_block.2.in_layers.2.weight",
        (0, 1280),
        ["lora_unet_middle_block_2_in_layers_2", "unet.mid_block.resnets.1.conv1"],
    ),
    (
        "sd15",
        f"clip_l.transformer.{ENCODER}.weight",
        (0, 768),
        [
            f"lora_te_{ENCODER.replace('.', '_')}",
            f"text_encoder.{ENCODER}",
            f"text_encoders.clip_l.transformer.{ENCODER}",
            f"base_model.model.{ENCODER}",
        ],
    ),
    (
        "sdxl",
        "diffusion_model.middle_block.1.transformer_blocks.9.ff.net.0.proj.weight",
        (0, 10240),
        [
            "lora_unet_middle_block_1_transformer_blocks_9_ff_net_0_proj",
            "unet.mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj",
        ],
    ),
    (
        "sdxl",
        "diffusion_model.label_emb.0.2.weight",
        (0, 1280),
        ["lora_unet_label_emb_0_2", "unet.add_embedding.linear_2"],
    ),
    ("sdxl", f"clip_l.transformer.{ENCODER}.weight", (0, 768), [f"lora_te1_{ENCODER.replace('.', '_')}"]),
    (
        "sdxl",
        f"clip_g.transformer.{ENCODER}.weight",
        (0, 1280),
        [f"lora_te2_{ENCODER.replace('.', '_')}", f"text_encoder_2.{ENCODER}"],
    ),
    (
        "flux",
        "diffusion_model.double_blocks.7.img_attn.qkv.weight",
        (0, 9216),
        ["lora_unet_double_blocks_7_img_attn_qkv", "diffusion_model.double_blocks.7.img_attn.qkv"],
    ),
    (
        "flux",
        "diffusion_model.double_blocks.7.txt_attn.qkv.weight",
        (6144, 3072),
        ["transformer.transformer_blocks.7.attn.add_v_proj", "base_model.model.transformer_blocks.7.attn.add_v_proj"],
    ),
    (
        "flux",
        "diffusion_model.single_blocks.20.linear1.weight",
        (9216, 12288),
        ["transformer.single_transformer_blocks.20.proj_mlp"],
    ),
    (
        "flux",
        "t5xxl.transformer.encoder.block.2.layer.0.SelfAttention.q.weight",
        (0, 4096),
        [
            "lora_te3_encoder_block_2_layer_0_SelfAttention_q",
            "text_encoder_2.encoder.block.2.layer.0.SelfAttention.q",
        ],
    ),
]


@pytest.mark.parametrize(("family", "key", "band", "names"), EQUAL, ids=lambda value: str(value)[:60])
def test_spellings_mean_the_same_place(family, key, band, names):
    for name in names:
        target = MAPS[family].names[name].target
        assert (target.key, (target.rows.start, target.rows.length)) == (key, band), name


def test_the_last_layer_of_flux_is_swapped_only_where_diffusers_names_it():
    names = MAPS["flux"].names
    assert names["transformer.norm_out.linear"].target.swap
    assert not names["lora_unet_final_layer_adaLN_modulation_1"].target.swap


@pytest.mark.parametrize(
    ("key", "module", "factor"),
    [
        ("lora_unet_a.lora_up.weight", "lora_unet_a", "up"),
        ("lora_unet_a.lora_down.weight", "lora_unet_a", "down"),
        ("lora_unet_a.alpha", "lora_unet_a", "alpha"),
        ("unet.x.lora_A.weight", "unet.x", "down"),
        ("unet.x.lora_B.default.weight", "unet.x", "up"),
        ("unet.x.lora.up.weight", "unet.x", "up"),
        ("x.processor.to_q_lora.down.weight", "x.processor.to_q", "down"),
        ("text_encoder.x.lora_linear_layer.up.weight", "text_encoder.x", "up"),
        ("x.lora_B.bias", "x", "bias"),
        ("x.lora_magnitude_vector.weight", "x", "magnitude"),
        ("x.something.weight", "x.something.weight", ""),
        (".alpha", ".alpha", ""),
    ],
)
def test_keys_split_into_module_and_factor(key, module, factor):
    assert split(key) == (module, factor)
