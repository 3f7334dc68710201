"""The host inside this process: ComfyUI importable, the pack mounted as the host does it, models of its own classes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch

from harness.comfy import PACK
from harness.configs import PUBLISHED, VARIANTS
from harness.server import MOUNT

_FLUX = {"hidden_size": 128, "num_heads": 1, "depth": 2, "depth_single_blocks": 2, "context_in_dim": 64}
_FLUX2 = _FLUX | {"depth": 1, "depth_single_blocks": 1}
SMALLER = {
    "sd15": {"model_channels": 32},
    "sdxl": {
        "model_channels": 32,
        "num_heads": 8,
        "num_head_channels": -1,
        "transformer_depth": [0, 0, 2, 2, 3, 3],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 3, 3, 3],
        "transformer_depth_middle": 3,
    },
    "sd2": {
        "model_channels": 64,
        "num_res_blocks": [1, 1, 1, 1],
        "transformer_depth": [1, 1, 1, 0],
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 0, 0],
    },
    "flux": _FLUX,
    "sd3": {
        "depth": 2,
        "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 128}},
        "num_patches": 64,
        "pos_embed_max_size": 8,
    },
    "sd35_medium": {
        "depth": 2,
        "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 128}},
        "adm_in_channels": 32,
        "num_patches": 64,
        "pos_embed_max_size": 8,
        "x_block_self_attn_layers": [0],
    },
    "wan": {"dim": 128, "num_heads": 1, "ffn_dim": 256, "num_layers": 1},
    "z_image": {
        "dim": 256,
        "n_heads": 2,
        "n_kv_heads": 2,
        "n_layers": 1,
        "cap_feat_dim": 64,
    },
    "flux2": _FLUX2,
    "flux2_klein": _FLUX2,
    "chroma": _FLUX2 | {"out_dim": 128, "hidden_dim": 64, "n_layers": 1},
    "cascade_c": {"c_hidden": [64, 64], "nhead": [1, 1], "blocks": [[1, 1], [1, 1]], "c_cond": 64},
    "wan_t2v": {"dim": 128, "num_heads": 1, "ffn_dim": 128, "num_layers": 1, "text_dim": 32},
    "qwen_image": {"num_layers": 1, "num_attention_heads": 1, "joint_attention_dim": 64},
    "lumina2": {"dim": 96, "n_heads": 1, "n_kv_heads": 1, "n_layers": 1, "cap_feat_dim": 64},
    "kandinsky5": {
        "model_dim": 64,
        "time_dim": 32,
        "ff_dim": 64,
        "num_text_blocks": 1,
        "num_visual_blocks": 1,
        "axes_dims": (16, 24, 24),
    },
}
FAMILIES = ("sd15", "sdxl", "flux")  # those that tests run over unless they say otherwise
INPUTS = {  # of a small model: the width of its text, of its pooled text, the shape of a latent
    "sd15": (768, 0, (4, 8, 8)),
    "sdxl": (2048, 1280, (4, 8, 8)),
    "sd35_medium": (64, 32, (16, 16, 16)),
    "flux": (64, 768, (16, 16, 16)),
    "flux2": (64, 0, (128, 8, 8)),
    "flux2_klein": (64, 0, (128, 8, 8)),
    "chroma": (64, 0, (16, 16, 16)),
    "cascade_c": (1280, 1280, (16, 16, 16)),
    "wan_t2v": (32, 0, (16, 1, 16, 16)),
    "qwen_image": (64, 0, (16, 1, 16, 16)),
    "lumina2": (64, 0, (16, 16, 16)),
    "z_image": (64, 0, (16, 16, 16)),
    "kandinsky5": (3584, 768, (16, 1, 16, 16)),
}
CPU = torch.device("cpu")


def mount(comfy_path: Path, *, cuda: bool = False) -> ModuleType:
    """The pack as the host mounts it, with the host importable.

    ComfyUI's folder goes before the repository's: both have a top-level `nodes`, and here the host's is meant. The
    pack's modules are reached through the mount only; `import lora_ops` would make second copies of its classes.
    """
    sys.path.insert(0, str(comfy_path))
    import comfy.cli_args

    comfy.cli_args.args.cpu = not cuda
    spec = importlib.util.spec_from_file_location(MOUNT, PACK / "__init__.py", submodule_search_locations=[str(PACK)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[MOUNT] = module
    spec.loader.exec_module(module)
    return module


def model(family: str, dtype: torch.dtype = torch.float32, *, smaller: bool = True):
    """A ModelPatcher around a random model of this family, of megabytes or of the real size."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    name, config = (PUBLISHED | VARIANTS)[family]
    made = getattr(comfy.supported_models, name)(config | (SMALLER[family] if smaller else {}))
    made.set_inference_dtype(dtype, None if dtype.itemsize > 1 else torch.float32)  # fp8 is stored, not computed in
    inner = made.get_model({}, "", device=CPU)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in inner.diffusion_model.parameters():
            fan_in = max(1, weight.shape[1:].numel())
            weight.requires_grad_(False).copy_(torch.randn(weight.shape, generator=generator) / fan_in**0.5)
        for name, buffer in inner.diffusion_model.named_buffers():
            if name == "pos_embed":  # which only a file fills
                buffer.zero_()
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(inner, device, CPU)


