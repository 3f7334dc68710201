"""Train LoRA on the host inside this process: what it leaves, how it goes on, what it refuses."""

from __future__ import annotations

import json

import pytest
import torch

from harness import inside

EVERY = {"sample_steps": 2, "sample_every": 2, "save_every": 2, "validate_every": 2}


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def parts(ours):
    """The pack's modules that the node is made of."""

    class Modules:
        course, sitting, runs = ours("nodes.host.course"), ours("nodes.host.sitting"), ours("nodes.host.runs")
        settings, folder = ours("lora_ops.train.settings"), ours("lora_ops.train.keeping")
        dataset, errors, nodes = ours("lora_ops.train.dataset"), ours("lora_ops.errors"), ours("nodes.training")
        training, patching = ours("nodes.host.training"), ours("nodes.host.patching")

    return Modules


@pytest.fixture
def output(tmp_path, monkeypatch):
    """An output folder of our own."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    return tmp_path


def conditioning(width=768, pooled=0, seed=0):
    return [[noise(1, 7, width, seed=seed), {"pooled_output": noise(1, pooled, seed=seed + 1) if pooled else None}]]


def dataset(parts, shape=(4, 8, 8), width=768, pooled=0, pictures=2, held_out=0):
    def picture(number):
        latent, condition = noise(*shape, seed=number), conditioning(width, pooled, number)
        return parts.dataset.Picture(f"{number}.png", (latent,), (condition,), captions=("ink, red",), size=(64, 64))

    every = [picture(number) for number in range(pictures + held_out)]
    return parts.dataset.Dataset(tuple(every[:pictures]), tuple(every[pictures:]))


def seated(parts, output, model=None, data=None, name="ink", **settings):
    chosen = {"steps": 4, "learning_rate": 3e-2, "rank": 4, "alpha": 4.0, **EVERY}
    settings = parts.settings.Settings(**chosen | settings)
    with torch.inference_mode():
        wires = parts.course.Wires(model or inside.model("sd15"), data or dataset(parts))
        course = parts.course.Course(settings, wires)
        folder = parts.folder.Folder(output / "lora_ops" / name)
        return parts.sitting.Sitting(course, folder, "7", {"version": 1, "node": "7", "prompt": {}})


def carried_out(*args, **more):
    sitting = seated(*args, **more)
    with torch.inference_mode():
        return sitting.outcome("flow")


def test_a_run_leaves_its_lora_its_samples_and_how_it_was_made(parts, output):
    model = inside.model("sd15")
    found = carried_out(parts, output, model)
    folder = output / "lora_ops" / "ink"
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) == [
        "history.json",
        "ink-000002.safetensors",
        "ink.safetensors",
        "recipe.json",
        "samples/000002_0.png",
        "samples/000004_0.png",
        "state.safetensors",
    ]
    assert found.samples.shape == (1, 64, 64, 3)
    assert found.loss_map["steps"] == [1, 2, 3, 4] and len(found.loss_map["loss"]) == 4
    assert json.loads((folder / "recipe.json").read_text())["node"] == "7"
    assert not torch.allclose(inside.run(found.model), inside.run(model))


def tensors(path):
    from safetensors.torch import load_file

    return load_file(path)


def metadata(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()


def same(one, other):
    one, other = tensors(one), tensors(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def at_step(sitting, step, what):
    """Does something while a sitting runs, as a page or a person would."""
    shown = sitting._stepped

    def stepped(done, session):
        if done.step == step:
            what(sitting)
        shown(done, session)

    sitting._stepped = stepped


@pytest.fixture
def whole(parts, output):
    """A run of four steps that nobody disturbed: its file."""
    return carried_out(parts, output, name="whole", sample_every=0).data["path"]


def test_a_finished_run_is_not_made_again_and_goes_on_when_more_steps_are_asked_for(parts, output, whole):
    first = carried_out(parts, output, steps=2)
    again = carried_out(parts, output, steps=2)
    assert again.data["seconds"] == 0 and again.data["step"] == again.data["from_step"] == 2
    assert torch.equal(first.samples, again.samples)  # those on disk
    longer = carried_out(parts, output, steps=4)
    assert longer.data["from_step"] == 2 and longer.loss_map["steps"] == [1, 2, 3, 4]
    assert same(longer.data["path"], whole)


def test_a_cancelled_run_is_kept_and_the_next_one_goes_on_as_if_nothing_had_happened(parts, output, whole):
    from comfy.model_management import InterruptProcessingException, interrupt_current_processing

    sitting = seated(parts, output, sample_every=0)
    at_step(sitting, 3, lambda _: interrupt_current_processing(True))
    with pytest.raises(InterruptProcessingException), torch.inference_mode():
        sitting.outcome("flow")
    folder = output / "lora_ops" / "ink"
    assert (folder / "ink-000003.safetensors").exists() and not (folder / "ink.safetensors").exists()
    ending = sitting.run.history.ending
    assert ending.how == "cancelled" and "at step 3" in ending.message and "lora_ops/ink" in ending.message
    found = carried_out(parts, output, sample_every=0)
    assert found.data["from_step"] == 3 and same(found.data["path"], whole)


def test_a_run_that_is_finished_by_hand_keeps_what_it_has(parts, output):
    sitting = seated(parts, output)
    at_step(sitting, 3, lambda each: each.run.ask("finish"))
    with torch.inference_mode():
        found = sitting.outcome("flow")
    assert found.data["step"] == 3 and sitting.run.history.ending.how == "finished"
    assert [each.step for each in sitting.run.history.samples] == [2, 3]
    again = carried_out(parts, output)
    assert again.data["step"] == 3 and "finished by hand" in again.data["notes"][0]
    assert carried_out(parts, output, steps=5).data["step"] == 5


def test_a_page_gets_the_sample_and_the_save_that_it_asks_for(parts, output):
    sitting = seated(parts, output, sample_every=0, save_every=0)
    at_step(sitting, 1, lambda each: (each.run.ask("sample"), each.run.ask("save")))
    with torch.inference_mode():
        sitting.outcome("flow")
    assert [each.step for each in sitting.run.history.samples] == [1]
    assert [each.step for each in sitting.run.history.saves] == [1, 4]


def test_begun_anew_the_earlier_run_is_kept_under_another_name(parts, output):
    first = carried_out(parts, output, steps=1, sample_every=0)
    again = carried_out(parts, output, steps=1, sample_every=0, seed=1, resume={"key": "none"})
    assert again.data["from_step"] == 0 and again.data["notes"] == ["the earlier run is in ink (1)"]
    kept = output / "lora_ops" / "ink (1)" / "ink.safetensors"
    assert kept.exists() and not same(kept, first.data["path"])
    with pytest.raises(parts.errors.TrainingError, match="seed"):
        carried_out(parts, output, steps=2, seed=2)


def test_the_best_by_the_held_out_pictures_is_kept(parts, output):
    found = carried_out(parts, output, data=dataset(parts, held_out=1), sample_every=0)
    assert found.loss_map["best"] in (2, 4) and len(found.loss_map["validation"]) == 2
    assert (output / "lora_ops" / "ink" / "ink-best.safetensors").exists()


def test_the_file_says_how_it_was_trained(parts, output):
    found = carried_out(parts, output, steps=2, sample_every=0, rank=4, alpha=2.0)
    told = metadata(found.data["path"])
    assert {key: told[key] for key in ("ss_steps", "ss_network_dim", "ss_network_alpha", "ss_base_model_version")} == {
        "ss_steps": "2",
        "ss_network_dim": "4",
        "ss_network_alpha": "2.0",
        "ss_base_model_version": "sd_v1",
    }
    assert told["ss_num_train_images"] == "2" and told["modelspec.resolution"] == "64x64"
    assert json.loads(told["ss_tag_frequency"]) == {"ink": {"ink": 2, "red": 2}}
    assert json.loads(told["lora_ops.training"])["node"] == "7"


@pytest.mark.parametrize("adapter", ["rs-lora", "lokr"])
def test_the_hosts_own_loader_makes_the_same_model_of_the_file(parts, output, adapter):
    """Of a DoRA and of an OFT per input it does not: tests/host/test_dora_oft.py."""
    import comfy.sd

    model = inside.model("sd15")
    choice = {"key": adapter, "initial": "gaussian"} if adapter == "rs-lora" else {"key": adapter}
    found = carried_out(parts, output, model, steps=2, adapter=choice, alpha=4.0, sample_every=0)
    ours = inside.run(found.model)
    assert not torch.allclose(ours, inside.run(model), rtol=1e-3, atol=1e-3)
    theirs = inside.run(comfy.sd.load_lora_for_models(model, None, tensors(found.data["path"]), 1.0, 0.0)[0])
    assert (ours - theirs).norm() < 1e-4 * ours.norm()


def test_a_rehearsal_tells_memory_and_time_and_leaves_nothing(parts, output):
    sitting = seated(parts, output)
    with torch.inference_mode():
        found = sitting.course.rehearsed()
    assert found["activations"] > 0 and found["parameters"] > 0 and found["seconds"] > 0
    assert not (output / "lora_ops").exists()
