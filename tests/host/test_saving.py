"""Saved models: reopened by the host's own loaders they are the live, patched model."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from harness import inside, small
from harness.inside import patched_weights

# CLIP-L of SD1.5 has no such weights: the host leaves what is in its memory there and never uses it.
UNUSED = ("clip_l.logit_scale", "clip_l.transformer.text_projection.weight")
LAYERS = 2  # of the 12 of CLIP-L: the host takes any number if it is told, of a CLIP file by another name
SHORT = {name: {"num_hidden_layers": LAYERS} for name in ("clip_l_model_config", "model_config")}


@pytest.fixture
def output(tmp_path, pack):
    import folder_paths

    before = folder_paths.get_output_directory()
    folder_paths.set_output_directory(str(tmp_path))
    yield tmp_path
    folder_paths.set_output_directory(before)


@pytest.fixture
def save(ours, output):
    """save(layout, dtype, model=…, clip=…, vae=…): what the node does, without its wires."""
    saving, checkpoints = ours("nodes.host.saving"), ours("nodes.host.checkpoints")
    destinations = ours("nodes.host.destinations")

    def put(
        layout,
        dtype=None,
        *,
        prefix="saved",
        if_exists="number",
        graph=None,
        progress=lambda *_: None,
        shard=5e9,
        **things,
    ):
        parts = {name: checkpoints.Part(name, thing, dtype) for name, thing in things.items() if thing is not None}
        to = destinations.destination("output", checkpoints.FOLDERS[layout], prefix, {})
        return saving.save(layout, parts, to, if_exists, graph or {}, progress, shard)

    return put


@pytest.fixture(scope="module")
def checkpoint(ours, small_files, tmp_path_factory):
    """The small SD1.5 checkpoint in fp16, but for most layers of its CLIP, as CheckpointLoaderSimple loads it: MODEL,
    CLIP, VAE."""
    files, path = ours("lora_ops.files"), tmp_path_factory.mktemp("short") / "sd15.safetensors"
    header = files.read_header(small_files / small.FILES["sd15"][0])
    kept = [
        key
        for key in header.entries
        if not (found := re.search(r"encoder\.layers\.(\d+)", key)) or int(found[1]) < LAYERS
    ]
    files.write(path, dict(files.read_tensors(header, kept)), overwrite=False)
    return load_checkpoint(path)


def load_checkpoint(path):
    import comfy.sd

    return comfy.sd.load_checkpoint_guess_config(str(path), te_model_options=SHORT)[:3]


@pytest.fixture
def landing(ours, checkpoint):
    """A LoRA on MODEL and CLIP of the checkpoint."""
    made, patching, files = ours("lora_ops.samples"), ours("nodes.host.patching"), ours("lora_ops.files")
    lora, stack, landing = ours("lora_ops.lora"), ours("lora_ops.stack"), ours("lora_ops.landing")
    targets = patching.targets(*checkpoint[:2])
    tensors = made.tensors(made.SAMPLES[0], targets)
    generator = torch.Generator().manual_seed(1)
    noise = {key: torch.randn(each.shape, generator=generator) * 0.02 for key, each in tensors.items()}
    tensors = {key: each if key.endswith(".alpha") else each + noise[key] for key, each in tensors.items()}
    entry = stack.Entry(lora.from_file(files.TensorFile("ink", tensors)), {"model": 0.7, "clip": 0.7})
    return landing.land([entry], targets)


@pytest.fixture
def patched(ours, checkpoint, landing):
    """MODEL and CLIP with that LoRA."""
    return ours("nodes.host.patching").applied(landing, "patch", *checkpoint[:2])


def live(patcher):
    """The model's weights with its patches, as the host has them once it has loaded it."""
    return {**patcher.model.state_dict(), **patched_weights(patcher)}


def differing(one, other, keys=None):
    return sorted(key for key in keys or other if not torch.equal(one[key], other[key]))


