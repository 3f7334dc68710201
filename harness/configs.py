"""The host's configurations of real models, for building them with its own classes; smaller ones override a few."""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

_UNET: Config = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "use_spatial_transformer": True,
    "use_temporal_attention": False,
    "legacy": False,
}
SD15: Config = _UNET | {
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": (1, 2, 4, 4),
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "context_dim": 768,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
    "num_heads": 8,
    "num_head_channels": -1,
}
SDXL: Config = _UNET | {
    "num_res_blocks": [2, 2, 2],
    "channel_mult": (1, 2, 4),
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
    "context_dim": 2048,
    "use_linear_in_transformer": True,
    "adm_in_channels": 2816,
    "num_classes": "sequential",
    "num_heads": -1,
    "num_head_channels": 64,
}
FLUX: Config = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "hidden_size": 3072,
    "num_heads": 24,
    "axes_dim": [16, 56, 56],
    "depth": 19,
    "depth_single_blocks": 38,
    "context_in_dim": 4096,
    "vec_in_dim": 768,
    "mlp_ratio": 4.0,
    "theta": 10000,
    "qkv_bias": True,
    "txt_ids_dims": [],
    "guidance_embed": True,
}

SD2: Config = SD15 | {
    "context_dim": 1024,
    "use_linear_in_transformer": True,
    "num_heads": -1,
    "num_head_channels": 64,
}
SD3: Config = {  # 3.5 large
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "depth": 38,
    "input_size": None,
    "adm_in_channels": 2048,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 2432}},
    "num_patches": 36864,
    "pos_embed_max_size": 192,
    "pos_embed_scaling_factor": None,
    "qk_norm": "rms",
    "x_block_self_attn_layers": [],
}
SD35_MEDIUM: Config = SD3 | {
    "depth": 24,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 1536}},
    "num_patches": 147456,
    "pos_embed_max_size": 384,
    "x_block_self_attn_layers": list(range(13)),
}
FLUX2: Config = FLUX | {  # dev
    "image_model": "flux2",
    "in_channels": 128,
    "out_channels": 128,
    "patch_size": 1,
    "hidden_size": 6144,
    "num_heads": 48,
    "axes_dim": [32, 32, 32, 32],
    "depth": 8,
    "depth_single_blocks": 48,
    "context_in_dim": 15360,
    "vec_in_dim": None,
    "mlp_ratio": 3.0,
    "theta": 2000,
    "qkv_bias": False,
    "ops_bias": False,
    "txt_ids_dims": [3],
    "global_modulation": True,
    "mlp_silu_act": True,
}
FLUX2_KLEIN: Config = FLUX2 | {  # 4B
    "hidden_size": 3072,
    "num_heads": 24,
    "depth": 5,
    "depth_single_blocks": 20,
    "context_in_dim": 7680,
    "guidance_embed": False,
}
CHROMA: Config = {key: value for key, value in FLUX.items() if key != "guidance_embed"} | {
    "image_model": "chroma",
    "in_channels": 64,
    "out_channels": 64,
    "vec_in_dim": None,
    "in_dim": 64,
    "out_dim": 3072,
    "hidden_dim": 5120,
    "n_layers": 5,
}
HUNYUAN_VIDEO: Config = FLUX | {
    "image_model": "hunyuan_video",
    "patch_size": [1, 2, 2],
    "depth": 20,
    "depth_single_blocks": 40,
    "theta": 256,
    "byt5": False,
    "meanflow": False,
    "meanflow_sum": False,
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
}
del HUNYUAN_VIDEO["txt_ids_dims"]
CASCADE_C: Config = {"stable_cascade_stage": "c"}
CASCADE_B: Config = {
    "stable_cascade_stage": "b",
    "c_hidden": [320, 640, 1280, 1280],
    "nhead": [-1, -1, 20, 20],
    "blocks": [[2, 6, 28, 6], [6, 28, 6, 2]],
    "block_repeat": [[1, 1, 1, 1], [3, 3, 2, 2]],
}
WAN: Config = {  # 2.1 image to video, 14B: all that text to video has, and the image's
    "image_model": "wan2.1",
    "model_type": "i2v",
    "dim": 5120,
    "in_dim": 36,
    "out_dim": 16,
    "num_heads": 40,
    "ffn_dim": 13824,
    "num_layers": 40,
    "patch_size": (1, 2, 2),
    "freq_dim": 256,
    "window_size": (-1, -1),
    "qk_norm": True,
    "cross_attn_norm": True,
    "eps": 1e-6,
}
QWEN_IMAGE: Config = {"image_model": "qwen_image", "in_channels": 64, "num_layers": 60}
LUMINA2: Config = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 2304,
    "cap_feat_dim": 2304,
    "n_layers": 26,
    "n_heads": 24,
    "n_kv_heads": 8,
    "qk_norm": True,
    "axes_dims": [32, 32, 32],
    "axes_lens": [300, 512, 512],
    "rope_theta": 10000.0,
    "ffn_dim_multiplier": 4.0,
}
Z_IMAGE: Config = LUMINA2 | {
    "dim": 3840,
    "cap_feat_dim": 2560,
    "n_layers": 30,
    "n_heads": 30,
    "n_kv_heads": 30,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 8 / 3,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}
