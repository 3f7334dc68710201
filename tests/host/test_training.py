"""Training on the host: every family learns one picture, through the host's own classes; its model stays as it was."""

from __future__ import annotations

import copy
import gc
import types

import pytest
import torch

from harness import inside

CASES = inside.INPUTS


@pytest.fixture(scope="module")
def train(ours):
    """The pack's modules that training is made of."""

    class Modules:
        host, plan, loop = ours("nodes.host.training"), ours("lora_ops.train.plan"), ours("lora_ops.train.loop")
        wrapper, timesteps = ours("lora_ops.train.wrapper"), ours("lora_ops.train.timesteps")
        optimizers, places = ours("lora_ops.train.optimizers"), ours("lora_ops.train.places")
        offload = ours("lora_ops.train.offload")
        select, errors = ours("lora_ops.select"), ours("lora_ops.errors")

    return Modules


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def conditioning(family, seed=0):
    text, pooled, _ = CASES[family]
    options = {"pooled_output": noise(1, pooled, seed=seed + 1) if pooled else None}
    return [[noise(1, 7, text, seed=seed), options]]


class Session:
    """A model of a family, a plan and one item, as a node has them: in inference mode."""

    def __init__(self, train, family, patcher=None, **plan):
        self.train = train
        with torch.inference_mode():
            self.patcher = inside.model(family) if patcher is None else patcher
            self.model = train.host.Model(self.patcher)
            self.plan = train.plan.Plan(**{"steps": 8, "descent": train.optimizers.Descent(rate=3e-2)} | plan)
            self.item = self.model.item(noise(*CASES[family][2], seed=3), conditioning(family))
            targets = self.model.targets()
            self.where = self.model.places(self.plan)
            self.timesteps = train.timesteps.recommended(targets.family, self.model.sampling)
            begun = self.model.begin(self.plan, self.where, [self.item], self.timesteps)
            weights = train.host.weight_of
            self.wrapper = train.wrapper.Wrapper(
                self.model.modules, begun.adapters, taken_off=begun.taken_off, weight_of=weights
            )
            self.run = train.loop.Run(self.plan, self.wrapper)

    def running(self, **more):
        return self.model.running([self.wrapper], [self.item], **more)

    def gradients(self, **more):
        with torch.inference_mode(), self.running(**more):
            args = self.run, [self.item], self.model.predict, self.model.sampling, self.timesteps
            loss = self.train.loop._gradients(*args, self.model.around)
            return loss, {name: p.grad.clone() for name, p in self.run.parameters.items() if p.grad is not None}

    def learn(self, **more):
        """The loss before and after, at moments and noise that are always the same."""
        with torch.inference_mode(), self.running(**more):
            args = self.run, [self.item], self.model.predict, self.model.sampling, self.timesteps
            before = self.train.loop.validate(*args)
            self.train.loop.train(*args, around=self.model.around)
            return before, self.train.loop.validate(*args)


def footprint(patcher):
    attributes = {name: set(module.__dict__) for name, module in patcher.model.named_modules()}
    return attributes, dict(patcher.model.named_parameters()), inside.weights(patcher)


@pytest.mark.parametrize("family", CASES)
def test_the_loss_of_one_picture_falls_and_the_model_stays_as_it_was(train, family):
    import comfy.model_management

    session = Session(train, family)
    comfy.model_management.load_models_gpu([session.patcher])
    attributes, parameters, weights = footprint(session.patcher)
    sampling, state = session.patcher.model.model_sampling, torch.get_rng_state()
    before, after = session.learn()
    assert after < (0.99 if family == "flux2_klein" else 0.9) * before  # its one block's gates are nearly closed
    assert torch.equal(torch.get_rng_state(), state) and not comfy.model_management.in_training
    assert session.patcher.model.model_sampling is sampling
    now = footprint(session.patcher)
    assert now[0] == attributes and all(now[1][name] is p for name, p in parameters.items())
    assert all(torch.equal(now[2][key], weights[key]) for key in weights)