FLOAT32 = [(family, torch.float32) for family in ("sd15", "flux", "sd35_medium", "wan", "z_image")]


@pytest.mark.parametrize(("family", "dtype"), [*FLOAT32, ("sdxl", torch.float16), ("flux", torch.bfloat16)])
def test_a_saved_diffusion_model_is_the_patched_one_to_the_bit(family, dtype, save, samples, apply, pack):
    """The narrow route for models that detection pins: the host's classes and name rules without its guess."""
    model = inside.model(family, dtype)
    changed = apply(model, (samples(model, 0, seed=1), 0.7))
    ((saved),) = save("diffusion model", model=changed)
    assert saved.verified.equal == saved.verified.weights == len(model.model.diffusion_model.state_dict())
    assert set(saved.dtypes) == {str(dtype).removeprefix("torch.")}
    again = reloaded(family, saved.path, dtype)
    assert differing(again.model.state_dict(), live(changed)) == []
    assert torch.equal(latents(family, again), latents(family, changed))


INPUTS = {  # latent, text, and what else
    "sd35_medium": ((1, 16, 8, 8), (1, 7, 64), {"y": (1, 32)}),
    "wan": ((1, 16, 1, 8, 8), (1, 7, 4096), {"c_concat": (1, 20, 1, 8, 8), "clip_fea": (1, 257, 1280)}),
    "z_image": ((1, 16, 8, 8), (1, 7, 64), {"num_tokens": 7}),
}


def latents(family, patcher):
    """One call of the model, loaded by the host as for sampling."""
    import comfy.model_management

    if family in inside.FAMILIES:
        return inside.run(patcher)
    comfy.model_management.load_models_gpu([patcher])
    generator = torch.Generator().manual_seed(1)
    shape, context, more = INPUTS[family]
    x, text = torch.randn(shape, generator=generator), torch.randn(context, generator=generator)
    more = {
        name: torch.randn(each, generator=generator) if isinstance(each, tuple) else each for name, each in more.items()
    }
    with torch.no_grad():
        return patcher.model.apply_model(x, torch.tensor([0.5]), c_crossattn=text, transformer_options={}, **more)


def reloaded(family, path, dtype):
    """What the host's own loader makes of the file, or of a file of a narrow model by all its rules but the guess."""
    import comfy.model_detection
    import comfy.sd
    import comfy.utils

    if family in ("flux", "sd35_medium", "wan") and dtype == torch.float32:  # it computes in float32 on a CPU
        return comfy.sd.load_diffusion_model(str(path), model_options={"dtype": dtype})
    fresh, file = inside.model(family, dtype), comfy.utils.load_torch_file(str(path))
    with torch.no_grad():
        for weight in fresh.model.diffusion_model.parameters():
            weight.zero_()
    prefix = comfy.model_detection.unet_prefix_from_state_dict(file)
    fresh.model.load_model_weights(file, prefix if any(key.startswith(prefix) for key in file) else "")
    return fresh


