"""Spellings that must mean the same place, written out as the trainers write them."""

from __future__ import annotations

import pytest

from lora_ops.dialects import published_map, target_map
from lora_ops.families import FAMILIES, recognise
from lora_ops.lora import Band, split

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
            f"model.diffusion_model.{ATTENTION}",
            ATTENTION,
            f"unet.{ATTENTION}",
            f"base_model.model.{ATTENTION}",
            f"unet.{DOWN}.to_q",
            f"unet.{DOWN}.processor.to_q",
            f"{DOWN}.processor.to_q",
            f"{DOWN}.to_q",
            f"diffusion_model.{DOWN}.to_q",
            f"base_model.model.{DOWN}.to_q",
            f"unet.base_model.model.{DOWN}.to_q",
            f"base_model.model.unet.{DOWN}.to_q",
            f"unet.unet.{DOWN}.to_q",
            "lycoris_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q_",
            f"lora_unet_{DOWN}.to_q",
            "lora_unet__input_blocks_1_1_transformer_blocks_0_attn1_to_q",
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
            f"lora_te1_{ENCODER.replace('.', '_')}",
            f"text_encoder.{ENCODER}",
            "text_encoder.encoder.layers.5.self_attn.k_proj",
            f"text_encoders.clip_l.transformer.{ENCODER}",
            f"clip_l.transformer.{ENCODER}",
            f"base_model.model.{ENCODER}",
            "base_model.model.encoder.layers.5.self_attn.k_proj",
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
    (
        "sdxl",
        f"clip_l.transformer.{ENCODER}.weight",
        (0, 768),
        [
            f"lora_te1_{ENCODER.replace('.', '_')}",
            f"text_encoder.{ENCODER}",
            f"text_encoder.base_model.model.{ENCODER}",
        ],
    ),
    ("sdxl", "clip_g.transformer.text_projection.weight", (0, 1280), ["lora_te2_text_projection"]),
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
        [
            "lora_unet_double_blocks_7_img_attn_qkv",
            "diffusion_model.double_blocks.7.img_attn.qkv",
            "base_model.model.double_blocks.7.img_attn.qkv",
            "transformer.double_blocks.7.img_attn.qkv",
            "double_blocks.7.img_attn.qkv",
            "double_blocks.7.processor.qkv_lora1",
            "diffusion_model.double_blocks.7.processor.qkv_lora1",
        ],
    ),
    (
        "flux",
        "diffusion_model.double_blocks.7.txt_attn.proj.weight",
        (0, 3072),
        [
            "double_blocks.7.processor.proj_lora2",
            "lora_unet_transformer_blocks_7_attn_to_add_out_",
            "lora_transformer_transformer_blocks_7_attn_to_add_out",
            "lycoris_transformer_blocks_7_attn_to_add_out",
        ],
    ),
    ("flux", "diffusion_model.single_blocks.7.linear1.weight", (0, 9216), ["single_blocks.7.processor.qkv"]),
    (
        "flux",
        "diffusion_model.single_blocks.7.linear2.weight",
        (0, 3072),
        ["single_blocks.7.processor.proj", "transformer.single_transformer_blocks.7.proj_out"],
    ),
    (
        "flux",
        "diffusion_model.double_blocks.7.txt_attn.qkv.weight",
        (6144, 3072),
        [
            "transformer.transformer_blocks.7.attn.add_v_proj",
            "transformer_blocks.7.attn.add_v_proj",
            "base_model.model.transformer_blocks.7.attn.add_v_proj",
            "transformer.base_model.model.transformer_blocks.7.attn.add_v_proj",
            "transformer.transformer.transformer_blocks.7.attn.add_v_proj",
        ],
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
            "lora_te2_encoder_block_2_layer_0_SelfAttention_q",
            "text_encoder_2.encoder.block.2.layer.0.SelfAttention.q",
            "text_encoders.t5xxl.transformer.encoder.block.2.layer.0.SelfAttention.q",
            "base_model.model.encoder.block.2.layer.0.SelfAttention.q",
        ],
    ),
    (
        "sd3",
        "diffusion_model.joint_blocks.4.context_block.attn.qkv.weight",
        (2432, 2432),
        ["transformer.transformer_blocks.4.attn.add_k_proj", "lora_transformer_transformer_blocks_4_attn_add_k_proj"],
    ),
    (
        "sd3",
        "t5xxl.transformer.encoder.block.2.layer.1.DenseReluDense.wo.weight",
        (0, 4096),
        [
            "lora_te3_encoder_block_2_layer_1_DenseReluDense_wo",
            "text_encoder_3.encoder.block.2.layer.1.DenseReluDense.wo",
        ],
    ),
    (
        "sd2",
        f"clip_h.transformer.{ENCODER}.weight",
        (0, 1024),
        [f"lora_te_{ENCODER.replace('.', '_')}", f"text_encoder.{ENCODER}", f"base_model.model.{ENCODER}"],
    ),
    (
        "flux2",
        "diffusion_model.single_blocks.7.linear1.weight",
        (0, 55296),
        ["transformer.single_transformer_blocks.7.attn.to_qkv_mlp_proj", "diffusion_model.single_blocks.7.linear1"],
    ),
    (
        "chroma",
        "diffusion_model.distilled_guidance_layer.layers.2.in_layer.weight",
        (0, 5120),
        [
            "transformer.distilled_guidance_layer.layers.2.linear_1",
            "lora_unet_distilled_guidance_layer_layers_2_in_layer",
        ],
    ),
    (
        "hunyuan_video",  # diffusion-pipe and musubi-tuner write Tencent's own names
        "diffusion_model.double_blocks.7.img_attn.qkv.weight",
        (0, 9216),
        [
            "transformer.double_blocks.7.img_attn_qkv",
            "diffusion_model.double_blocks.7.img_attn_qkv",
            "lora_unet_double_blocks_7_img_attn_qkv",
            "Hunyuan_video_I2V_lora_double_blocks_7_img_attn_qkv",
        ],
    ),
    (
        "hunyuan_video",
        "diffusion_model.single_blocks.7.modulation.lin.weight",
        (0, 9216),
        ["lora_unet_single_blocks_7_modulation_linear", "transformer.single_transformer_blocks.7.norm.linear"],
    ),
    (
        "hunyuan_video",
        "llama.transformer.model.layers.3.self_attn.v_proj.weight",
        (0, 1024),
        ["text_encoder.layers.3.self_attn.v_proj", "lora_te1_layers_3_self_attn_v_proj"],
    ),
    (
        "cascade_c",
        "diffusion_model.down_blocks.0.2.attention.attn.out_proj.weight",
        (0, 2048),
        [
            "lora_prior_unet_down_blocks_0_2_attention_attn_out_proj",
            "lora_prior_unet_down_blocks_0_2_attention_to_out_0",
            "prior.down_blocks.0.2.attention.to_out.0",
        ],
    ),
    (
        "cascade_c",
        f"clip_g.transformer.{ENCODER}.weight",
        (0, 1280),
        [f"lora_prior_te_{ENCODER.replace('.', '_')}", f"text_encoder.{ENCODER}"],
    ),
    (
        "wuerstchen",
        "diffusion_model.blocks.2.attention.to_q.weight",
        (0, 1536),
        ["prior.blocks.2.attention.to_q", "unet.blocks.2.attention.to_q"],
    ),
    (
        "kandinsky22_decoder",  # diffusers' script saves attention processors
        "diffusion_model.down_blocks.1.attentions.0.add_k_proj.weight",
        (0, 768),
        ["down_blocks.1.attentions.0.processor.add_k_proj", "unet.down_blocks.1.attentions.0.add_k_proj"],
    ),
    (
        "kandinsky22_prior",
        "diffusion_model.transformer_blocks.9.attn1.to_out.0.weight",
        (0, 2048),
        ["transformer_blocks.9.attn1.processor.to_out", "base_model.model.transformer_blocks.9.attn1.to_out.0"],
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


def test_the_last_context_block_of_sd3_is_swapped_like_its_last_layer():
    names = MAPS["sd3"].names
    blocks = [names[f"transformer.transformer_blocks.{number}.norm1_context.linear"].target for number in range(38)]
    assert [target.swap for target in blocks] == [False] * 37 + [True]
    assert names["transformer.norm_out.linear"].target.swap


def test_checkpoints_keep_their_authors_names_and_are_found():
    """Tencent's and Stability's files differ from what the host makes of them."""
    tencent = {
        "txt_in.individual_token_refiner.blocks.0.norm1.weight": (8,),
        "double_blocks.0.img_attn_qkv.weight": (24, 8),
        "double_blocks.0.img_mlp.fc1.weight": (32, 8),
    }
    names = target_map(recognise(tencent), tencent).names
    assert names["transformer.transformer_blocks.0.attn.to_k"].target.rows == Band(8, 8)
    assert names["lora_unet_double_blocks_0_img_mlp_0"].target.key == "double_blocks.0.img_mlp.fc1.weight"
    stability = {"clip_txt_mapper.weight": (8, 8), "down_blocks.0.2.attention.attn.in_proj_weight": (24, 8)}
    names = target_map(recognise(stability), stability).names
    assert names["prior.down_blocks.0.2.attention.to_v"].target.rows == Band(16, 8)
    assert names["lora_prior_unet_down_blocks_0_2_attention_attn_to_v"].target.rows == Band(16, 8)


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
        ("unet.x.lora_A.my-adapter.weight", "unet.x", "down"),
        ("unet.x.lora_B.default_0.bias", "unet.x.bias", "diff"),
        ("unet.x.lora_magnitude_vector.default.weight", "unet.x", "magnitude"),
        ("unet.x.lora_magnitude_vector.default", "unet.x", "magnitude"),
        ("double_blocks.0.processor.qkv_lora2.down.weight", "double_blocks.0.processor.qkv_lora2", "down"),
        ("single_blocks.0.processor.qkv_lora.up.weight", "single_blocks.0.processor.qkv", "up"),
        ("double_blocks.0.img_attn.norm.key_norm.scale", "double_blocks.0.img_attn.norm.key_norm", "set_weight"),
        ("x.lora_alpha", "x", "alpha"),
        ("x.lora_B.bias", "x.bias", "diff"),
        ("lora_unet_x.diff_b", "lora_unet_x.bias", "diff"),
        ("lora_unet_x.b_norm", "lora_unet_x.bias", "diff"),
        ("lora_unet_x.w_norm", "lora_unet_x", "diff"),
        ("bundle_emb.cat.clip_l", "bundle_emb.cat.clip_l", ""),
        (
            "diffusion_model.blocks.0.self_attn.q_loras.up.weight",
            "diffusion_model.blocks.0.self_attn.q_loras.up.weight",
            "",
        ),
        ("x.lora_magnitude_vector.weight", "x", "magnitude"),
        ("x.something.weight", "x.something.weight", ""),
        (".alpha", ".alpha", ""),
    ],
)
def test_keys_split_into_module_and_factor(key, module, factor):
    assert split(key) == (module, factor)


def test_names_found_one_by_one_are_the_names_written_out():
    names = MAPS["flux"].names
    found = list(names)
    assert len(found) == len(set(found)) == len(names) > 20_000
    assert all(names[name].target == target for name, (target, _) in names.items())
    assert "transformer.transformer_blocks.7.attn" not in names and "lora_unet_" not in names


def test_a_dialect_is_told_by_its_prefix_and_the_names_it_takes():
    told = {
        "lora_unet_double_blocks_7_img_attn_qkv": "kohya",
        "lora_unet_transformer_blocks_7_attn_to_q": "kohya, diffusers names",
        "lora_transformer_transformer_blocks_7_attn_to_q": "onetrainer",
        "diffusion_model.double_blocks.7.img_attn.qkv": "comfy",
        "base_model.model.double_blocks.7.img_attn.qkv": "peft, native names",
        "double_blocks.7.processor.qkv_lora1": "attention processors",
        "double_blocks.7.img_attn.qkv": "bare",
    }
    assert {name: MAPS["flux"].names[name].dialect for name in told} == told