@pytest.mark.parametrize("family", ["flux", "flux2", "cascade_c", "sd35_medium", "wan_t2v", "z_image"])
def test_gradients_with_and_without_checkpointing_are_the_same(train, family):
    """FLUX's blocks add in place: what computes them again finds their inputs overwritten if nothing is done."""
    session = Session(train, family)
    (loss, plain), (again, checkpointed) = session.gradients(), session.gradients(checkpointing=True)
    assert loss == pytest.approx(again, rel=1e-6) and plain.keys() == checkpointed.keys()
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("family", "checkpointing"), [("flux", False), ("sd15", True)])
def test_a_model_whose_blocks_are_away_learns_the_same(train, apply, samples, monkeypatch, family, checkpointing):
    """Copies in main memory stand for a device's; the host's own partial unloading has taken the weights away, and with
    them the LoRA on the model, which is then put on in each call."""
    model = inside.model(family)
    session = Session(train, family, apply(model, (samples(model, 0, seed=1), 0.8), mode="patch"))
    brought, offloads = [], []

    def bring(tensors):
        brought.append(len(tensors))
        copies = [tensor.clone() for tensor in tensors]
        return lambda: copies

    def offload_of(patcher):
        offloads.append(train.offload.Offload(patcher.model.diffusion_model, bring, lambda tensor: True))
        return offloads[0]

    def learned(**more):
        with torch.inference_mode():
            model = train.host.Model(session.patcher)
            plan = train.plan.Plan(2, (train.places.Aim(rank=4),), descent=train.optimizers.Descent(rate=1e-2))
            return model.learn(plan, [session.item], name="x", checkpointing=checkpointing, **more).modules

    with pytest.raises(train.errors.TrainingError, match="offload"):
        learned(offload=True)
    plain, names = learned(), set(session.patcher.model.state_dict())
    monkeypatch.setattr(train.host, "offload_of", offload_of)
    away, foreseen = learned(offload=True), offloads[0].most
    assert len(brought) > len(offloads[0].blocks) > 2 and foreseen > 0
    for name, adapter in plain.items():
        torch.testing.assert_close(away[name].up, adapter.up, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(away[name].down, adapter.down, rtol=1e-5, atol=1e-8)
    assert set(session.patcher.model.state_dict()) == names
    again = learned()
    for name, adapter in plain.items():
        torch.testing.assert_close(again[name].up, adapter.up, rtol=1e-5, atol=1e-8)


def test_gradients_are_those_of_the_merged_weights(train):
    """Autograd through a copy of the model whose weights are W + s · up · down, in place of the frozen maps."""
    session = Session(train, "flux")
    with torch.no_grad():
        for number, parameter in enumerate(session.run.parameters.values()):
            parameter += 0.05 * noise(*parameter.shape, seed=number)
    _, ours = session.gradients()
    copied = copy.deepcopy(session.patcher.model.diffusion_model)
    factors, merged = {}, {}
    for each in session.wrapper.trained:
        up, down = (each.parameters[name].detach().clone().requires_grad_() for name in ("up", "down"))
        target, delta = each.place.target, up @ down
        weight = merged.setdefault(target.key, copied.get_parameter(target.key.partition(".")[2]).detach().clone())
        rows = target.rows
        before, after = weight[: rows.start], weight[rows.end :]
        merged[target.key] = torch.cat([before, weight[rows.start : rows.end] + delta, after])
        factors |= {f"{each.place.module}.up": up, f"{each.place.module}.down": down}
    original = session.patcher.model.diffusion_model
    try:
        session.patcher.model.diffusion_model = copied
        session.model.network = copied
        parameters = {key.partition(".")[2]: weight for key, weight in merged.items()}
        forward = copied.forward
        copied.forward = lambda *args, **kwargs: torch.func.functional_call(Called(forward), {}, args, kwargs)
        for name, weight in parameters.items():
            owner, _, attribute = name.rpartition(".")
            module = copied.get_submodule(owner)
            del module._parameters[attribute]
            setattr(module, attribute, weight)
        empty = train.wrapper.Wrapper({}, {})
        with torch.inference_mode(), session.model.running([empty], [session.item]):
            run = Bare(session.plan, factors)
            args = run, [session.item], session.model.predict, session.model.sampling, session.timesteps
            train.loop._gradients(*args)
    finally:
        session.patcher.model.diffusion_model = original
    for name, factor in factors.items():
        assert factor.grad is not None
        torch.testing.assert_close(ours[name], factor.grad, rtol=1e-3, atol=1e-6)


class Called(torch.nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.forward = forward


class Bare:
    """What the loop's gradients need of a run."""

    def __init__(self, plan, parameters):
        self.plan, self.parameters, self.step, self.scaler = plan, parameters, 0, None
        self.optimizer = torch.optim.SGD(list(parameters.values()), lr=0.1)

    def drop(self, draw):
        assert not self.plan.dropout


def test_diffusers_default_trains_797184_parameters_on_sd15(train, ours):
    families, dialects = ours("lora_ops.families"), ours("lora_ops.dialects")
    targets = dialects.published_map(next(f for f in families.FAMILIES if f.name == "sd15"))
    where = train.places.places(targets, [train.places.Aim(rank=4)])
    count = sum(p.rank * (p.target.delta_shape[0] + p.target.delta_shape[1]) for p in where)
    assert (len(where), count) == (128, 797_184)


def test_roles_mean_the_smallest_parts_and_names_what_they_name(train, ours):
    families, dialects = ours("lora_ops.families"), ours("lora_ops.dialects")
    targets = dialects.published_map(next(f for f in families.FAMILIES if f.name == "flux"))

    def bands(*aims):
        made = [train.places.Aim(train.select.Pattern.parse(text), rank) for text, rank in aims]
        found = train.places.places(targets, made)
        there = [place for place in found if place.target.key.endswith("single_blocks.7.linear1.weight")]
        return [(place.target.rows.start, place.target.rows.length, place.rank) for place in there]

    assert bands(("*.single_blocks.7.linear1", 8)) == [(0, 21504, 8)]
    assert bands(("role:attn", 8)) == [(0, 3072, 8), (3072, 3072, 8), (6144, 3072, 8)]
    assert bands(("role:attn", 8), ("*.to_k", 2)) == [(0, 3072, 8), (3072, 3072, 2), (6144, 3072, 8)]
    assert bands(("role:attn", 8), ("*.to_k", 0)) == [(0, 3072, 8), (6144, 3072, 8)]
    assert bands(("role:mlp", 8)) == [(9216, 12288, 8)]  # and not x-flux's rows of no name
    with pytest.raises(train.errors.StackError):
        bands(("*.nowhere", 8))
    with pytest.raises(train.errors.StackError, match="no weight that can be trained"):
        bands(("role:attn", 8), ("role:text", 8))


def test_what_was_learned_lands_again_and_is_written(train, ours, tmp_path):
    session = Session(train, "flux")
    session.learn()
    learned = session.run.lora("learned")
    layouts, families = ours("lora_ops.layouts"), ours("lora_ops.families")
    shapes = ours("nodes.host.patching")._shapes(session.patcher)
    for layout in layouts.LAYOUTS[:3]:
        path = tmp_path / f"{layout.name}.safetensors"
        layouts.write(path, learned, layout, families.recognise(shapes), shapes=shapes)
        lora = ours("lora_ops.lora").read_lora(str(path))
        applied = landed(ours, session, lora)
        with torch.inference_mode(), session.running():
            trained = inside.call(session.patcher)
        assert not torch.allclose(trained, inside.run(session.patcher), rtol=1e-2, atol=1e-2)
        x = inside.run(applied)
        assert (x - trained_picture(session, trained)).norm() < 1e-4 * x.norm()


def trained_picture(session, answer):
    """What a model's answer means, as its own sampling has it, on inside.call's input."""
    generator = torch.Generator().manual_seed(1)
    torch.randn(1, 768, generator=generator)  # the pooled text comes first
    x = torch.randn(1, 16, 16, 16, generator=generator)
    return session.model.sampling.calculate_denoised(torch.tensor([0.5]), answer, x)


def test_a_model_with_patches_and_live_loras_trains_as_it_samples(train, models, samples, apply):
    """Zero steps: the model answers what it would with these LoRAs; and their part is in the gradients."""
    model = models["flux"]
    both = apply(
        apply(model, (samples(model, 0, seed=1), 0.8), mode="patch"), (samples(model, 2, seed=2), 0.5), mode="live"
    )
    sampled = inside.run(both)
    patched = apply(model, (samples(model, 0, seed=1), 0.8), (samples(model, 2, seed=2), 0.5), mode="patch")
    found = []
    for each in (both, patched):
        session = Session(train, "flux", each)
        with torch.inference_mode(), session.running():
            answer = inside.call(session.patcher)
        assert (trained_picture(session, answer) - sampled).norm() < 1e-5 * sampled.norm()
        found.append(session.gradients()[1])
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-3, atol=1e-6)
    assert torch.equal(inside.run(both), sampled)


def test_what_writes_into_its_tensors_unseen_trains_on_copies_and_is_not_computed_again(train):
    """Another extension's hook, which drops what it is given back."""
    patcher = inside.model("flux")
    plain = Session(train, "flux", patcher).gradients()[0]
    block = patcher.model.diffusion_model.single_blocks[0]
    handle = block.register_forward_hook(lambda module, args, y: y.mul_(1.5) is None or None)
    loss, gradients = Session(train, "flux", patcher).gradients()
    assert loss != plain and gradients
    with pytest.raises(train.errors.TrainingError, match="computed again"):
        Session(train, "flux", patcher).gradients(checkpointing=True)
    handle.remove()
    assert Session(train, "flux", patcher).gradients(checkpointing=True)[0] == plain


def dora_of(tensors):
    """The LoRA with magnitudes."""
    downs = [key for key in tensors if key.endswith("lora_down.weight")]
    modules = [key.removesuffix(".lora_down.weight") for key in downs]
    ups = {module: tensors[f"{module}.lora_up.weight"] for module in modules}
    return tensors | {f"{module}.dora_scale": 1 + noise(len(up), 1, seed=5) ** 2 for module, up in ups.items()}


def test_under_a_live_dora_a_model_trains_as_it_samples(train, models, samples, apply):
    """It is put on after the DoRA: what that looks at has nothing of it. In weights it is the same."""
    model = models["flux"]
    dora = dora_of(samples(model, 0, seed=1))
    found = []
    for mode in ("live", "patch"):
        under = apply(model, (dora, 0.7), mode=mode)
        sampled = inside.run(under)
        session = Session(train, "flux", under)
        with torch.inference_mode(), session.running():
            noisy = noise(1, *CASES["flux"][2], seed=7)
            answer = session.model.predict(noisy, torch.tensor([0.5]), session.item.conditions)
        found.append((sampled, answer, session.gradients()[1]))
        assert torch.equal(inside.run(under), sampled)
    (_, live, ours), (_, patched, theirs) = found
    torch.testing.assert_close(live, patched, rtol=1e-3, atol=1e-4)
    assert ours.keys() == theirs.keys() and any(grad.any() for grad in theirs.values())
    for name, grad in theirs.items():
        assert (ours[name] - grad).norm() <= 1e-3 * grad.norm()


def test_a_model_kept_from_a_sample_refuses_to_run_and_takes_nothing_with_it(train):
    """It would go on changing with the run; the host ejects one that dies, whatever runs on its modules then."""
    kept, losses, patcher = [], {}, inside.model("flux")

    def learned(look):
        session = Session(train, "flux", patcher, steps=4)
        with torch.inference_mode():
            session.model.learn(session.plan, [session.item], name="x", stepped=look)

    def draw(model):
        kept.extend([model, model.clone()])
        return inside.run(kept[1])

    def look(done, session):
        losses[done.step] = done.loss
        if done.step == 1:
            session.sample(draw)
        if done.step == 2:
            kept.pop()
            gc.collect()

    learned(look)
    plain = {}
    learned(lambda done, _: plain.setdefault(done.step, done.loss))
    assert losses == plain
    for each in (kept[0], kept[0].clone()):
        with pytest.raises(train.errors.TrainingError, match="was lent for a sample"):
            inside.run(each)
    assert inside.run(patcher).isfinite().all()


def test_what_trains_looks_at_no_weight_beside_which_a_lora_runs_live(train, models, samples, apply):
    under = apply(models["flux"], (samples(models["flux"], 0, seed=1), 1.0), mode="live")
    with pytest.raises(train.errors.TrainingError, match="has a LoRA on it live, which DoRA"):
        Session(train, "flux", under, algebra="dora")
    Session(train, "flux", under)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_on_a_live_lora_checkpointing_gives_the_same_gradients_and_no_gradient_the_same_answer(
    train, samples, apply, family, turned, autocast
):
    """Also of a model that writes into its own tensors, where the live hooks write into theirs."""
    model = inside.model(family)
    tensors = samples(model, 0, seed=1)
    tensors = dora_of(tensors) if turned else tensors
    session = Session(train, family, apply(model, (tensors, 0.7), mode="live"), autocast=autocast)
    (loss, plain), (again, computed) = (
        session.gradients(checkpointing=checkpointing, autocast=autocast) for checkpointing in (False, True)
    )
    close = 1e-5 if autocast is None else 2e-2  # of sums in float32, and of bfloat16's
    assert again == pytest.approx(loss, rel=close)
    assert all((computed[name] - plain[name]).norm() <= close * plain[name].norm() for name in plain)
    with torch.inference_mode(), session.running(checkpointing=True, autocast=autocast):
        args = session.run, [session.item], session.model.predict, session.model.sampling, session.timesteps
        found = train.loop.validate(*args)
        session.model._out_of_place = False  # as it samples
        assert train.loop.validate(*args) == pytest.approx(found, rel=close)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_models_of_other_types_learn(train, dtype):
    patcher = inside.model("flux", dtype)
    before = inside.weights(patcher)
    loss, lower = Session(train, "flux", patcher).learn()
    assert lower < 0.9 * loss
    assert all(torch.equal(tensor.float(), before[key].float()) for key, tensor in inside.weights(patcher).items())


def test_weights_are_kept_as_autocast_makes_them_but_for_those_that_are_made_for_each_call(train):
    """On a processor with room for them, and until the model is done."""
    from comfy.patcher_extension import CallbacksMP

    patcher, scale = inside.model("flux"), 1.0
    module = patcher.model.diffusion_model.double_blocks[0].img_attn.proj
    function = [lambda weight: weight * scale]
    patcher.add_callback(CallbacksMP.ON_LOAD, lambda *_: setattr(module, "weight_function", function))
    session = Session(train, "flux", patcher, autocast=torch.bfloat16)
    predict = session.model.predict

    def answer():
        level = torch.full((1,), 0.5)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return predict(session.item.guise().latent[None].float(), level, [session.item.guise().condition])

    with torch.inference_mode(), session.running(autocast=torch.bfloat16):
        kept = {hook.module for hook in session.wrapper._hooks if hook.cast is not None}
        assert len(kept) == len(session.wrapper._hooks) - 1 and module not in kept
        first, scale = answer(), 3.0
        assert not torch.equal(answer(), first)
    assert session.wrapper.casts == 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_learns_under_autocast(train, checkpointing):
    session = Session(train, "flux", autocast=torch.bfloat16)
    loss, lower = session.learn(checkpointing=checkpointing, autocast=torch.bfloat16)
    assert lower < 0.9 * loss


@pytest.mark.parametrize("initial", ["gaussian", "pissa_niter_2"])
def test_a_quantised_model_learns(train, initial):
    """The host's quantised Linear, which is no nn.Linear: its gradient is that of the de-quantised weight."""
    from comfy.ops import mixed_precision_ops
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    patcher = inside.model("flux")
    block = patcher.model.diffusion_model.double_blocks[0].img_attn
    plain = block.qkv
    with torch.inference_mode():
        quantised = mixed_precision_ops({}, torch.float32).Linear(plain.in_features, plain.out_features)
        layout = QUANT_ALGOS["float8_e4m3fn"]["comfy_tensor_layout"]
        weight = QuantizedTensor.from_float(plain.weight.data, layout)
        quantised.weight = torch.nn.Parameter(weight, requires_grad=False)
        quantised.quant_format, quantised.layout_type = "float8_e4m3fn", layout
        quantised.bias = plain.bias
        block.qkv = quantised
    loss, lower = Session(train, "flux", patcher, initial=initial).learn()
    assert lower < 0.9 * loss


@pytest.mark.parametrize("algebra", ["dora", "lokr", "loha", "oft"])
def test_every_algebra_learns(train, algebra):
    loss, lower = Session(train, "sd35_medium", algebra=algebra, aims=(train.places.Aim(rank=4),)).learn()
    assert lower < 0.9 * loss


@pytest.mark.parametrize("initial", ["pissa_niter_4", "olora", "orthogonal", "eva"])
def test_every_initialisation_learns_and_what_it_learned_lands(train, ours, initial):
    """FLUX's q, k and v each begin at directions of their own rows; the file alone makes the same of the model."""
    aims = (train.places.Aim(rank=4),)
    session = Session(train, "flux", initial=initial, aims=aims)
    sampled = inside.run(session.patcher)
    with torch.inference_mode(), session.running():
        start = trained_picture(session, inside.call(session.patcher))
    assert (start - sampled).norm() < 1e-6 * sampled.norm()
    loss, lower = session.learn()
    assert lower < 0.9 * loss
    learned = session.run.lora("learned")
    doubled = initial in ("pissa_niter_4", "olora")
    assert {each.rank for each in learned.modules.values()} == {8 if doubled else 4}
    applied = landed(ours, session, learned)
    with torch.inference_mode(), session.running():
        trained = trained_picture(session, inside.call(session.patcher))
    assert (inside.run(applied) - trained).norm() < 1e-4 * trained.norm()
    assert (trained - sampled).norm() > 1e-3 * sampled.norm()
    assert torch.equal(inside.run(session.patcher), sampled)


@pytest.mark.parametrize("initial", ["pissa_niter_4", "eva"])
def test_a_run_that_goes_on_does_not_look_for_its_start_again(train, initial, tmp_path, monkeypatch):
    session, path = Session(train, "flux"), tmp_path / "state.safetensors"
    descent = train.optimizers.Descent(rate=1e-2)
    plan = train.plan.Plan(3, (train.places.Aim(rank=4),), initial=initial, descent=descent)
    whole = session.model.learn(plan, [session.item], name="whole")

    def end(done, session):
        raise train.host.Finish

    session.model.learn(plan, [session.item], name="x", path=path, stepped=end)
    monkeypatch.setattr(session.model, "begin", None)
    monkeypatch.setattr(train.plan, "of_weight", None)
    rest = session.model.learn(plan, [session.item], name="rest", path=path)
    for module, adapter in whole.modules.items():
        assert torch.equal(rest.modules[module].up, adapter.up) and torch.equal(rest.modules[module].down, adapter.down)


def landed(ours, session, lora):
    """The session's model with a LoRA on it, which lands whole."""
    landing, stack = ours("lora_ops.landing"), ours("lora_ops.stack")
    found = landing.land([stack.Entry(lora, {"model": 1.0, "clip": 1.0})], session.model.targets())
    landing.require_coverage(found, 1.0)
    return ours("nodes.host.patching").applied(found, "patch", session.patcher, None).model


def test_a_lora_of_any_dialect_goes_on_with_its_own_alpha(train, ours):
    """kohya's names, alpha 1 at rank 4."""
    session = Session(train, "sd35_medium")
    targets, draw = session.model.targets(), torch.Generator().manual_seed(0)
    lora, adapters = ours("lora_ops.lora"), ours("lora_ops.adapters")
    aims = (train.places.Aim(rank=4),)
    modules, truth = {}, {}
    for place in train.places.places(targets, aims):
        out, *inputs = place.target.delta_shape
        up, down = torch.randn(out, 4, generator=draw), torch.randn(4, *inputs, generator=draw)
        truth[place.module] = up.half().float() @ down.half().float()
        name = "lora_unet_" + place.target.names[0].replace(".", "_")
        modules[name if name in targets.names else place.module] = adapters.LowRank(up.half(), down.half(), 1.0)
    assert any(name.startswith("lora_unet_") for name in modules)
    given = lora.Lora("given", modules)
    plan = train.plan.Plan(2, aims, descent=train.optimizers.Descent(rate=1e-2))
    where = plan.places(targets)
    begun = plan.go_on(where, given, targets)
    assert {place.alpha for place in begun.adapters} == {1.0} and len(begun.adapters) == len(where)
    wrapper = train.wrapper.Wrapper(session.model.modules, begun.adapters, weight_of=train.host.weight_of)
    for place, adapter in wrapper.now().items():
        torch.testing.assert_close(adapter.up @ adapter.down, truth[place])
        assert adapter.scale == 0.25
    refused = (
        (train.plan.Plan(2, (train.places.Aim(rank=8),)), "LoRA of rank 4; the plan trains LoRA of rank 8"),
        (train.plan.Plan(2, aims, algebra="lokr"), "LoRA of rank 4; the plan trains LoKr of rank 4"),
        (train.plan.Plan(2, (train.places.Aim(train.select.Pattern.parse("*.to_q"), 4),)), "does not train"),
    )
    for other, message in refused:
        with pytest.raises(train.errors.TrainingError, match=message) as caught:
            other.go_on(other.places(targets), given, targets)
        assert caught.value.module
    learned = session.model.learn(plan, [session.item], name="more", lora=given)
    assert {each.scale for each in learned.modules.values()} == {0.25}


def test_a_lora_whose_parts_were_written_together_goes_on_in_parts(train, ours, tmp_path):
    """kohya's names have one LoRA for FLUX's fused q, k and v."""
    layouts, lora, adapters = ours("lora_ops.layouts"), ours("lora_ops.lora"), ours("lora_ops.adapters")
    families, patching = ours("lora_ops.families"), ours("nodes.host.patching")
    session = Session(
        train, "flux", aims=(train.places.Aim(None, 4), train.places.Aim(train.select.Pattern.parse("*.to_k"), 2))
    )
    draw, modules = torch.Generator().manual_seed(4), {}
    for place in session.where:
        out, *inputs = place.target.delta_shape
        factors = torch.randn(out, place.rank, generator=draw), torch.randn(place.rank, *inputs, generator=draw)
        modules[place.module] = adapters.LowRank(*factors, float(place.rank))
    shapes = patching._shapes(session.patcher)
    (kohya,) = (each for each in layouts.LAYOUTS if each.name == "kohya")
    layouts.write(
        tmp_path / "one.safetensors", lora.Lora("one", modules), kohya, families.recognise(shapes), shapes=shapes
    )
    fused = lora.read_lora(str(tmp_path / "one.safetensors"))
    assert len(fused.modules) < len(modules) and {each.rank for each in fused.modules.values()} > {10}
    begun = session.plan.go_on(session.where, fused, session.model.targets())
    assert len(begun.adapters) == len(modules)
    for place, adapter in begun.adapters.items():
        given = modules[place.module]
        assert adapter.rank == given.rank
        torch.testing.assert_close(adapter.scale * adapter.up @ adapter.down, given.up @ given.down)
    mixed = {name: each for name, each in fused.modules.items()}
    name = next(name for name, each in mixed.items() if each.rank == 10)
    mixed[name] = adapters.LowRank(torch.ones_like(mixed[name].up), mixed[name].down, mixed[name].alpha)
    with pytest.raises(train.errors.TrainingError, match="no module for on the same rows"):
        session.plan.go_on(session.where, lora.Lora("mixed", mixed), session.model.targets())


def test_out_of_memory_names_the_setting_that_frees_most_and_goes_on_later(train, tmp_path):
    session = Session(train, "sd35_medium")
    plan = train.plan.Plan(4, (train.places.Aim(rank=4),), descent=train.optimizers.Descent(rate=1e-2))
    whole = session.model.learn(plan, [session.item], name="whole")
    path, steps, foreseen = tmp_path / "state.safetensors", [], []

    class Full(train.host.Model):
        def predict(self, noisy, sigma, conditions):
            if steps and steps[-1] == 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().predict(noisy, sigma, conditions)

    with pytest.raises(train.errors.TrainingError, match="checkpointing.*frees most") as caught:
        Full(session.patcher).learn(
            plan,
            [session.item],
            name="x",
            path=path,
            foreseen=lambda needed, free: foreseen.append((needed, free)),
            stepped=lambda done, _: steps.append(done.step),
        )
    assert "2 steps before" in str(caught.value) and caught.value.facts["step"] == 3
    ((needed, free),) = foreseen
    count = sum(each.up.numel() + each.down.numel() for each in whole.modules.values())
    assert needed.parameters == 16 * count and needed.activations > 0 and free > 0
    rest = session.model.learn(plan, [session.item], name="rest", path=path)
    assert all(torch.equal(rest.modules[name].up, each.up) for name, each in whole.modules.items())


def test_nothing_to_learn_from_is_said(train):
    session = Session(train, "sd35_medium")
    with pytest.raises(train.errors.TrainingError, match="nothing to learn from"):
        session.model.learn(session.plan, [], name="x")


def test_cancelling_keeps_the_state(train, tmp_path):
    import comfy.model_management

    session, path = Session(train, "sd35_medium"), tmp_path / "state.safetensors"
    plan = train.plan.Plan(4, (train.places.Aim(rank=4),), descent=train.optimizers.Descent(rate=1e-2))

    def cancel(done, _):
        if done.step == 2:
            comfy.model_management.interrupt_current_processing()

    kept = []
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        session.model.learn(
            plan,
            [session.item],
            name="x",
            path=path,
            stepped=cancel,
            stopped=lambda session: kept.append((session.lora("kept"), path.exists())),
        )
    ((lora, saved),) = kept
    assert lora.modules and saved
    assert not comfy.model_management.in_training
    steps = []
    session.model.learn(plan, [session.item], name="x", path=path, stepped=lambda done, _: steps.append(done.step))
    assert steps == [3, 4]


def test_what_is_foreseen_is_what_is_kept(train):
    """Beside autograd's own: the storages that stand behind what it saved when the forward pass is over. With
    checkpointing there is one block's more, and the blocks' inputs instead of what is inside. Under autocast the cast
    weights are among it."""
    foreseen, kept = [], []
    for checkpointing, autocast in ((False, None), (True, None), (False, torch.bfloat16)):
        session, saved = Session(train, "flux"), {}
        more = {"checkpointing": checkpointing, "autocast": autocast}
        with torch.inference_mode(), session.running(**more) as found:

            def pack(tensor, saved=saved):
                saved[tensor.untyped_storage()._cdata] = tensor
                return tensor

            x = session.item.latents[0][None]
            casting = torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None)
            with casting, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                session.model.predict(x, torch.tensor([0.5]), [session.item.conditions[0]])
            foreseen.append(found.kept)
            frozen = {p.untyped_storage()._cdata for p in session.patcher.model.parameters()}
            frozen |= {p.untyped_storage()._cdata for p in session.run.parameters.values()}
            kept.append(sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in frozen))
    assert foreseen[0] == pytest.approx(kept[0], rel=0.02) and foreseen[2] == pytest.approx(kept[2], rel=0.02)
    assert kept[1] < foreseen[1] < 0.8 * foreseen[0]