KANDINSKY5: Config = {  # video, pro
    "image_model": "kandinsky5",
    "model_dim": 4096,
    "time_dim": 1024,
    "ff_dim": 16384,
    "visual_embed_dim": 132,
    "num_text_blocks": 4,
    "num_visual_blocks": 60,
    "axes_dims": (32, 48, 48),
}
ANIMA: Config = {
    "image_model": "anima",
    "max_img_h": 240,
    "max_img_w": 240,
    "max_frames": 128,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 2048,
    "concat_padding_mask": True,
    "crossattn_emb_channels": 1024,
    "pos_emb_cls": "rope3d",
    "pos_emb_learnable": True,
    "pos_emb_interpolation": "crop",
    "min_fps": 1,
    "max_fps": 30,
    "use_adaln_lora": True,
    "adaln_lora_dim": 256,
    "num_blocks": 28,
    "num_heads": 16,
    "extra_per_block_abs_pos_emb": False,
    "rope_h_extrapolation_ratio": 4.0,
    "rope_w_extrapolation_ratio": 4.0,
    "rope_t_extrapolation_ratio": 1.0,
}
LTX: Config = {"image_model": "ltxv", "num_layers": 28, "attention_head_dim": 64, "cross_attention_dim": 2048}

# Family -> the host's class for it, and the published configuration.
PUBLISHED: dict[str, tuple[str, Config]] = {
    "sd15": ("SD15", SD15),
    "sd2": ("SD20", SD2),
    "sdxl": ("SDXL", SDXL),
    "sd3": ("SD3", SD3),
    "sd35_medium": ("SD3", SD35_MEDIUM),
    "flux": ("Flux", FLUX),
    "flux2": ("Flux2", FLUX2),
    "flux2_klein": ("Flux2", FLUX2_KLEIN),
    "chroma": ("Chroma", CHROMA),
    "hunyuan_video": ("HunyuanVideo", HUNYUAN_VIDEO),
    "cascade_c": ("Stable_Cascade_C", CASCADE_C),
    "cascade_b": ("Stable_Cascade_B", CASCADE_B),
    "wan": ("WAN21_I2V", WAN),
    "qwen_image": ("QwenImage", QWEN_IMAGE),
    "z_image": ("ZImage", Z_IMAGE),
    "lumina2": ("Lumina2", LUMINA2),
    "kandinsky5": ("Kandinsky5", KANDINSKY5),
    "anima": ("Anima", ANIMA),
    "ltx": ("LTXV", LTX),
}

LTX2: Config = LTX | {"image_model": "ltxav", "num_layers": 2, "attention_head_dim": 128, "cross_attention_dim": 4096}

# Other models of these families, a few blocks deep: the rest of them is alike.
VARIANTS: dict[str, tuple[str, Config]] = {
    "wan_t2v": ("WAN21_T2V", WAN | {"model_type": "t2v", "in_dim": 16, "num_layers": 2}),
    "wan22_5b": (
        "WAN22_T2V",
        WAN
        | {"model_type": "t2v", "dim": 3072, "num_heads": 24, "ffn_dim": 14336, "num_layers": 2}
        | {"in_dim": 48, "out_dim": 48},
    ),
    "wan_vace": (
        "WAN21_Vace",
        WAN | {"model_type": "vace", "in_dim": 16, "vace_in_dim": 96, "num_layers": 4, "vace_layers": 2},
    ),
    "wan_animate": ("WAN22_Animate", WAN | {"model_type": "animate", "num_layers": 5}),
    "kandinsky5_image": (
        "Kandinsky5Image",
        KANDINSKY5
        | {
            "model_dim": 2560,
            "time_dim": 512,
            "ff_dim": 10240,
            "visual_embed_dim": 64,
            "num_text_blocks": 2,
            "num_visual_blocks": 2,
        },
    ),
    "ltx2": ("LTXAV", LTX2),
    "ltx23": (
        "LTXAV",
        LTX2
        | {"cross_attention_adaln": True, "apply_gated_attention": True, "caption_proj_before_connector": True}
        | {"caption_projection_first_linear": False},
    ),
}

