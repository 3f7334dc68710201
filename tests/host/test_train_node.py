"""Train LoRA on the host inside this process: what it leaves, how it goes on, what it refuses."""

from __future__ import annotations

import dataclasses
import json
import types

import pytest
import torch

from harness import inside

PICTURE = torch.zeros(1, 8, 8, 3)
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
        recipes = ours("lora_ops.train.recipes")

    return Modules


@pytest.fixture
def output(tmp_path, monkeypatch):
    """An output folder of our own."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    return tmp_path


def conditioning(width, pooled, seed=0):
    return [[noise(1, 7, width, seed=seed), {"pooled_output": noise(1, pooled, seed=seed + 1) if pooled else None}]]


def dataset(parts, shape=(16, 8, 8), width=64, pooled=768, pictures=2, held_out=0):
    def picture(number):
        latent, condition = noise(*shape, seed=number), conditioning(width, pooled, number)
        return parts.dataset.Picture(f"{number}.png", (latent,), (condition,), captions=("ink, red",), size=(64, 64))

    every = [picture(number) for number in range(pictures + held_out)]
    return parts.dataset.Dataset(tuple(every[:pictures]), tuple(every[pictures:]))


def seated(parts, output, model=None, data=None, name="ink", **settings):
    chosen = {"steps": 4, "learning_rate": 3e-2, "rank": 4, "alpha": 4.0, **EVERY}
    settings = parts.settings.Settings(**chosen | settings)
    with torch.inference_mode():
        wires = parts.course.Wires(model or inside.model("flux"), data or dataset(parts))
        course = parts.course.Course(settings, wires)
        folder = parts.folder.Folder(output / "lora_ops" / name)
        inputs = {name: value for name, value in dataclasses.asdict(settings).items()}
        prompt = {"7": {"class_type": "LoraOpsTrain", "inputs": inputs}}
        return parts.sitting.Sitting(course, folder, "7", parts.recipes.recipe(prompt, "7", course.wires.dataset))


def carried_out(*args, **more):
    sitting = seated(*args, **more)
    with torch.inference_mode():
        return sitting.outcome("flow")


def test_a_run_leaves_its_lora_its_samples_and_how_it_was_made(parts, output):
    model = inside.model("flux")
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


def pairs(parts, seed=50):
    """Pictures and their mirror images, each with its control picture and with the text left out at times."""
    both = dataset(parts)
    guises = [(noise(16, 8, 8, seed=seed + n),) for n in range(2)]
    learned = tuple(
        dataclasses.replace(
            each,
            latents=(each.latents[0], each.latents[0].flip(-1)),
            controls=(control, (control[0].flip(-1),)),
        )
        for each, control in zip(both.pictures, guises, strict=True)
    )
    return parts.dataset.Dataset(learned, (), conditioning(64, 768, 9), 0.3)


def test_a_run_of_pairs_samples_the_first_control_picture_and_goes_on_after_a_stop(parts, output):
    from comfy_extras.nodes_edit_model import ReferenceLatent

    whole = carried_out(parts, output, data=pairs(parts), name="whole")
    stopped = carried_out(parts, output, data=pairs(parts), steps=2)
    longer = carried_out(parts, output, data=pairs(parts))
    assert longer.data["from_step"] == 2 and same(longer.data["path"], whole.data["path"])
    assert torch.equal(longer.samples, whole.samples) and not torch.equal(longer.samples, stopped.samples)
    with pytest.raises(parts.errors.TrainingError, match="changed since: pictures"):
        carried_out(parts, output, data=pairs(parts, seed=60))
    with torch.inference_mode():
        data, model, settings = pairs(parts), inside.model("flux"), parts.settings.Settings(sample_steps=2)
        told = ReferenceLatent.execute(
            data.pictures[0].conditions[0], {"samples": data.pictures[0].controls[0][0][None]}
        ).result[0]
        drawn = [
            parts.course.Course(settings, parts.course.Wires(model, data, positive=wired)).previews.draw(model)
            for wired in ((), (told,), (data.pictures[0].conditions[0],))
        ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


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
        carried_out(parts, output, steps=2, sample_every=0, seed=2)


def test_a_finished_run_does_not_pass_for_one_of_other_pictures_or_settings(parts, output):
    carried_out(parts, output, steps=1, sample_every=0)
    with pytest.raises(parts.errors.TrainingError, match=r"have changed since: learning_rate\. Raise steps"):
        carried_out(parts, output, steps=1, sample_every=0, learning_rate=1e-3)
    with pytest.raises(parts.errors.TrainingError, match="have changed since: pictures"):
        carried_out(parts, output, steps=1, sample_every=0, data=dataset(parts, pictures=3))
    found = carried_out(parts, output, steps=2, sample_every=0, data=dataset(parts, pictures=3), sample_seed=3)
    assert found.data["notes"] == ["changed from step 1 on: pictures"]


def test_the_best_by_the_held_out_pictures_is_kept(parts, output):
    found = carried_out(parts, output, data=dataset(parts, held_out=1), sample_every=0)
    assert found.loss_map["best"] in (2, 4) and len(found.loss_map["validation"]) == 2
    assert (output / "lora_ops" / "ink" / "ink-best.safetensors").exists()


def test_the_file_says_how_it_was_trained(parts, output):
    model, data = inside.model("sd15"), dataset(parts, (4, 8, 8), 768, 0)
    found = carried_out(parts, output, model, data, steps=2, sample_every=0, alpha=2.0)
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
    """Of parts of fused weights, too. Of a DoRA and of an OFT per input it does not: tests/host/test_dora_oft.py."""
    import comfy.sd

    model = inside.model("flux")
    choice = {"key": adapter, "initial": "gaussian"} if adapter == "rs-lora" else {"key": adapter}
    found = carried_out(parts, output, model, steps=2, adapter=choice, alpha=4.0, sample_every=0)
    ours = inside.run(found.model)
    assert not torch.allclose(ours, inside.run(model), rtol=1e-3, atol=1e-3)
    theirs = inside.run(comfy.sd.load_lora_for_models(model, None, tensors(found.data["path"]), 1.0, 0.0)[0])
    assert (ours - theirs).norm() < 1e-4 * ours.norm()


def test_what_was_learned_on_a_live_dora_is_put_on_after_it(parts, output, samples, apply):
    """The MODEL that comes out is the one that learned, which the last sample shows."""
    model = inside.model("flux")
    tensors = samples(model, 0, seed=1)
    ups = {key.removesuffix(".lora_up.weight"): up for key, up in tensors.items() if key.endswith(".lora_up.weight")}
    dora = tensors | {f"{module}.dora_scale": 1 + noise(len(up), 1, seed=5) ** 2 for module, up in ups.items()}
    under, drawn = apply(model, (dora, 0.7), mode="live"), []
    sitting = seated(parts, output, under, steps=2)
    sitting.course.previews = types.SimpleNamespace(draw=lambda model, clip: drawn.append(inside.run(model)) or PICTURE)
    with torch.inference_mode():
        found = inside.run(sitting.outcome("flow").model)
        moved = found - inside.run(under)
        assert (found - drawn[-1]).norm() < 1e-4 * moved.norm() and moved.norm() > 1e-3 * found.norm()


def test_a_rehearsal_tells_memory_and_time_and_leaves_nothing(parts, output):
    sitting = seated(parts, output)
    with torch.inference_mode():
        found = sitting.course.rehearsed()
    assert found["activations"] > 0 and found["parameters"] > 0 and found["seconds"] > 0
    assert not (output / "lora_ops").exists()


# family -> width of its text, of its pooled text, a latent, its preset's title, weighting, guidance
FAMILIES = {
    "sd15": (768, 0, (4, 8, 8), "Stable Diffusion 1.5", "min_snr", None),
    "sdxl": (2048, 1280, (4, 8, 8), "Stable Diffusion XL", "min_snr", None),
    "sd35_medium": (64, 32, (16, 16, 16), "Stable Diffusion 3.5 medium", "constant", None),
    "flux": (64, 768, (16, 16, 16), "FLUX.1", "constant", 1.0),
    "flux2": (64, 0, (128, 8, 8), "FLUX.2 dev", "constant", 1.0),
    "flux2_klein": (64, 0, (128, 8, 8), "FLUX.2 klein", "constant", None),
    "wan_t2v": (32, 0, (16, 1, 16, 16), "Wan 2.1 or 2.2", "constant", None),
    "qwen_image": (64, 0, (16, 1, 16, 16), "Qwen-Image", "constant", None),
    "z_image": (64, 0, (16, 16, 16), "Z-Image", "constant", None),
    "cascade_c": (1280, 1280, (16, 16, 16), "Stable Cascade, stage C", "constant", None),
}


def course(parts, family, data=None, **settings):
    width, pooled, shape = FAMILIES[family][:3]
    with torch.inference_mode():
        data = data or dataset(parts, shape, width, pooled, pictures=1)
        settings = parts.settings.Settings(**{"sample_every": 0, "rank": 4, "alpha": 4.0} | settings)
        model = inside.model(family)
        return parts.course.Course(settings, parts.course.Wires(model, data))


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_is_what_the_familys_trainers_recommend_and_a_step_is_made_with_it(parts, ours, family):
    title, weighting, guidance = FAMILIES[family][3:]
    timesteps = ours("lora_ops.train.timesteps").RECOMMENDED
    made = course(parts, family, preset=title)
    assert made.plan.timesteps == timesteps["wan" if family == "wan_t2v" else family]
    assert made.plan.objective.weighting == weighting
    told = [condition[0][1].get("guidance") for condition in made.items[0].conditions]
    assert told == [guidance]
    losses = []
    with torch.inference_mode():
        plan = dataclasses.replace(made.plan, steps=1)
        made.model.learn(plan, made.items, name="ink", stepped=lambda done, _: losses.append(done.loss))
    assert len(losses) == 1 and 0 < losses[0] < float("inf")


def test_what_cannot_be_is_refused_before_anything_is_written(parts, ours):
    def refused(match, family="sd15", **settings):
        with pytest.raises(parts.errors.LoraOpsError, match=match):
            course(parts, family, **settings)

    refused("is for FLUX.1; the model is Stable Diffusion 1.5", preset="FLUX.1")
    refused("sample_prompts need a text encoder", sample_every=1, sample_prompts="a cat")
    refused("need a negative", sample_every=1, sample_cfg=4.0)
    refused("OFT has none", adapter={"key": "oft"}, alpha=8.0)
    refused("has no rank", targets={"key": "selectors", "selectors": "role:attn=much"})
    refused("chooses nothing", targets={"key": "selectors", "selectors": "double_blocks.0=4"})
    refused("is for models that predict noise or v", "flux", objective={"key": "min-snr", "gamma": 5.0})
    refused("model runs there", offload=True)
    refused("dropout draws", compile=True, dropout=0.1)
    refused("takes no shift", timesteps={"key": "uniform", "shift": 3.0})
    edited = dataset(parts, (4, 8, 8), 768, 0)
    edited.pictures[0].conditions[0][0][1]["reference_latents"] = [noise(1, 4, 8, 8)]
    refused("pictures to edit", data=edited)
    refused("video of 3 latent frames", "wan_t2v", data=dataset(parts, (16, 3, 16, 16), 32))


def test_models_that_need_more_than_noise_and_text_are_refused_by_name(parts):
    import comfy.model_base

    inpainting, vace = inside.model("sd15"), inside.model("wan_t2v")
    inpainting.model.set_inpaint()
    vace.model.__class__ = comfy.model_base.WAN21_Vace
    for each, data, match in (
        (inpainting, dataset(parts, (4, 8, 8), 768, 0), "inpainting"),
        (inside.model("wan"), dataset(parts, (16, 1, 16, 16), 4096), "image-to-video"),
        (vace, dataset(parts, (16, 1, 16, 16), 32), "VACE"),
    ):
        with pytest.raises(parts.errors.TrainingError, match=match), torch.inference_mode():
            parts.course.Course(parts.settings.Settings(), parts.course.Wires(each, data))