@pytest.mark.parametrize("kind", ["EPS", "V_PREDICTION", "V_PREDICTION_EDM", "STABLE_CASCADE", "EDM", "FLOW", "FLUX"])
def test_an_answer_that_costs_nothing_is_the_picture(train, ours, kind):
    """Of each of the host's samplings: what a model should answer means the latent itself."""
    from comfy.model_base import ModelType, model_sampling

    class Config:
        sampling_settings = types.MappingProxyType({})

    sampling = model_sampling(Config(), getattr(ModelType, kind))
    objectives = ours("lora_ops.train.objectives")
    latent, drawn = noise(3, 4, 8, 8), noise(3, 4, 8, 8, seed=1)
    sigma = train.timesteps.Timesteps().sigmas(sampling, torch.tensor([0.1, 0.5, 0.9]), 8, 8)
    assert len(set(sigma.tolist())) == 3
    x = objectives.noisy(sampling, sigma, drawn, latent)
    wanted = objectives.target(objectives.coefficients(sampling, sigma), drawn, latent)
    means = sampling.calculate_denoised(sigma, wanted, x)
    torch.testing.assert_close(means, latent, rtol=1e-3, atol=1e-3)


def test_pictures_of_different_prompts_train_in_one_batch_as_alone(train):
    session = Session(train, "sd35_medium", batch=2)
    with torch.inference_mode():
        other = session.model.item(noise(16, 16, 16, seed=4), conditioning("sd35_medium", seed=9))
        with session.running():
            x, sigma = noise(2, 16, 16, 16, seed=5), torch.tensor([0.3, 0.8])
            conditions = [session.item.conditions[0], other.conditions[0]]
            both = session.model.predict(x, sigma, conditions)
            for n in range(2):
                alone = session.model.predict(x[n : n + 1], sigma[n : n + 1], conditions[n : n + 1])
                torch.testing.assert_close(both[n : n + 1], alone, rtol=1e-4, atol=1e-4)


