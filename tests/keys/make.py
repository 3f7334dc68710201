"""Writes the key fixtures: key -> shape of each family's real model, from the host's own classes on the meta device,
or diffusers' where the host has none.

`python -m tests.keys.make COMFYUI_FOLDER` from the repository; no weights, no downloads. The text encoders come from
the configurations that the host ships. The listings equal the published checkpoints' keys after the host's own
renaming (query_norm.scale -> query_norm.weight).
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from harness import configs

FOLDER = Path(__file__).parent


def main(comfy_folder: str) -> None:
    sys.path[0] = comfy_folder
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import comfy.ops
    import comfy.sd1_clip
    import comfy.sdxl_clip
    import comfy.supported_models as models
    import comfy.text_encoders.anima
    import comfy.text_encoders.hunyuan_video
    import comfy.text_encoders.lumina2
    import comfy.text_encoders.qwen_image
    import comfy.text_encoders.sd2_clip
    import comfy.text_encoders.sd3_clip
    import comfy.text_encoders.wan
    import comfy.text_encoders.z_image
    import torch

    for name, (cls, config) in (configs.PUBLISHED | configs.VARIANTS).items():
        with torch.device("meta"):
            model = getattr(models, cls)(dict(config)).get_model({}, "", device="meta").diffusion_model
        write(name, {f"diffusion_model.{key}": list(t.shape) for key, t in model.state_dict().items()})
    for name in configs.DIFFUSERS.keys() - configs.PUBLISHED.keys():
        cls, config = configs.DIFFUSERS[name]
        module, _, cls = f"diffusers.{cls}".rpartition(".")
        with torch.device("meta"):
            model = getattr(importlib.import_module(module), cls)(**config)
        write(name, {f"diffusion_model.{key}": list(t.shape) for key, t in model.state_dict().items()})
    operations = comfy.ops.disable_weight_init
    text = {
        "clip_l": comfy.sd1_clip.SDClipModel,
        "clip_g": comfy.sdxl_clip.SDXLClipG,
        "clip_h": comfy.text_encoders.sd2_clip.SD2ClipHModel,
        "t5xxl": comfy.text_encoders.sd3_clip.T5XXLModel,
        "llama": comfy.text_encoders.hunyuan_video.LLAMAModel,
        "umt5xxl": comfy.text_encoders.wan.UMT5XXlModel,
        "qwen25_7b": comfy.text_encoders.qwen_image.Qwen25_7BVLIModel,
        "qwen3_4b": comfy.text_encoders.z_image.Qwen3_4BModel,
        "qwen3_06b": comfy.text_encoders.anima.Qwen3_06BModel,
        "gemma2_2b": comfy.text_encoders.lumina2.Gemma2_2BModel,
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
