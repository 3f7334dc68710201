"""Files that `python -m lora_ops merge` wrote, opened by the host's own loaders."""

from __future__ import annotations

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