def test_guidance_is_told_to_models_that_are_distilled_and_to_no_other(train):
    session, answers = Session(train, "flux"), []
    with torch.inference_mode(), session.running():
        for guidance in (1.0, 3.5, None):
            item = session.model.item(noise(16, 16, 16), conditioning("flux"), guidance=guidance)
            answers.append(session.model.predict(item.latents[0][None], torch.tensor([0.5]), [item.conditions[0]]))
    assert torch.equal(answers[1], answers[2]) and not torch.equal(answers[0], answers[1])  # the host's default is 3.5
    with pytest.raises(train.errors.TrainingError, match="no guidance"):
        Session(train, "sd35_medium").model.item(noise(16, 16, 16), conditioning("sd35_medium"), guidance=1.0)


def test_a_conditioning_that_is_no_plain_prompt_is_refused(train):
    session = Session(train, "sd35_medium")
    ((cross, options),) = conditioning("sd35_medium")
    for wrong in ([[cross, options | {"control": object()}]], [[cross, options]] * 2, []):
        with pytest.raises(train.errors.TrainingError):
            session.model.item(noise(16, 16, 16), wrong)


def drawn(family, seed):
    """What the host's own sampler makes of a MODEL, in two steps; draws from the process's random numbers, too."""
    import comfy.sample

    def draw(model):
        assert torch.is_inference_mode_enabled()
        latent = torch.zeros(1, *CASES[family][2])
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            start = torch.randn(latent.shape)
        torch.randn(7)
        prompt = conditioning(family)
        args = model, start, 2, 3.0, "euler", "simple", prompt, prompt, latent
        return comfy.sample.sample(*args, seed=seed, disable_pbar=True)

    return draw