def test_a_full_checkpoint_keeps_its_files_dtypes_and_reopens_within_one_rounding(save, checkpoint, patched):
    _, _, vae = checkpoint
    ((saved),) = save("full checkpoint", model=patched.model, clip=patched.clip, vae=vae)
    assert saved.dtypes == {"float16": saved.tensors} and saved.verified.ulps == 0.5
    model, clip, again = load_checkpoint(saved.path)
    wanted = live(patched.model)
    for key, weight in model.model.diffusion_model.state_dict().items():
        assert torch.equal(weight, wanted[f"diffusion_model.{key}"].half().float()), key
    # A text encoder stays in fp16 on a CPU, too: no rounding is left.
    wanted = live(patched.clip.patcher)
    read = clip.cond_stage_model.state_dict()
    assert differing(read, wanted, [key for key in read if key not in UNUSED]) == []
    assert differing(again.get_sd(), vae.get_sd()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_part_is_written_in_the_dtype_that_is_asked_for(dtype, save, checkpoint, patched):
    ((saved),) = save("diffusion model", dtype, model=patched.model)
    assert set(saved.dtypes) == {str(dtype).removeprefix("torch.")}
    assert saved.verified.ulps == (0 if dtype == torch.float32 else 0.5)  # live it is float32


def test_clip_and_vae_reopen_from_files_of_their_own(ours, save, checkpoint, patched):
    import comfy.sd
    import comfy.utils

    ((saved),) = save("CLIP", clip=patched.clip)
    recipe = ours("lora_ops.recipe").Recipe.of_metadata(ours("lora_ops.files").read_header(saved.path).metadata, "")
    assert [dict(each.strengths) for each in recipe.loras] == [{"clip": 0.7}]
    clip = comfy.sd.load_clip([str(saved.path)], model_options=SHORT)
    wanted = live(patched.clip.patcher)
    read = clip.cond_stage_model.state_dict()
    assert differing(read, wanted, [key for key in read if key not in UNUSED]) == []
    vae = checkpoint[2]
    ((saved),) = save("VAE", vae=vae)
    assert differing(comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(saved.path))).get_sd(), vae.get_sd()) == []


@pytest.fixture(scope="module")
def quantised(ours, pack, tmp_path_factory):
    """quantised(algorithm): a small FLUX model of which some Linears are quantised, by the host's own loader."""
    import comfy.sd
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    def load(algorithm):
        if algorithm not in QUANT_ALGOS:
            pytest.skip("this host has no such format")
        path = tmp_path_factory.mktemp("quantised") / f"{algorithm}.safetensors"
        found = dict(inside.model("flux").model.diffusion_model.state_dict())
        for module in [key.removesuffix("weight") for key in found if re.search(r"linear\d\.weight", key)]:
            weight = QuantizedTensor.from_float(
                found.pop(f"{module}weight"), QUANT_ALGOS[algorithm]["comfy_tensor_layout"]
            )
            exponents = torch.float8_e8m0fnu
            for name, tensor in weight.state_dict(f"{module}weight").items():
                found[name] = tensor.view(torch.uint8) if tensor.dtype == exponents else tensor
            found[f"{module}comfy_quant"] = torch.tensor(
                list(f'{{"format": "{algorithm}"}}'.encode()), dtype=torch.uint8
            )
        ours("lora_ops.files").write(path, found, overwrite=False)
        return comfy.sd.load_diffusion_model(str(path), model_options={"dtype": torch.float32})

    return load


def test_a_model_that_is_loaded_is_compared_with_what_it_samples_with(save, samples, apply, ours):
    """Not with the same computation again: that would be as wrong as the file."""
    import comfy.model_management

    model = inside.model("flux")
    changed = apply(model, (samples(model, 0, seed=1), 0.7))
    comfy.model_management.load_models_gpu([changed])
    ((saved),) = save("diffusion model", model=changed)
    assert saved.verified.loaded == len(changed.patches) > 10
    saved.path.unlink()
    key = next(iter(changed.patches))
    changed.backup[key].weight.add_(1)  # the file will be computed from another base than the loaded weight was
    with pytest.raises(ours("lora_ops.errors").FileError, match="more than rounding explains") as caught:
        save("diffusion model", model=changed)
    assert key.endswith(caught.value.module) and not list(saved.path.parent.glob("*.safetensors"))


def floats(patcher):
    """The model's values, as float32."""
    state = {key: each for key, each in patcher.model.named_parameters() if key.endswith(("weight", "bias", "scale"))}
    return {key: each.dequantize() if hasattr(each, "dequantize") else each for key, each in state.items()}


