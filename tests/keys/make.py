"""Writes the key fixtures: key -> shape of each family's real model, from the host's own classes on the meta device.

`python tests/keys/make.py COMFYUI_FOLDER` (no weights, no downloads). The text encoders come from transformers'
published configurations as the host ships them. The FLUX.1 and SD listings equal the published checkpoints' keys
after the host's own renaming (query_norm.scale -> query_norm.weight).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def main(comfy_folder: str) -> None:
    sys.path[0] = comfy_folder
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import comfy.ops
    import comfy.sd1_clip
    import comfy.sdxl_clip
    import comfy.supported_models as models
    import torch

    unet = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 320,
        "use_spatial_transformer": True,
        "use_temporal_attention": False,
        "legacy": False,
    }
    configs = {
        "sd15": (
            models.SD15,
            unet
            | {
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
            },
        ),
        "sdxl": (
            models.SDXL,
            unet
            | {
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
            },
        ),
        "flux": (
            models.Flux,
            {
                "image_model": "flux",
                "in_channels": 16,
                "out_channels": 16,
                "patch_size": 2,
                "vec_in_dim": 768,
                "context_in_dim": 4096,
                "hidden_size": 3072,
                "mlp_ratio": 4.0,
                "num_heads": 24,
                "depth": 19,
                "depth_single_blocks": 38,
                "axes_dim": [16, 56, 56],
                "theta": 10000,
                "qkv_bias": True,
                "guidance_embed": True,
                "txt_ids_dims": [],
            },
        ),
    }
    for name, (cls, config) in configs.items():
        with torch.device("meta"):
            model = cls(dict(config)).get_model({}, "", device="meta").diffusion_model
        write(name, {f"diffusion_model.{key}": list(t.shape) for key, t in model.state_dict().items()})
    operations = comfy.ops.disable_weight_init
    text = {
        "clip_l": comfy.sd1_clip.SDClipModel,
        "clip_g": comfy.sdxl_clip.SDXLClipG,
    }
    for name, cls in text.items():
        model = cls(device="meta", dtype=torch.float32, model_options={"custom_operations": operations})
        found = {key: list(t.shape) for key, t in model.transformer.state_dict().items()}
        write(name, {f"{name}.transformer.{key}": shape for key, shape in found.items()})


def write(name: str, shapes: dict[str, list[int]]) -> None:
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(shape)}" for key, shape in sorted(shapes.items()))
    (FOLDER / f"{name}.json").write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    print(name, len(shapes))


if __name__ == "__main__":
    main(sys.argv[1])