@pytest.mark.parametrize(
    ("family", "optimizer", "checkpointing"),
    [("flux", "adamw", False), ("flux", "schedule_free", True), ("sd15", "adamw", True), ("wan_t2v", "adamw", False)],
)
def test_training_goes_on_after_a_sample_as_if_there_had_been_none(train, ours, family, optimizer, checkpointing):
    """And the sample is that of the model with the LoRA so far on it."""
    import comfy.model_management

    if optimizer == "schedule_free":
        pytest.importorskip("schedulefree")
    session = Session(train, family)
    descent = train.optimizers.Descent(optimizer, rate=3e-2)
    plan = train.plan.Plan(5, (train.places.Aim(rank=4),), descent=descent, dropout=0.1, ema=0.5)
    found, loras, losses = [], [], []

    def look(done, session):
        assert comfy.model_management.in_training and not torch.is_inference_mode_enabled()
        seen.append(done.loss)
        if len(loras) == 1 and done.step in (2, 3):
            state = torch.get_rng_state()
            found.append((session.lora("until now"), session.sample(drawn(family, done.step)), done.step))
            assert torch.equal(torch.get_rng_state(), state)

    for _ in range(2):
        seen = []
        with torch.inference_mode():
            more = {"name": "x", "checkpointing": checkpointing, "stepped": look}
            loras.append(session.model.learn(plan, [session.item], **more))
        losses.append(seen)
    assert losses[0] == losses[1]
    for module, adapter in loras[0].modules.items():
        assert torch.equal(adapter.up, loras[1].modules[module].up)
        assert torch.equal(adapter.down, loras[1].modules[module].down)
    base = [inside_inference(drawn(family, step), session.patcher) for _, _, step in found]
    for (lora, sample, step), plain in zip(found, base, strict=True):
        applied = inside_inference(drawn(family, step), landed(ours, session, lora))
        assert (sample - applied).norm() < 1e-3 * (applied - plain).norm()


