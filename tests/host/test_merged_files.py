"""Files that `python -m lora_ops merge` wrote, opened by the host's own loaders."""

from __future__ import annotations

import json

import pytest
import torch

from harness.inside import CPU, patched_weights, run

HALF = {"dtype": torch.float16}


@pytest.fixture(scope="module")
def opened(pack):
    """opened(path): the model and text encoder of a checkpoint, by the host's loader, at half precision."""
    import comfy.sd

    def opened(path, options=HALF):
        return comfy.sd.load_checkpoint_guess_config(
            str(path), output_vae=False, model_options=options, te_model_options=options
        )[:2]

    return opened


@pytest.fixture(scope="module")
def merged(ours, small_files, tmp_path_factory):
    """The small SD1.5 checkpoint, a LoRA for it, and the file of both."""
    folder = tmp_path_factory.mktemp("merged")
    base, out = small_files / "checkpoints/v1-5-pruned-emaonly-fp16.safetensors", folder / "out.safetensors"
    header = ours("lora_ops.files").read_header(base)
    shapes = {key: entry.shape for key, entry in header.entries.items()}
    lora = ours("lora_ops.samples").write_samples(shapes, folder)[0]
    assert ours("lora_ops.cli").main(["merge", str(base), f"{lora}:0.8/0.5", "-o", str(out)]) == 0
    return base, lora, out


@pytest.fixture
def patched(ours, opened, merged):
    """The base with our patch of the same LoRA."""
    base, lora, _ = merged
    model, clip = opened(base)
    stack, landing, patching = (ours(name) for name in ("lora_ops.stack", "lora_ops.landing", "nodes.host.patching"))
    entry = stack.Entry(ours("lora_ops.lora").read_lora(str(lora)), {"model": 0.8, "clip": 0.5})
    landed = landing.land([entry], patching.targets(model, clip))
    landing.require_coverage(landed, 1.0)
    return patching.applied(landed, "patch", model, clip)


def test_the_host_opens_a_merged_file_with_the_weights_of_the_live_patch(patched, opened, merged):
    """Both round a float32 sum once; its own last place depends on how many rows are multiplied together."""
    model, clip = opened(merged[2])
    for live, stored in ((patched.model, model), (patched.clip.patcher, clip.patcher)):
        ours, theirs = patched_weights(live), stored.model.state_dict()
        before = live.model.state_dict()
        assert ours and theirs.keys() == before.keys()
        for key, weight in theirs.items():
            if key.endswith("text_projection.weight"):
                continue  # not in the file: the host leaves whatever was in its memory
            expected = ours.get(key, before[key]).to(CPU)
            assert weight.dtype == expected.dtype == torch.float16 or key not in ours
            if key in ours:
                assert not torch.equal(weight, before[key])
                torch.testing.assert_close(weight, expected, rtol=2**-10, atol=2**-24)
                assert (weight != expected).float().mean() < 1e-3
            else:
                assert torch.equal(weight, expected), key


def test_a_merged_file_samples_what_the_live_patch_samples(patched, opened, merged):
    model, _ = opened(merged[2])
    plain = run(opened(merged[0])[0])
    live, stored = run(patched.model), run(model)
    effect = (live - plain).norm()
    assert effect > 0 and (live - stored).norm() < 0.02 * effect  # a weight in a thousand is one rounding off


FORMATS = ["comfy_quant", "metadata", "scaled_fp8"]


def quantised(tensors, how):
    """FLUX's blocks in fp8 with a scale for each weight, as the host writes it and as older files have it."""
    found, metadata, layers = {}, {}, {}
    for key, tensor in tensors.items():
        module = key.removesuffix(".weight")
        if "_blocks" not in key or tensor.ndim < 2:
            found[key] = tensor
            continue
        scale = tensor.abs().max().float() / 448
        found[key] = (tensor.float() / scale).to(torch.float8_e4m3fn)
        found[f"{module}.{'scale_weight' if how == 'scaled_fp8' else 'weight_scale'}"] = scale
        layers[module] = {"format": "float8_e4m3fn"}
    if how == "comfy_quant":
        found |= {f"{module}.comfy_quant": text_tensor(json.dumps(told)) for module, told in layers.items()}
    elif how == "metadata":
        metadata["_quantization_metadata"] = json.dumps({"layers": layers})
    else:
        found["scaled_fp8"] = torch.ones(2).to(torch.float8_e4m3fn)
    return found, metadata


