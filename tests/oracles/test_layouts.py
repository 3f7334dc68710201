"""diffusers and PEFT as oracles: they load what we write, and merge what we merge."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch

from lora_ops.adapters import LowRank
from lora_ops.dialects import target_map
from lora_ops.families import FAMILIES, flux, text, unet
from lora_ops.files import TensorFile
from lora_ops.landing import land, merged
from lora_ops.layouts import LAYOUTS, write
from lora_ops.layouts.factors import overlap
from lora_ops.lora import Band, Lora, TargetMap, from_file, read_lora
from lora_ops.stack import Entry

peft = pytest.importorskip("peft", reason="peft is the oracle here; it is in the test environment")
diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle here; it is in the test environment")
loaders = pytest.importorskip("diffusers.loaders")

KOHYA, COMFY, DIFFUSERS, PEFT, LYCORIS = LAYOUTS
BY_NAME = {family.name: family for family in FAMILIES}
CHANNELS = {"sd15": (1, 2, 4, 4), "sdxl": (1, 2, 4)}


def unet_model(name: str):
    """A tiny UNet of diffusers, and its shapes under the host's names."""
    widths = tuple(32 * multiplier for multiplier in CHANNELS[name])
    blocks = len(widths)
    settings: dict = {"cross_attention_dim": 16, "attention_head_dim": 8, "block_out_channels": widths}
    if name == "sdxl":
        settings |= {
            "transformer_layers_per_block": (1, 1, 2),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 2,
            "projection_class_embeddings_input_dim": 24,
        }
    cross = [True] * (blocks - 1) + [False] if name == "sd15" else [False, True, True]
    down = tuple("CrossAttnDownBlock2D" if each else "DownBlock2D" for each in cross)
    up = tuple("CrossAttnUpBlock2D" if each else "UpBlock2D" for each in reversed(cross))
    model = diffusers.UNet2DConditionModel(**settings, down_block_types=down, up_block_types=up)
    depths = {"sd15": (1, 1, 1, 0), "sdxl": (0, 1, 2)}[name]
    shapes = unet.shapes(
        channels=32,
        multipliers=CHANNELS[name],
        depths=depths,
        middle_depth=max(depths),
        context=16,
        linear_projection=name == "sdxl",
        vector=24 if name == "sdxl" else None,
    )
    return model, shapes


def flux_model():
    model = diffusers.FluxTransformer2DModel(
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=4096,
        pooled_projection_dim=768,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
    )
    return model, flux.flux1_shapes(hidden=16, double=2, single=2)


MODELS = {"sd15": partial(unet_model, "sd15"), "sdxl": partial(unet_model, "sdxl"), "flux": flux_model}


def lora_for(targets: TargetMap, dialect: str, wanted: str = "", alphas=(1.0, 0.3, 8.0, None)) -> Lora:
    """A random LoRA on the matrices of a model, each once: ranks and alphas of the modules differ."""
    generator = torch.Generator().manual_seed(0)
    modules: dict[str, LowRank] = {}
    taken: dict[str, list[Band]] = {}
    for name, (target, spoken) in targets.names.items():
        bands = taken.setdefault(target.key, [])
        if spoken != dialect or len(target.shape) == 1 or not re.search(wanted, target.key):
            continue
        if not any(overlap(target.rows, band).length for band in bands):
            bands.append(target.rows)
            rows, *inputs = target.delta_shape
            rank = 2 + len(modules) % 3
            up = torch.randn(rows, rank, *(1 for _ in inputs[1:]), generator=generator)
            alpha = None if target.band else alphas[len(modules) % len(alphas)]
            modules[name] = LowRank(up, torch.randn(rank, *inputs, generator=generator), alpha)
    assert len(modules) > 5
    return Lora("source", modules)


def truth(model, lora: Lora, targets: TargetMap) -> dict[str, torch.Tensor]:
    """The model's weights with the LoRA in them, as we land it: each diffusers name takes its rows of the update."""
    landing = land([Entry(lora, {"model": 1.0, "clip": 1.0})], targets)
    assert not landing.rows[0].refused
    weights = {key: weight.detach().clone() for key, weight in model.state_dict().items()}
    changed = {}
    for name, (target, _) in targets.names.items():
        key = f"{name.removeprefix('unet.').removeprefix('transformer.')}.weight"
        if key in weights and (pieces := landing.pieces.get((target.part, target.key))):
            update = merged(torch.zeros(target.shape), pieces).narrow(0, target.rows.start, target.rows.length)
            if target.swap:
                update = torch.cat(update.chunk(2)[::-1])
            if update.any():
                changed[key] = weights[key] + update.reshape(weights[key].shape)
    assert len(changed) > 10
    return {**weights, **changed}