def inside_inference(draw, model):
    with torch.inference_mode():
        return draw(model)


def test_who_looks_on_may_save_now_and_end_the_run(train, tmp_path):
    session, path = Session(train, "sd35_medium"), tmp_path / "state.safetensors"
    plan = train.plan.Plan(6, (train.places.Aim(rank=4),), descent=train.optimizers.Descent(rate=1e-2), ema=0.5)
    whole = session.model.learn(plan, [session.item], name="whole")

    def end(done, session):
        assert done.memory > 0
        if done.step == 2:
            session.save()
            assert path.exists()
        if done.step == 4:
            raise train.host.Finish

    steps = []
    with torch.inference_mode():  # as a node has it: no tensor of the state may come from there
        early = session.model.learn(plan, [session.item], name="early", path=path, stepped=end)
        more = {"path": path, "stepped": lambda done, _: steps.append(done.step)}
        rest = session.model.learn(plan, [session.item], name="rest", **more)
    assert any(not torch.equal(each.up, whole.modules[name].up) for name, each in early.modules.items())
    assert steps == [5, 6]
    assert all(torch.equal(each.up, whole.modules[name].up) for name, each in rest.modules.items())
    with pytest.raises(train.errors.TrainingError, match="no file"):
        session.model.learn(plan, [session.item], name="x", stepped=lambda done, session: session.save())


