"""Training the text encoder along with the model: the host's own encoding with gradients, PEFT's gradients, files that
the host reads again to the same conditioning."""

from __future__ import annotations

import pytest
import torch

from harness import inside, texts

CAPTIONS = ("a (red:1.3) fox", "a blue house by the sea")
LATENT = (4, 8, 8)
ALONE = pytest.mark.parametrize("pair", ["sd15"], indirect=True)


@pytest.fixture(scope="module")
def train(ours):
    """The pack's modules that training is made of."""

    class Modules:
        host, plan, loop = ours("nodes.host.training"), ours("lora_ops.train.plan"), ours("lora_ops.train.loop")
        dataset, optimizers = ours("lora_ops.train.dataset"), ours("lora_ops.train.optimizers")
        places, select, errors = ours("lora_ops.train.places"), ours("lora_ops.select"), ours("lora_ops.errors")

    return Modules


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=["sd15", "sdxl", "flux", "sd2", "sd3", "cascade_c", "chroma"])
def pair(request, pack):
    """A MODEL and a CLIP of few layers and the family's own widths, in inference mode as the host's loaders make
    them."""
    return inside.model(request.param), texts.clip(request.param)


def plan_of(train, **more):
    descent = more.pop("descent", train.optimizers.Descent(rate=1e-2))
    return train.plan.Plan(
        **{"steps": 4, "aims": (train.places.Aim(rank=4),), "text_aims": (train.places.Aim(rank=2),)} | more,
        descent=descent,
    )


def pictures(train, model, clip):
    with torch.inference_mode():
        conditions = tuple(clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in CAPTIONS)
        empty = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    latent = noise(model.model.latent_format.latent_channels, 8, 8, seed=3)
    picture = train.dataset.Picture("a.png", (latent,), conditions, captions=CAPTIONS)
    return train.dataset.Dataset((picture,), (picture,), empty, 0.1)


def learned(train, pair, plan, **more):
    model, clip = pair
    with torch.inference_mode():
        made = train.host.Model(model, clip)
        items, held_out = made.items(pictures(train, model, clip))
        return made.learn(plan, items, held_out=held_out, name="x", **more)


def encoded(clip, text):
    with torch.inference_mode():
        ((cross, options),) = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    pooled = options["pooled_output"]
    return cross.flatten() if pooled is None else torch.cat([cross.flatten(), pooled.flatten()])


def same(one, other):
    return one.modules.keys() == other.modules.keys() and all(
        torch.equal(each.up, other.modules[name].up) and torch.equal(each.down, other.modules[name].down)
        for name, each in one.modules.items()
    )


def of_text(lora):
    return {name: each for name, each in lora.modules.items() if name.startswith("text_encoders.")}


