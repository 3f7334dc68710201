"""Initialisations against PEFT, which moves the base where we take off: they begin at it and train as PEFT's do."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from lora_ops.errors import TrainingError
from lora_ops.lora import Target
from lora_ops.train.initial import moves, of_inputs, of_weight
from lora_ops.train.places import Aim, Place
from lora_ops.train.plan import Plan
from lora_ops.train.wrapper import Wrapper

peft = pytest.importorskip("peft", reason="peft is the oracle here; it is in the test environment")


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 20), nn.Linear(20, 16)
        for number, parameter in enumerate(self.parameters()):
            parameter.data = rand(*parameter.shape, seed=number) / 4
            parameter.requires_grad_(False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def places(model, rank=4):
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            target = Target("model", f"{name}.weight", tuple(module.weight.shape), names=(name,))
            found.append(Place(name, target, rank, 2.0 * rank))
    return found


def wrapped(model, kind, directions=dict):
    modules = {name: module for name, module in model.named_modules() if name}
    begun = Plan(1, initial=kind).begin(places(model), lambda p: modules[p.module].weight, directions)
    return Wrapper(modules, begun.adapters, taken_off=begun.taken_off)


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_8", "olora", "orthogonal"])
def test_it_begins_at_the_base_and_trains_as_pefts(kind):
    model, x = Small(), rand(5, 12)
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["first", "second"], "init_lora_weights": kind}
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**config))
    plain, state = model(x), torch.get_rng_state()
    wrapper = wrapped(model, kind)
    assert torch.equal(torch.get_rng_state(), state)
    wrapper.install()
    if moves(kind):
        assert torch.equal(model(x), plain)
    torch.testing.assert_close(model(x), plain, rtol=0, atol=1e-6)
    parameters = {}
    for number, name in enumerate(("first", "second")):
        layer = getattr(theirs.base_model.model, name)
        for ours, factor in (("up", layer.lora_B["default"]), ("down", layer.lora_A["default"])):
            parameter = wrapper.parameters()[f"{name}.{ours}"]
            if kind in ("pissa", "olora"):  # the others draw
                torch.testing.assert_close(parameter.detach(), factor.weight.detach(), rtol=1e-4, atol=1e-5)
            moved = 0.1 * rand(*parameter.shape, seed=number)
            if kind in ("pissa", "olora"):
                factor.weight.data = factor.weight.data + moved
                parameter.data = parameter.data + moved
                parameters[f"{name}.{ours}"] = parameter, factor.weight
    if not parameters:
        return
    (theirs(x) * rand(5, 16, seed=3)).sum().backward()
    (model(x) * rand(5, 16, seed=3)).sum().backward()
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-4, atol=1e-5)
    for ours, truth in parameters.values():
        assert ours.grad is not None
        assert (ours.grad - truth.grad).norm() <= 1e-4 * truth.grad.norm()


def test_evas_directions_are_pefts():
    model = Small()
    batches = [rand(64, 12, seed=seed) * torch.linspace(0.1, 4, 12) for seed in range(3)]
    eva = {"init_lora_weights": "eva", "eva_config": peft.EvaConfig(rho=1.0)}
    config = peft.LoraConfig(r=4, target_modules=["first", "second"], **eva)
    theirs = peft.get_eva_state_dict(
        model,
        [{"x": x} for x in batches],
        config,
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    modules = {name: module for name, module in model.named_modules() if name}
    ours = of_inputs(modules, places(model), (lambda x=x: model(x) for x in itertools.cycle(batches)))
    assert len(ours) == 2
    for place, directions in ours.items():
        torch.testing.assert_close(directions, theirs[place.module].float(), rtol=1e-3, atol=1e-4)
    plain, x = model(batches[0]), batches[0]
    wrapper = wrapped(model, "eva", lambda: ours)
    wrapper.install()
    assert torch.equal(model(x), plain)
    assert torch.equal(wrapper.parameters()["first.down"].detach(), ours[places(model)[0]])
    assert all(not module._forward_hooks for module in modules.values())


def test_what_is_not_possible_is_refused_by_name():
    with pytest.raises(TrainingError, match="no initialisation"):
        Plan(1, initial="pisa")
    with pytest.raises(TrainingError, match="for LoRA, not for lokr"):
        Plan(1, initial="pissa", algebra="lokr")
    with pytest.raises(TrainingError, match="no 20 directions"):
        of_weight("pissa", rand(16, 32), 20, 20.0, 0)
    with pytest.raises(TrainingError, match="even"):
        of_weight("orthogonal", rand(16, 32), 3, 3.0, 0)
    model = Small()
    modules = {name: module for name, module in model.named_modules() if name}
    with pytest.raises(TrainingError, match="too few rows") as caught:
        of_inputs(modules, places(model), [lambda: model(rand(3, 12))])
    assert caught.value.module == "first"
    assert Plan(1, aims=(Aim(rank=4),), initial="pissa_niter_4").initial == "pissa_niter_4"


@pytest.mark.parametrize("kind", ["pissa_niter_2", "orthogonal"])
def test_the_same_seed_draws_the_same(kind):
    first, again, other = (of_weight(kind, rand(16, 32), 4, 4.0, seed) for seed in (1, 1, 2))
    assert torch.equal(first.down, again.down) and torch.equal(first.up, again.up)
    assert not torch.equal(first.down, other.down)


def test_a_convolution_is_a_matrix_to_pissa():
    weight = rand(16, 3, 3, 3)
    found = of_weight("pissa", weight, 16, 32.0, 0)
    torch.testing.assert_close(found.delta(tuple(weight.shape)), weight, rtol=0, atol=1e-4)