def test_an_estimate_alone_trains_nothing(train):
    session, heard = Session(train, "sd35_medium"), []

    def foreseen(needed, free):
        heard.append(needed.total)
        raise train.host.Finish

    session.model.learn(session.plan, [session.item], name="x", foreseen=foreseen, stepped=lambda *_: heard.append(0))
    assert len(heard) == 1 and heard[0] > 0


def test_pictures_train_in_their_guises(train, ours):
    """The host's scaling, the mirror image with its mask, no text at times, what is held out as it is."""
    session, dataset = Session(train, "flux"), ours("lora_ops.train.dataset")
    latent = noise(16, 16, 16, seed=5)
    mask = torch.zeros(1, 16, 16)
    mask[..., :3] = 1
    prompt, empty = conditioning("flux"), conditioning("flux", seed=9)
    picture = dataset.Picture(
        "a.png", (latent, latent.flip(-1)), (prompt,), (mask, mask.flip(-1)), repeats=3, weight=0.5
    )
    data = dataset.Dataset((picture,), (picture,), empty, 0.5)
    with torch.inference_mode():
        (item,), (held,) = session.model.items(data, guidance=1.0)
    scaled = session.patcher.model.process_latent_in(latent[None])[0]
    torch.testing.assert_close(item.latents[0], scaled)
    torch.testing.assert_close(item.latents[1], scaled.flip(-1))
    assert torch.equal(item.masks[1], mask.flip(-1)) and (item.repeats, item.weight, item.dropout) == (3, 0.5, 0.5)
    assert held.dropout == 0 and item.conditions[0][0][1]["guidance"] == item.empty[0][1]["guidance"] == 1.0
    learned = session.model.learn(session.plan, [item], held_out=[held], name="x")
    assert learned.modules
    wrong = dataset.Picture("b.png", (latent,), (prompt,), (mask[..., :8],))
    with pytest.raises(train.errors.TrainingError, match=r"b\.png.*16 x 8"):
        session.model.items(dataset.Dataset((wrong,)))
    video = Session(train, "wan_t2v")
    wide = dataset.Picture("c.png", (noise(16, 1, 16, 16),), (conditioning("wan_t2v"),), (mask,))
    (item,), _ = video.model.items(dataset.Dataset((wide,)))
    assert item.masks[0].shape == (1, 1, 16, 16)