def require_equal(found, expected) -> None:
    assert found.keys() == expected.keys()
    for key, weight in expected.items():
        # both in float32; the sums of up to 4 products are taken in another order
        torch.testing.assert_close(found[key], weight, rtol=1e-5, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}")


def weights_of(model):
    """A model's weights after its LoRA is merged and taken out, under their own names."""
    found = {key.replace(".base_layer", ""): weight for key, weight in model.state_dict().items()}
    return {key: weight for key, weight in found.items() if ".lora_" not in key}


@pytest.fixture(params=MODELS)
def case(request):
    torch.manual_seed(0)
    model, shapes = MODELS[request.param]()
    shapes = {f"diffusion_model.{key}": shape for key, shape in shapes.items()}
    family = BY_NAME[request.param]
    return model, shapes, family, target_map(family, shapes)


SOURCES = pytest.mark.parametrize("source", ["kohya", "diffusers"])


@SOURCES
def test_peft_loads_our_folder_and_merges_what_we_merge(tmp_path, case, source):
    model, shapes, family, targets = case
    lora = lora_for(targets, source)
    expected = truth(model, lora, targets)
    write(tmp_path / "lora", lora, PEFT, family, shapes=shapes)
    loaded = peft.PeftModel.from_pretrained(model, str(tmp_path / "lora"))
    require_equal(loaded.merge_and_unload().state_dict(), expected)


@SOURCES
def test_a_diffusers_model_loads_our_file_and_merges_what_we_merge(tmp_path, case, source):
    model, shapes, family, targets = case
    lora = lora_for(targets, source)
    expected = truth(model, lora, targets)
    write(tmp_path / "lora.safetensors", lora, DIFFUSERS, family, shapes=shapes)
    prefix = "transformer" if family.name == "flux" else "unet"
    model.load_lora_adapter(str(tmp_path / "lora.safetensors"), prefix=prefix, use_safetensors=True)
    model.fuse_lora()
    require_equal(weights_of(model), expected)


# What diffusers' converters know of the native names; for linear1 they know the width of the published FLUX only.
USUAL = r"attn.*to_|ff\.net|_attn\.(qkv|proj)|_mlp|linear2\.|_mod\.lin|modulation\.lin"


@pytest.mark.parametrize("layout", LAYOUTS[:3], ids=lambda layout: layout.name)
def test_a_diffusers_pipeline_loads_our_files_at_the_right_scale(tmp_path, case, layout):
    model, shapes, family, targets = case
    if layout is COMFY and family.name != "flux":
        pytest.skip("diffusers has no converter for ComfyUI's names of a UNet")
    # Of different alphas its UNet converter loses those of the attentions: they have ".processor." in its patterns.
    one_alpha = layout is KOHYA and family.name != "flux"
    lora = lora_for(targets, "kohya", USUAL, *([(0.7,)] if one_alpha else []))
    expected = truth(model, lora, targets)
    path = tmp_path / "lora.safetensors"
    write(path, lora, layout, family, shapes=shapes)
    if family.name == "flux":
        mixin = loaders.FluxLoraLoaderMixin
        state, alphas, metadata = mixin.lora_state_dict(str(path), return_alphas=True, return_lora_metadata=True)
        mixin.load_lora_into_transformer(state, alphas, model, metadata=metadata)
    else:
        mixin = loaders.StableDiffusionXLLoraLoaderMixin
        state, alphas, metadata = mixin.lora_state_dict(str(path), unet_config=model.config, return_lora_metadata=True)
        mixin.load_lora_into_unet(state, alphas, model, metadata=metadata)
    model.fuse_lora()
    require_equal(weights_of(model), expected)