# Family -> diffusers' class for it, and the published configuration where it is not the class's default. Those that are
# not in PUBLISHED the host does not have.
_CASCADE = ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")
DIFFUSERS: dict[str, tuple[str, Config]] = {
    "sd15": ("UNet2DConditionModel", {"cross_attention_dim": 768, "sample_size": 64}),
    "sd2": (
        "UNet2DConditionModel",
        {
            "cross_attention_dim": 1024,
            "use_linear_projection": True,
            "attention_head_dim": (5, 10, 20, 20),
            "sample_size": 64,
        },
    ),
    "sdxl": (
        "UNet2DConditionModel",
        {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (320, 640, 1280),
            "attention_head_dim": (5, 10, 20),
            "sample_size": 128,
            "transformer_layers_per_block": (1, 2, 10),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "qk_norm": "rms_norm",
            "pos_embed_max_size": 192,
        },
    ),
    "sd35_medium": (
        "SD3Transformer2DModel",
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "qk_norm": "rms_norm",
            "dual_attention_layers": tuple(range(13)),
            "pos_embed_max_size": 384,
        },
    ),
    "flux": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "flux2": ("Flux2Transformer2DModel", {}),
    "flux2_klein": (
        "Flux2Transformer2DModel",
        {
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
    ),
    "chroma": ("ChromaTransformer2DModel", {}),
    "hunyuan_video": ("HunyuanVideoTransformer3DModel", {}),
    "cascade_c": (
        "StableCascadeUNet",
        {
            "conditioning_dim": 2048,
            "block_out_channels": (2048, 2048),
            "num_attention_heads": (32, 32),
            "down_num_layers_per_block": (8, 24),
            "up_num_layers_per_block": (24, 8),
            "clip_text_in_channels": 1280,
            "clip_image_in_channels": 768,
            "switch_level": (False,),
        },
    ),
    "cascade_b": (
        "StableCascadeUNet",
        {
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 2,
            "conditioning_dim": 1280,
            "block_out_channels": (320, 640, 1280, 1280),
            "num_attention_heads": (-1, -1, 20, 20),
            "down_num_layers_per_block": (2, 6, 28, 6),
            "up_num_layers_per_block": (6, 28, 6, 2),
            "down_blocks_repeat_mappers": (1, 1, 1, 1),
            "up_blocks_repeat_mappers": (3, 3, 2, 2),
            "block_types_per_layer": (_CASCADE[:2], _CASCADE[:2], _CASCADE, _CASCADE),
            "effnet_in_channels": 16,
            "pixel_mapper_in_channels": 3,
            "dropout": 0.0,
            "timestep_conditioning_type": ("sca",),
        },
    ),
    "wan": (
        "WanTransformer3DModel",
        {"num_attention_heads": 40, "in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
    ),
    "qwen_image": ("QwenImageTransformer2DModel", {}),
    "z_image": ("ZImageTransformer2DModel", {}),
    "lumina2": ("Lumina2Transformer2DModel", {"cap_feat_dim": 2304}),
    "kandinsky5": (
        "Kandinsky5Transformer3DModel",
        {
            "model_dim": 4096,
            "ff_dim": 16384,
            "time_dim": 1024,
            "num_text_blocks": 4,
            "num_visual_blocks": 60,
            "axes_dims": (32, 48, 48),
            "visual_cond": True,
            "in_visual_dim": 16,
            "out_visual_dim": 16,
        },
    ),
    "anima": (
        "CosmosTransformer3DModel",
        {
            "in_channels": 16,
            "num_attention_heads": 16,
            "text_embed_dim": 1024,
            "adaln_lora_dim": 256,
            "extra_pos_embed_type": None,
        },
    ),
    "ltx": ("LTXVideoTransformer3DModel", {}),
    "wuerstchen": (
        "pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior.WuerstchenPrior",
        {"c": 1536, "c_cond": 1280, "depth": 32, "nhead": 24},
    ),
    "kandinsky22_prior": ("PriorTransformer", {"embedding_dim": 1280}),
    "kandinsky22_decoder": (
        "UNet2DConditionModel",
        {
            "addition_embed_type": "image",
            "attention_head_dim": 64,
            "block_out_channels": (384, 768, 1152, 1536),
            "cross_attention_dim": 768,
            "down_block_types": ("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3),
            "encoder_hid_dim": 1280,
            "encoder_hid_dim_type": "image_proj",
            "layers_per_block": 3,
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "out_channels": 8,
            "resnet_time_scale_shift": "scale_shift",
            "up_block_types": (*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"),
        },
    ),
}
