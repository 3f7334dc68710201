"""The host as the oracle of names: what it knows means the same place to us, for the real size of every family."""

from __future__ import annotations

import importlib

import pytest
import torch

from harness.configs import PUBLISHED

TEXT_ENCODERS = {
    "sd15": "comfy.sd1_clip.SD1ClipModel",
    "sd2": "comfy.text_encoders.sd2_clip.SD2ClipModel",
    "sdxl": "comfy.sdxl_clip.SDXLClipModel",
    "sd3": "comfy.text_encoders.sd3_clip.SD3ClipModel",
    "flux": "comfy.text_encoders.flux.FluxClipModel",
    "chroma": "comfy.text_encoders.pixart_t5.PixArtT5XXL",
    "hunyuan_video": "comfy.text_encoders.hunyuan_video.HunyuanVideoClipModel",
    "cascade_c": "comfy.sdxl_clip.StableCascadeClipModel",
    "wan": "comfy.text_encoders.wan.WanT5Model",
    "qwen_image": "comfy.text_encoders.qwen_image.QwenImageTEModel",
    "z_image": "comfy.text_encoders.z_image.ZImageTEModel",
    "lumina2": "comfy.text_encoders.lumina2.LuminaModel",
    "kandinsky5": "comfy.text_encoders.kandinsky5.Kandinsky5TEModel",
    "anima": "comfy.text_encoders.anima.AnimaTEModel",
}
# The host maps FLUX.1, FLUX.2 and Chroma by one table: these are names of modules that the model at hand has not. The
# others are SD2 unCLIP's, a ControlNet's, and the host's own step on the way from x-flux.
FOREIGN = {
    "sdxl": ("class_embedding",),
    "flux": ("ff.linear_", "ff_linear_", "ff_context", "qkv_mlp_proj", "attn.to_out", "attn_to_out", "linear1_qkv"),
    "flux2": (
        "time_text_embed",
        "ff.net",
        "ff_net",
        "ff_context",
        "attn.to_",
        "attn_to_",
        "proj_mlp",
        "proj_out",
        "linear1_qkv",
    ),
}
FOREIGN |= {"flux2_klein": FOREIGN["flux2"], "chroma": FOREIGN["flux"]}
# Lumina has fewer heads of keys and values; the host gives them as many rows as queries, past the weight's end.
MISTAKEN = {"lumina2": ("to_k", "to_v")}
PROJECTION = {"lora_te2_text_projection", "lora_prior_te_text_projection"}  # of CLIP-G: the host never asks whose it is


def places(model) -> dict[str, tuple]:
    """The host's names of a denoiser's matrices -> (key, (first row, rows), whether its halves are swapped)."""
    import comfy.lora

    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    found = {}
    for name, place in comfy.lora.model_lora_keys_unet(model, {}).items():
        key, offset, function = (place, None, None) if isinstance(place, str) else (*place, None)[:3]
        if key.endswith(".weight") and len(shapes.get(key, ())) > 1:
            found[name] = key, tuple(offset[1:]) if offset else (0, shapes[key][0]), function is not None
    return found


@pytest.mark.parametrize("family", PUBLISHED)
def test_every_name_the_host_knows_means_the_same_rows_to_us(pack, ours, family):
    import comfy.supported_models

    cls, config = PUBLISHED[family]
    model = getattr(comfy.supported_models, cls)(dict(config)).get_model({}, "", device=torch.device("meta"))
    families, dialects = ours("lora_ops.families"), ours("lora_ops.dialects")
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert families.recognise(shapes).name == family
    names = dialects.target_map(families.recognise(shapes), shapes).names
    known = {name: place for name, place in places(model).items() if not name.endswith(MISTAKEN.get(family, ()))}
    assert len(known) > 100
    for name in known.keys() & names.keys():
        target = names[name].target
        assert (target.key, (target.rows.start, target.rows.length), target.swap) == known[name], name
    holes = known.keys() - names.keys()
    assert {name for name in holes if not any(word in name for word in FOREIGN.get(family, ()))} == set()


@pytest.mark.parametrize("family", TEXT_ENCODERS)
def test_every_text_encoder_name_the_host_knows_means_the_same_weight_to_us(pack, ours, family):
    import comfy.lora

    module, _, cls = TEXT_ENCODERS[family].rpartition(".")
    encoder = getattr(importlib.import_module(module), cls)(device="meta", dtype=torch.float16)
    shapes = {key: tuple(tensor.shape) for key, tensor in encoder.state_dict().items()}
    families, dialects = ours("lora_ops.families"), ours("lora_ops.dialects")
    assert families.recognise(shapes).name == family
    names = dialects.target_map(families.recognise(shapes), shapes).names
    known = {name: key for name, key in comfy.lora.model_lora_keys_clip(encoder, {}).items() if len(shapes[key]) > 1}
    assert len(known) > 100
    assert [name for name in known.keys() & names.keys() if names[name].target.key != known[name]] == []
    assert known.keys() - names.keys() <= PROJECTION