@pytest.mark.parametrize("kind", ["CLIPTextModel", "CLIPTextModelWithProjection"])
def test_a_text_encoder_gets_what_we_write_for_it(tmp_path, kind):
    """transformers 5 leaves out `text_model.` in one of these, and PEFT knows a module by the end of its name."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=50, hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, bos_token_id=1
    )
    model = getattr(transformers, kind)(config)
    shapes = {f"clip_l.transformer.{key}": shape for key, shape in text.clip_shapes(layers=2, width=16).items()}
    family = BY_NAME["sd15"]
    targets = target_map(family, shapes)
    lora = lora_for(targets, "kohya", r"layers")
    write(tmp_path / "lora.safetensors", lora, DIFFUSERS, family, shapes=shapes)
    mixin = loaders.StableDiffusionLoraLoaderMixin
    state, alphas, metadata = mixin.lora_state_dict(str(tmp_path / "lora.safetensors"), return_lora_metadata=True)
    mixin.load_lora_into_text_encoder(state, alphas, model, prefix="text_encoder", metadata=metadata)
    loaded = {name.removeprefix("text_model."): module for name, module in model.named_modules()}
    for name, adapter in lora.modules.items():
        target = targets.names[name].target
        layer = loaded[target.key.removeprefix("clip_l.transformer.text_model.").removesuffix(".weight")]
        found = layer.get_delta_weight(layer.active_adapters[0]).detach()
        torch.testing.assert_close(found, adapter.delta(target.shape), rtol=1e-5, atol=2e-5)


def test_a_dora_that_peft_saved_is_written_as_peft_loads_it(tmp_path):
    torch.manual_seed(0)
    model, shapes = unet_model("sd15")
    shapes = {f"diffusion_model.{key}": shape for key, shape in shapes.items()}
    start = {key: weight.clone() for key, weight in model.state_dict().items()}
    config = peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["to_q", "to_k", "proj_in", "conv1"])
    trained = peft.get_peft_model(model, config)
    for name, parameter in trained.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data * 1.1 + 0.01 * torch.randn(parameter.shape)
    trained.save_pretrained(tmp_path / "theirs")
    expected = {key: weight.clone() for key, weight in trained.merge_and_unload().state_dict().items()}
    write(tmp_path / "ours", read_lora(str(tmp_path / "theirs")), PEFT, BY_NAME["sd15"], shapes=shapes)
    model.load_state_dict(start)
    again = peft.PeftModel.from_pretrained(model, str(tmp_path / "ours")).merge_and_unload().state_dict()
    require_equal(again, expected)
    assert sum(not torch.equal(again[key], start[key]) for key in start) > 30


def of_every_algebra(module: str, rows: int, inputs: int) -> dict[str, dict[str, torch.Tensor]]:
    """Random factors of each algebra that LyCORIS has, as files spell them."""
    generator = torch.Generator().manual_seed(1)

    def made(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
        noise = {name: torch.randn(shape, generator=generator) / 2 for name, shape in shapes.items()}
        return {f"{module}.{name.replace('__', '.')}": tensor for name, tensor in noise.items()}

    factors = {"lora_down__weight": (2, inputs), "lora_up__weight": (rows, 2), "alpha": ()}
    halves = {"hada_w1_a": (rows, 2), "hada_w1_b": (2, inputs), "hada_w2_a": (rows, 2), "hada_w2_b": (2, inputs)}
    return {
        "LoRA": made(**factors),
        "DoRA": made(**factors, dora_scale=(rows, 1)),
        "LoHa": made(**halves),  # at scale 1: when it merges, LyCORIS takes the scale of a LoHa twice
        "LoKr": made(lokr_w1=(4, 4), lokr_w2=(rows // 4, inputs // 4)),  # as LyCORIS itself cuts 16 and 64
        "Diag-OFT": made(oft_blocks=(rows // 4, 4, 4)),
    }


@pytest.mark.parametrize("algebra", ["LoRA", "DoRA", "LoHa", "LoKr", "Diag-OFT"])
def test_lycoris_loads_our_file_of_parts_of_fused_weights_and_merges_what_we_merge(tmp_path, algebra):
    wrapper = pytest.importorskip("lycoris.wrapper", reason="lycoris is the oracle here; it is in the test environment")
    torch.manual_seed(0)
    model, shapes = flux_model()
    shapes = {f"diffusion_model.{key}": shape for key, shape in shapes.items()}
    targets, tensors = target_map(BY_NAME["flux"], shapes), {}
    parts = ("single_transformer_blocks.1.attn.to_v", "transformer_blocks.0.attn.add_k_proj", "proj_out")
    before = {part: model.get_submodule(part).weight.detach().clone() for part in parts}
    for part, weight in before.items():
        tensors |= of_every_algebra(f"transformer.{part}", *weight.shape)[algebra]
    lora = from_file(TensorFile("parts", tensors))
    assert lora.modules.keys() == {f"transformer.{part}" for part in parts} and not lora.leftover
    landing = land([Entry(lora, {"model": 1.0})], targets)
    write(tmp_path / "lora.safetensors", lora, LYCORIS, BY_NAME["flux"], shapes=shapes)
    network, _ = wrapper.create_lycoris_from_weights(1.0, str(tmp_path / "lora.safetensors"), model)
    assert len(network.loras) == len(parts)
    network.merge_to(1.0)
    for part, weight in before.items():
        target, _ = targets.names[f"transformer.{part}"]
        whole = torch.zeros(target.shape)
        whole.narrow(0, target.rows.start, target.rows.length).copy_(weight)
        ours = merged(whole, landing.pieces[target.part, target.key])
        ours = ours.narrow(0, target.rows.start, target.rows.length)
        theirs = model.get_submodule(part).weight.detach()
        # both in float32: a few units in the last place of the sums
        assert (ours - theirs).norm() < 1e-5 * (theirs - weight).norm() and not torch.equal(theirs, weight), part