@ALONE
def test_gradients_are_those_of_peft(train, pair):
    """transformers' CLIP with the same weights and PEFT's LoRA with the same factors, asked for the same words."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model, clip = pair
    text = "a red fox"
    plan = plan_of(train)
    with torch.inference_mode():
        made = train.host.Model(model, clip)
        item = made.item(noise(*LATENT), [[noise(1, 77, 768), {}]], caption=text)
        where = plan.places(made.targets())
        begun = made.begin(plan, where, [item], None)
    wrappers = made.wrappers(begun)
    trained = wrappers[1].trained
    config = transformers.CLIPTextConfig(
        hidden_size=768, num_hidden_layers=3, intermediate_size=64, num_attention_heads=12, hidden_act="quick_gelu"
    )
    theirs = transformers.CLIPTextModel(config)
    prefix = "clip_l.transformer."
    if not any(name.startswith("text_model.") for name in theirs.state_dict()):  # as transformers 5 has it
        prefix += "text_model."
    own = clip.cond_stage_model.state_dict()
    theirs.load_state_dict({name: own[prefix + name].clone() for name in theirs.state_dict()})
    names = ["q_proj", "k_proj", "v_proj", "out_proj"]
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(r=2, lora_alpha=2, target_modules=names))
    modules = dict(wrapped.base_model.model.named_modules())
    with torch.no_grad():
        for number, each in enumerate(trained):
            each.parameters["up"] += 0.05 * noise(*each.parameters["up"].shape, seed=number)
            theirs_there = modules[each.place.target.key.removeprefix(prefix).removesuffix(".weight")]
            theirs_there.lora_A["default"].weight.copy_(each.parameters["down"])
            theirs_there.lora_B["default"].weight.copy_(each.parameters["up"])
    cotangent = noise(1, 77, 768, seed=9)
    with torch.inference_mode(), made.running(wrappers, [item]):
        ((cross, _),) = made.text.encode(item.conditions[0])
        (cross * cotangent).sum().backward()
    ids = torch.tensor([[token for token, _ in clip.tokenize(text)["l"][0]]])
    answer = wrapped(input_ids=ids).last_hidden_state
    torch.testing.assert_close(cross.detach(), answer.detach(), rtol=1e-4, atol=1e-4)
    (answer * cotangent).sum().backward()
    assert len(trained) == 12
    for each in trained:
        there = modules[each.place.target.key.removeprefix(prefix).removesuffix(".weight")]
        for ours, factor in (("up", there.lora_B), ("down", there.lora_A)):
            found, wanted = each.parameters[ours].grad, factor["default"].weight.grad
            assert (found - wanted).norm() < 1e-4 * wanted.norm()


def test_both_learn_and_what_they_learned_makes_the_same_conditioning_from_a_file(train, ours, pair, tmp_path):
    """Read by the host's own loader and by ours, in the layouts of kohya, ComfyUI and diffusers; MODEL and CLIP stay as
    they were."""
    import comfy.sd
    import comfy.utils

    model, clip = pair
    layouts, families, patching = ours("lora_ops.layouts"), ours("lora_ops.families"), ours("nodes.host.patching")
    landing, stack = ours("lora_ops.landing"), ours("lora_ops.stack")
    plain, text = encoded(clip, CAPTIONS[1]), clip.cond_stage_model
    before = [inside.weights(model), inside.weights(clip.patcher)]
    attributes = {name: set(module.__dict__) for name, module in text.named_modules() if name}
    told = {}

    def look(done, session):
        told[done.step] = done.validation
        if done.step == 4:
            told["cond"] = session.sample(lambda _: encoded(session.clip, CAPTIONS[1]))
            assert session.clip is None

    descent = train.optimizers.Descent(rate=3e-2)
    lora = learned(train, pair, plan_of(train, steps=4, validate_every=2, descent=descent), stepped=look)
    assert told[4] < told[2]
    for there, weights in zip((model, clip.patcher), before, strict=True):
        assert all(torch.equal(weight, weights[key]) for key, weight in there.model.state_dict().items())
    assert {name: set(module.__dict__) for name, module in text.named_modules() if name} == attributes
    moved = (told["cond"] - plain).norm()
    assert moved > 1e-3 * plain.norm()
    shapes = patching.shapes(model, clip)
    for layout in layouts.LAYOUTS[:3]:
        path = tmp_path / f"{layout.name}.safetensors"
        layouts.write(path, lora, layout, families.recognise(shapes), shapes=shapes)
        with torch.inference_mode():
            _, hosts = comfy.sd.load_lora_for_models(model, clip, comfy.utils.load_torch_file(str(path)), 1.0, 1.0)
        read = ours("lora_ops.lora").read_lora(str(path))
        found = landing.land([stack.Entry(read, {"model": 1.0, "clip": 1.0})], patching.targets(model, clip))
        landing.require_coverage(found, 1.0)
        ours_on = patching.applied(found, "patch", model, clip).clip
        unknown = layout.name == "diffusers" and hasattr(text, "t5xxl")  # the host knows no T5 by diffusers' names
        for applied in (ours_on,) if unknown else (ours_on, hosts):
            assert (encoded(applied, CAPTIONS[1]) - told["cond"]).norm() < 1e-3 * moved
    assert torch.equal(encoded(clip, CAPTIONS[1]), plain)


@ALONE
def test_a_run_goes_on_to_the_same_bits_after_a_restart_and_after_samples(train, pair, tmp_path):
    descent = train.optimizers.Descent(rate=1e-2, text_rate=1e-3)
    plan, path = plan_of(train, steps=3, descent=descent, dropout=0.1), tmp_path / "state.safetensors"
    whole = learned(train, pair, plan)

    def look(done, session):
        session.sample(lambda _: encoded(session.clip, CAPTIONS[0]))
        if done.step == 1:
            raise train.host.Finish

    learned(train, pair, plan, path=path, stepped=look)
    steps = []
    rest = learned(train, pair, plan, path=path, stepped=lambda done, _: steps.append(done.step))
    assert steps == [2, 3] and same(rest, whole)


@ALONE
def test_the_text_encoder_has_a_rate_of_its_own(train, pair):
    """A first step of AdamW moves everything by its rate; up begins at zero."""
    descent = train.optimizers.Descent(rate=1e-2, text_rate=1e-3, weight_decay=0.0)
    lora = learned(train, pair, plan_of(train, steps=1, descent=descent, clip=0.0))
    texts = of_text(lora)
    moved = {name: float(each.up.abs().max()) for name, each in lora.modules.items()}
    # SDXL takes what comes before the last layer of CLIP-L; attention with one place has nothing to choose
    moved = {name: most for name, most in moved.items() if most > 0}
    assert len(moved.keys() & texts) > len(texts) / 2 and moved.keys() - texts
    for name, most in moved.items():
        assert most == pytest.approx(1e-3 if name in texts else 1e-2, rel=0.05)


@ALONE
def test_what_cannot_train_is_refused(train, pair):
    model, clip = pair
    made = train.host.Model(model, clip)
    data = pictures(train, model, clip)
    items, _ = made.items(data)
    with pytest.raises(train.errors.TrainingError, match="trains no text encoder, and a CLIP"):
        made.learn(plan_of(train, text_aims=()), items, name="x")
    with pytest.raises(train.errors.TrainingError, match="trains a text encoder, and no CLIP"):
        train.host.Model(model).learn(plan_of(train), train.host.Model(model).items(data)[0], name="x")
    wired = train.dataset.Picture("b.png", (noise(*LATENT),), data.pictures[0].conditions)
    with pytest.raises(train.errors.TrainingError, match=r"b\.png.*no caption"):
        made.items(train.dataset.Dataset((wired,)))
    with pytest.raises(train.errors.TrainingError, match=r"Qwen-Image is a language model \(Qwen2.5-VL\), which stays"):
        train.host.Model(inside.model("qwen_image"), clip)
    with pytest.raises(train.errors.TrainingError, match="one rate"):
        train.optimizers.Descent("prodigy", rate=1.0, text_rate=0.5)