def patched_weights(patcher) -> dict[str, torch.Tensor]:
    """Each patched weight as the host computes it when it loads the model."""
    return {key: patcher.patch_weight_to_device(key, CPU, return_weight=True) for key in patcher.patches}


def weights(patcher) -> dict[str, torch.Tensor]:
    """The model's weights now, copied."""
    return {key: tensor.clone() for key, tensor in patcher.model.state_dict().items()}


def run(patcher, side: int = 16) -> torch.Tensor:
    """One call of the model, loaded by the host as for sampling."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([patcher])
    return call(patcher, side)


def call(patcher, side: int = 16) -> torch.Tensor:
    """One call of the model as it is now, on inputs that depend on nothing but the latent's side."""
    generator = torch.Generator().manual_seed(1)
    inner, config = patcher.model, patcher.model.model_config.unet_config

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(patcher.load_device)

    context = config.get("context_dim") or config["context_in_dim"]
    extra = {}
    if width := config.get("adm_in_channels") or config.get("vec_in_dim"):
        extra["y"] = noise(1, width)
    if config.get("guidance_embed"):
        extra["guidance"] = torch.tensor([3.5], device=patcher.load_device)
    with torch.no_grad():
        return inner.apply_model(
            noise(1, inner.latent_format.latent_channels, side, side),
            torch.tensor([0.5], device=patcher.load_device),
            c_crossattn=noise(1, 7, context),
            transformer_options={"wrappers": patcher.wrappers},  # as the host hands them over when it samples
            **extra,
        )


def answer(patcher, family: str) -> torch.Tensor:
    """One call of a small model of any family, loaded by the host, what it is told made of a conditioning by its own
    code."""
    import comfy.model_management
    import comfy.sampler_helpers
    import comfy.samplers

    comfy.model_management.load_models_gpu([patcher])
    width, pooled, shape = INPUTS[family]
    generator = torch.Generator().manual_seed(1)
    latent, text = torch.randn((1, *shape), generator=generator), torch.randn((1, 7, width), generator=generator)
    options = {"pooled_output": torch.randn((1, pooled), generator=generator) if pooled else None}
    entries = comfy.sampler_helpers.convert_cond([[text, options]])
    extra = {"latent_image": latent, "denoise_mask": None, "seed": 0}
    told = comfy.samplers.encode_model_conds(patcher.model.extra_conds, entries, latent, CPU, "positive", **extra)
    conditions = {
        name: each.process_cond(batch_size=1, area=None).cond for name, each in told[0]["model_conds"].items()
    }
    with torch.no_grad():
        options = {"wrappers": patcher.wrappers}
        return patcher.model.apply_model(latent, torch.tensor([0.5]), transformer_options=options, **conditions)