def text_tensor(text):
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


@pytest.fixture(params=FORMATS)
def scaled(request, ours, small_files, tmp_path):
    """A small FLUX of fp8 with scales, a LoRA for it, its landing on the file, and the file of both."""
    files, checkpoints = ours("lora_ops.files"), ours("lora_ops.checkpoints")
    header = files.read_header(small_files / "diffusion_models/flux1-dev.safetensors")
    tensors, metadata = quantised(dict(files.read_tensors(header, header.entries)), request.param)
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    files.write(base, tensors, metadata, overwrite=True)
    lora = ours("lora_ops.samples").write_samples({key: entry.shape for key, entry in header.entries.items()}, tmp_path)
    opened = checkpoints.opened(base)
    entry = ours("lora_ops.stack").Entry(ours("lora_ops.lora").read_lora(str(lora[0])), {"model": 0.8, "clip": 0.8})
    landing = ours("lora_ops.landing").land([entry], opened.targets)
    assert checkpoints.merge(opened, landing, out).keys() >= {"double_blocks.0.img_attn.qkv.weight"}
    return base, entry, out


def floats(weight):
    return (weight.dequantize() if hasattr(weight, "dequantize") else weight).detach().float()


def test_fp8_with_scales_is_opened_by_the_host_as_it_would_have_merged_it_itself(scaled, ours, small_files):
    """Its own merge rounds by chance and ours to the nearest: one step of fp8 apart at most, with the same scale."""
    import comfy.sd

    base, entry, out = scaled
    landing, patching = ours("lora_ops.landing"), ours("nodes.host.patching")
    plain, stored = (comfy.sd.load_diffusion_model(str(path)) for path in (base, out))
    landed = landing.land([entry], patching.targets(plain, None))
    with ours("nodes.host.progress").Meter(None, "Merging LoRAs") as progress:
        live = ours("nodes.host.merging").merged(landed, plain, None, progress).model
    before, wanted, found = (dict(each.model.named_parameters()) for each in (plain, live, stored))
    changed = set(landed.of_part("model"))
    scales = 0
    for key, weight in found.items():
        if hasattr(weight, "_params"):
            scales += 1
            torch.testing.assert_close(weight._params.scale, wanted[key]._params.scale, rtol=1e-5, atol=0)
            mine, theirs = floats(weight), floats(wanted[key])
            step = torch.maximum(mine.abs(), theirs.abs()).div(8).clamp(min=float(weight._params.scale) * 2.0**-9)
            assert ((mine - theirs).abs() <= step * 1.02).all(), key
        assert key in changed or torch.equal(floats(weight), floats(before[key]))
        assert key not in changed or not torch.equal(floats(weight), floats(before[key]))
    assert scales == 2 * 10 + 2 * 3


def test_fp8_with_scales_merged_into_bf16_is_the_update_on_what_the_base_means(scaled, ours, tmp_path):
    import comfy.sd

    base, entry, _ = scaled
    checkpoints = ours("lora_ops.checkpoints")
    opened = checkpoints.opened(base)
    landing = ours("lora_ops.landing").land([entry], opened.targets)
    checkpoints.merge(opened, landing, tmp_path / "wide.safetensors", dtype=torch.bfloat16)
    plain, stored = (comfy.sd.load_diffusion_model(str(path)) for path in (base, tmp_path / "wide.safetensors"))
    before, found = (dict(each.model.named_parameters()) for each in (plain, stored))
    merged = ours("lora_ops.landing").merged
    landed = ours("lora_ops.landing").land([entry], ours("nodes.host.patching").targets(plain, None)).of_part("model")
    for key, weight in found.items():
        assert not hasattr(weight, "_params")
        wanted = merged(floats(before[key]), landed.get(key, ()))
        torch.testing.assert_close(weight.float(), wanted, rtol=2**-7, atol=2**-9 * float(wanted.abs().max()))
    assert run(stored).isfinite().all()