@pytest.mark.parametrize("algorithm", ["float8_e4m3fn", "nvfp4", "mxfp8", "int8_tensorwise"])
def test_a_quantised_model_is_saved_as_the_host_would_store_it_patched(
    algorithm, quantised, save, samples, apply, ours, monkeypatch
):
    import comfy.sd

    model = quantised(algorithm)
    changed = apply(model, (samples(model, 0, seed=1), 0.7), mode="patch")
    baking, made = ours("nodes.host.baking"), Counter()
    floats_of = baking.Quantised.floats
    monkeypatch.setattr(baking.Quantised, "floats", lambda each: (made.update([each.key]), floats_of(each))[1])
    heard = []
    ((saved),) = save("diffusion model", model=changed, progress=lambda *told: heard.append(told))
    data = saved.bytes - ours("lora_ops.files").read_header(saved.path).data_start
    assert {total > 3 * data for _, total in heard} == {algorithm != "mxfp8"} and heard[-1][0] == heard[-1][1]
    # once for what is written, once to compare, once for the number that is written long before its weight
    assert made and set(made.values()) == {2 if algorithm == "mxfp8" else 3}
    assert saved.verified.equal == saved.verified.weights == len(model.model.diffusion_model.state_dict())
    again = comfy.sd.load_diffusion_model(str(saved.path), model_options={"dtype": torch.float32})
    before, wanted, found = floats(model), patched_weights(changed), floats(again)
    assert type(again.model.diffusion_model.single_blocks[0].linear2.weight).__name__ == "QuantizedTensor"
    for key, weight in found.items():
        expected = wanted.get(key, before[key])
        assert torch.equal(weight, expected.dequantize() if hasattr(expected, "dequantize") else expected), key
    assert wanted and differing(found, before) == sorted(wanted)


def test_a_quantised_model_is_saved_as_floats_where_a_dtype_is_asked_for(quantised, save, samples, apply):
    import comfy.sd

    model = quantised("float8_e4m3fn")
    changed = apply(model, (samples(model, 0, seed=1), 0.7), mode="auto")
    assert changed.get_attachment("lora_ops_live") is not None  # mode auto: its weights would lose much of the update
    ((saved),) = save("diffusion model", torch.float32, model=changed)
    assert set(saved.dtypes) == {"float32"}
    again = comfy.sd.load_diffusion_model(str(saved.path), model_options={"dtype": torch.float32})
    before, found = floats(model), floats(again)
    plain = inside.model("flux")
    tensors = samples(model, 0, seed=1)
    change = patched_weights(apply(plain, (tensors, 0.7), mode="patch"))
    assert found.keys() == before.keys()
    for key, weight in found.items():
        delta = change[key] - floats(plain)[key] if key in change else 0
        assert torch.allclose(weight, before[key] + delta, rtol=0, atol=1e-5), key


SHARDED = "sharded diffusers folder"
DIFFUSERS = (
    *("sd15", "sdxl", "sd35_medium", "flux", "flux2", "flux2_klein", "chroma"),
    *("wan_t2v", "lumina2", "qwen_image"),
)


def outputs(family, patcher, theirs, side=8):
    """What the host's network and diffusers' make of the same inputs."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([patcher])
    mine, generator = patcher.model.diffusion_model, torch.Generator().manual_seed(1)
    time = torch.tensor([0.5])
    with torch.no_grad():
        if family == "sd15":
            x, context = torch.randn(1, 4, side, side, generator=generator), torch.randn(1, 7, 768, generator=generator)
            return mine(x, time, context), theirs(x, time, context).sample
        x, context = torch.randn(1, 16, side, side, generator=generator), torch.randn(1, 7, 64, generator=generator)
        pooled = torch.randn(1, 768, generator=generator)
        packed = torch.nn.functional.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)
        places = torch.cartesian_prod(torch.zeros(1), *[torch.arange(side / 2)] * 2)
        found = theirs(packed, context, pooled, time, places, torch.zeros(7, 3), torch.tensor([3.5])).sample
        back = found.transpose(1, 2).unflatten(2, (side // 2, side // 2))
        return mine(x, time, context, pooled, torch.tensor([3.5])), torch.nn.functional.pixel_shuffle(back, 2)


@pytest.mark.parametrize("family", DIFFUSERS)
def test_diffusers_loads_a_sharded_folder_with_every_weight_of_the_live_model(
    family, ours, save, samples, apply, output, pack
):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle here; it is in the test environment")
    model = inside.model(family)
    changed = apply(model, (samples(model, 0, seed=1), 0.7))
    ((saved),) = save(SHARDED, shard=2e7 if family in ("sd15", "sdxl") else 5e5, model=changed)
    assert saved.verified.equal == saved.verified.weights == len(model.model.diffusion_model.state_dict())
    (folder,) = saved.path.iterdir()
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert any("config.json is made from the weights" in note for note in saved.notes)
    kind = json.loads((folder / "config.json").read_text())["_class_name"]
    read, told = getattr(diffusers, kind).from_pretrained(folder, output_loading_info=True)
    assert not any(told.values())
    found, wanted = read.state_dict(), live(changed)
    assert sum(each.numel() for each in found.values()) == sum(
        each.numel() for key, each in wanted.items() if key.startswith("diffusion_model.")
    )
    if family in ("sd15", "flux"):
        assert torch.allclose(*outputs(family, changed, read), rtol=0, atol=1e-4)  # of float32
    opened = ours("lora_ops.checkpoints").opened(saved.path)
    assert opened.targets.family == family.removesuffix("_t2v")
    assert ours("lora_ops.recipe").Recipe.of_metadata(opened.metadata, "").loras


def test_a_folder_keeps_the_config_of_the_one_it_was_loaded_from(ours, save, tmp_path, pack):
    model = inside.model("flux", torch.bfloat16)
    ((first),) = save(SHARDED, model=model)
    (file,) = (first.path / "transformer").glob("*.safetensors")
    assert file.name == "diffusion_pytorch_model.safetensors"  # what fits into one has no index
    (first.path / "transformer/config.json").write_text("{}")
    model.cached_patcher_init = (None, (str(file),))
    ((second),) = save(SHARDED, model=model)
    assert (second.path / "transformer/config.json").read_text() == "{}"
    assert not any("config.json" in note for note in second.notes)


def test_a_model_whose_names_in_diffusers_are_not_all_known_is_no_folder(ours, save, output, pack):
    model = inside.model("flux")
    model.model.diffusion_model.register_buffer("more", torch.zeros(1))
    with pytest.raises(ours("lora_ops.errors").TargetError, match="'more': has no one name in diffusers"):
        save(SHARDED, model=model)
    assert os.listdir(output) == []


def test_a_folder_without_a_config_that_no_shape_tells_says_so(save, pack):
    ((saved),) = save(SHARDED, model=inside.model("cascade_c"))
    assert any("no config.json: take the one of the model" in note for note in saved.notes)


def test_what_runs_live_is_saved_like_a_patch(save, samples, apply, pack):
    model = inside.model("flux")
    tensors = samples(model, 0, seed=1)
    ((one),) = save("diffusion model", model=apply(model, (tensors, 0.7)))
    ((other),) = save("diffusion model", model=apply(model, (tensors, 0.7), mode="live"))
    assert tensors_of(one.path) == tensors_of(other.path)


def tensors_of(path: Path) -> bytes:
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


def test_a_loaded_and_patched_model_is_not_patched_twice(save, samples, apply, pack):
    """The host keeps the base of what it has patched; what is saved starts from there."""
    model = inside.model("flux")
    changed = apply(model, (samples(model, 0, seed=1), 0.7))
    ((before),) = save("diffusion model", model=changed)
    inside.run(changed)
    ((loaded),) = save("diffusion model", model=changed)
    ((base),) = save("diffusion model", model=model)
    assert tensors_of(before.path) == tensors_of(loaded.path) != tensors_of(base.path)
    assert base.verified.equal == base.verified.weights


def test_other_nodes_patches_are_saved_and_their_wrappers_are_told(save, samples, apply, pack):
    import comfy.sd

    model = inside.model("flux")
    theirs = comfy.sd.load_lora_for_models(model, None, dict(samples(model, 0, seed=2)), 0.5, 0)[0]
    changed = apply(theirs, (samples(model, 0, seed=1), 0.7))
    changed.add_wrapper_with_key("diffusion_model", "teacache", lambda executor, *args, **kwargs: executor(*args))
    ((saved),) = save("diffusion model", model=changed)
    assert saved.verified.equal == saved.verified.weights
    assert ["teacache" in note for note in saved.notes if "not in the file" in note] == [True]


def test_a_schedule_cannot_be_saved_and_says_so(ours, save, samples, pack):
    model = inside.model("flux")
    files, lora, stack = ours("lora_ops.files"), ours("lora_ops.lora"), ours("lora_ops.stack")
    landing, patching = ours("lora_ops.landing"), ours("nodes.host.patching")
    found = lora.from_file(files.TensorFile("ink", samples(model, 0, seed=1)))
    entry = stack.Entry(found, {"model": 1.0, "clip": 1.0}, stack.Schedule(0.2, 0.8))
    changed = patching.applied(landing.land([entry], patching.targets(model, None)), "auto", model, None).model
    with pytest.raises(ours("lora_ops.errors").TargetError, match="follows a schedule"):
        save("diffusion model", model=changed)


def test_the_file_says_what_is_in_it(ours, save, patched):
    files, recipe = ours("lora_ops.files"), ours("lora_ops.recipe")
    ((saved),) = save("diffusion model", model=patched.model)
    metadata = files.read_header(saved.path).metadata
    found = recipe.Recipe.parse(metadata["lora_ops.recipe"])
    assert [(each.lora, dict(each.strengths)) for each in found.loras] == [("ink", {"model": 0.7})]
    assert metadata["modelspec.predict_key"] == "epsilon"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1"


def test_metadata_and_flags_of_the_source_are_kept(ours, save, tmp_path, pack):
    """A v-prediction SDXL with zero terminal SNR stays one; a second recipe follows the first."""
    import comfy.model_base

    files, recipe = ours("lora_ops.files"), ours("lora_ops.recipe")
    model = inside.model("sdxl")
    first = recipe.Recipe((recipe.Ingredient("paper", "", {"model": 0.5}),))
    source = tmp_path / "source.safetensors"
    told = {"author": "A. Nonymous", "sshs_model_hash": "0" * 64, "workflow": "{}", "lora_ops.recipe": first.text}
    tensors = {f"model.diffusion_model.{key}": each for key, each in model.model.diffusion_model.state_dict().items()}
    files.write(source, {key: each.half() for key, each in tensors.items()}, told, overwrite=False)
    model.cached_patcher_init = (load_checkpoint, (str(source),))
    model.model.model_type = comfy.model_base.ModelType.V_PREDICTION
    model.model.model_sampling = comfy.model_base.model_sampling(model.model.model_config, model.model.model_type)
    model.model.model_sampling.zsnr = True
    ((saved),) = save("full checkpoint", model=model)
    header = files.read_header(saved.path)
    assert {"v_pred", "ztsnr"} <= header.entries.keys()
    assert header.entries["model.diffusion_model.out.2.weight"].dtype == torch.float16
    assert header.metadata["author"] == "A. Nonymous" and header.metadata["modelspec.predict_key"] == "v"
    assert header.metadata["lora_ops.recipe"] == first.text
    assert not {"sshs_model_hash", "workflow"} & header.metadata.keys()


def test_a_merged_model_is_saved_as_the_patched_one_would_be(ours, save, checkpoint, landing, patched):
    """Its weights are in memory as float32; the file that it came from says fp16, and the recipe what is in it."""
    merging, recipe, files = ours("nodes.host.merging"), ours("lora_ops.recipe"), ours("lora_ops.files")
    merged = merging.merged(landing, *checkpoint[:2])
    ((one),) = save("diffusion model", model=patched.model)
    ((other),) = save("diffusion model", model=merged.model)
    assert tensors_of(one.path) == tensors_of(other.path) and not other.notes
    told = [files.read_header(each.path).metadata["lora_ops.recipe"] for each in (one, other)]
    assert told[0] == told[1] and recipe.Recipe.parse(told[0]).loras


def test_the_graph_is_in_the_file_unless_metadata_is_disabled(ours, save, monkeypatch, pack):
    from comfy.cli_args import args

    saving, files = ours("nodes.host.saving"), ours("lora_ops.files")
    prompt, extra = {"1": {"class_type": "X"}}, {"workflow": {"nodes": []}}
    ((saved),) = save("diffusion model", model=inside.model("flux"), graph=saving.workflow(prompt, extra))
    told = files.read_header(saved.path).metadata
    assert (told["prompt"], told["workflow"]) == ('{"1": {"class_type": "X"}}', '{"nodes": []}')
    monkeypatch.setattr(args, "disable_metadata", True)
    assert saving.workflow(prompt, extra) == {}


def test_a_weight_that_is_not_the_live_one_is_found_and_nothing_is_named(ours, save, samples, apply, output):
    """Verification computes anew: what was written wrong, whoever wrote it, is not saved."""
    baking = ours("nodes.host.baking")
    model = inside.model("flux")
    changed = apply(model, (samples(model, 0, seed=1), 0.7))
    right, key = baking.Weight.chunks, next(iter(changed.patches))

    def wrong(self, dtype):
        return (chunk * (1 + 2**-20) if self.key == key else chunk for chunk in right(self, dtype))

    baking.Weight.chunks = wrong
    try:
        with pytest.raises(ours("lora_ops.errors").FileError, match="more than rounding explains") as refused:
            save("diffusion model", model=changed)
    finally:
        baking.Weight.chunks = right
    assert refused.value.module == key.removeprefix("diffusion_model.")
    assert os.listdir(output) == []


def test_a_weight_that_the_dtype_cannot_hold_is_refused(ours, save, output, pack):
    model = inside.model("flux")
    with torch.no_grad():
        model.model.diffusion_model.img_in.weight[0, 0] = 1e6
    with pytest.raises(ours("lora_ops.errors").ShapeError, match=r"img_in\.weight.*too large for torch\.float16"):
        save("diffusion model", torch.float16, model=model)
    assert os.listdir(output) == []


def test_cancelling_leaves_nothing(save, output, pack):
    class Stopped(BaseException):
        pass

    model = inside.model("flux")
    for share in (0.0, 0.4, 0.7, 0.95):  # writing, reading back, comparing

        def stop(done, total, share=share):
            if done >= share * total:
                raise Stopped

        with pytest.raises(Stopped):
            save("diffusion model", model=model, progress=stop)
        assert os.listdir(output) == []


def test_a_model_is_saved_as_it_is_without_the_hooks_that_run(save, samples, apply, pack):
    """While a hook is in, the host holds back weights that have their patches already."""
    import comfy.hooks
    import comfy.model_management

    model = inside.model("flux")
    changed = apply(model, (samples(model, 0, seed=1), 0.7))
    wanted = live(changed)
    hooks = comfy.hooks.create_hook_lora(dict(samples(model, 0, seed=2)), 0.5, 0)
    comfy.model_management.load_models_gpu([changed])
    changed.register_all_hook_patches(hooks, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model))
    changed.patch_hooks(hooks)
    assert changed.backup.keys() & changed.hook_backup.keys()
    ((saved),) = save("diffusion model", model=changed)
    changed.patch_hooks(None)
    changed.clean_hooks()
    assert differing(reloaded("flux", saved.path, torch.float32).model.state_dict(), wanted) == []


def test_progress_ends_at_its_total(save, pack):
    heard = []
    save("diffusion model", model=inside.model("flux"), progress=lambda *each: heard.append(each))
    done, totals = zip(*heard, strict=True)
    assert list(done) == sorted(done) and len(set(totals)) == 1 and done[-1] == totals[0]


def test_numbers_go_on_and_refuse_refuses(ours, save, pack):
    model = inside.model("flux")
    names = [save("diffusion model", model=model, prefix="a/ink")[0].path.name for _ in range(2)]
    assert names == ["ink_00001_.safetensors", "ink_00002_.safetensors"]
    ((saved),) = save("diffusion model", model=model, prefix="a/ink", if_exists="refuse")
    assert saved.path.name == "ink.safetensors"
    with pytest.raises(ours("lora_ops.errors").FileError, match="exists already"):
        save("diffusion model", model=model, prefix="a/ink", if_exists="refuse")


@pytest.mark.parametrize("layout", ["full checkpoint", "diffusion model", "CLIP", "VAE", SHARDED])
def test_a_layout_without_its_part_says_what_to_connect(layout, ours, save):
    with pytest.raises(ours("lora_ops.errors").TargetError, match="Connect a"):
        save(layout)


@pytest.mark.parametrize("prefix", ["../x", "a/../../x", "/x", "C:/x", "a\\..\\..\\x", "", "a/", "./x", "a/\0"])
def test_a_name_that_leads_out_of_the_folder_is_refused(prefix, ours, output):
    with pytest.raises(ours("lora_ops.errors").FileError, match="no name inside the folder"):
        ours("nodes.host.destinations").destination("output", "vae", prefix, {})
    assert os.listdir(output) == []


def test_a_link_that_leads_out_of_the_folder_is_refused(ours, output, tmp_path_factory):
    (output / "out").symlink_to(tmp_path_factory.mktemp("elsewhere"))
    with pytest.raises(ours("lora_ops.errors").FileError, match="no name inside the folder"):
        ours("nodes.host.destinations").destination("output", "vae", "out/x", {})


def test_tokens_of_a_name_stand_for_the_date_and_for_inputs(ours):
    import time

    destinations = ours("nodes.host.destinations")
    now = time.struct_time((2026, 3, 7, 4, 5, 9, 0, 0, 0))
    prompt = {
        "1": {"class_type": "KSampler", "inputs": {"seed": 42, "model": ["2", 0]}, "_meta": {"title": "Mine"}},
        "2": {"class_type": "Loader", "inputs": {"name": "a/b:c"}, "_meta": {"title": "Load it"}},
    }

    def told(prefix):
        return destinations.expanded(prefix, prompt, now)

    assert told("%year%-%month%-%day% %hour%%minute%%second%") == "2026-03-07 040509"
    assert told("%date:yyyy-MM-dd_h.mm%/x") == "2026-03-07_4.05/x"
    assert told("%KSampler.seed%_%Mine.seed%_%Load it.name%") == "42_42_a_b_c"
    assert told("100% new") == "100% new"
    for unknown in ("%Nobody.seed%", "%KSampler.nothing%", "%Mine.model%", "%width%"):
        with pytest.raises(ours("lora_ops.errors").FileError, match="no date and no value"):
            told(unknown)


def test_a_saved_model_is_in_the_hosts_list_at_once(ours, tmp_path, monkeypatch, pack):
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "vae", ([str(tmp_path)], {".safetensors"}))
    destinations = ours("nodes.host.destinations")
    assert folder_paths.get_filename_list("vae") == []
    to = destinations.destination("models", "vae", "ink", {})
    seen = os.stat(tmp_path)
    to.path(".safetensors").write_bytes(b"")
    os.utime(tmp_path, ns=(seen.st_atime_ns, seen.st_mtime_ns))  # a disk that keeps whole seconds
    to.refresh()
    assert folder_paths.get_filename_list("vae") == ["ink.safetensors"]
