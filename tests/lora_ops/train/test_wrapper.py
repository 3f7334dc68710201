"""The wrapper against PEFT: the same output, the same gradients, for every algebra; and the base as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lora_ops.adapters import DoRA, InputOFT, LowRank, build
from lora_ops.errors import TargetError
from lora_ops.landing import Piece, merged
from lora_ops.lora import Band, Target
from lora_ops.train.frozen import stored_weight
from lora_ops.train.places import Place
from lora_ops.train.randomness import generator
from lora_ops.train.starts import start
from lora_ops.train.wrapper import Draw, Wrapper

ALGEBRAS = ("lora", "dora", "lokr", "loha", "oft")


class Small(nn.Module):
    """Two convolutions, a norm and two linear maps, so that gradients pass through maps that do not train."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 12, 3, padding=1, stride=2)
        self.norm = nn.GroupNorm(3, 12)
        self.second = nn.Conv2d(12, 16, 1)
        self.linear = nn.Linear(16, 24)
        self.last = nn.Linear(24, 4)

    def forward(self, x):
        x = self.second(torch.tanh(self.norm(self.first(x))))
        return self.last(torch.tanh(self.linear(x.flatten(2).mT)))


TRAINED = ("first", "second", "linear")


def small(seed: int = 0) -> Small:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Small()


def modules(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if name}


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def place(model, name, rank=4, alpha=4.0, band=None):
    key = f"{name}.weight"
    target = Target("model", key, tuple(model.get_parameter(key).shape), band, names=(name, key))
    return Place(f"{name}{band or ''}", target, rank, alpha)


def begun(model, algebra, names=TRAINED, seed=0, **more):
    """Place -> the adapter training begins with."""
    found = {}
    for number, name in enumerate(names):
        there = place(model, name, **more)
        weight = model.get_parameter(there.target.key).detach()
        shape = there.target.delta_shape
        found[there] = start(algebra, shape, there.rank, there.alpha, generator(seed, number), lambda w=weight: w)
    return found


def stirred(adapters, seed=5):
    """The same with every tensor moved, so that nothing is zero."""
    from lora_ops.train.wrapper import _mapped

    def moved(name, tensor):
        return tensor + 0.1 * rand(*tensor.shape, seed=seed)

    return {where: _mapped(adapter, moved) for where, adapter in adapters.items()}


@pytest.mark.parametrize("algebra", ALGEBRAS)
def test_a_start_changes_no_bit(algebra):
    model, x = small(), rand(2, 4, 8, 8)
    plain = model(x)
    wrapper = Wrapper(modules(model), begun(model, algebra))
    wrapper.install()
    assert torch.equal(model(x), plain)
    model(x).square().sum().backward()
    grads = [parameter.grad for parameter in wrapper.parameters().values()]
    assert any(grad is not None and grad.abs().sum() > 0 for grad in grads)


@pytest.mark.parametrize("algebra", ALGEBRAS)
def test_it_runs_as_its_lora_is_merged(algebra):
    """What trains is what is saved: the wrapper's output is that of the base with the Lora in its weights."""
    model, x = small(), rand(2, 4, 8, 8)
    wrapper = Wrapper(modules(model), stirred(begun(model, algebra, alpha=3.0)))
    truth = copy.deepcopy(model)
    wrapper.install()
    ran = model(x)
    for name, adapter in wrapper.now().items():
        weight = truth.get_submodule(name).weight
        weight.data = merged(weight.data, [Piece(adapter, None, 1.0)])
    torch.testing.assert_close(ran, truth(x), rtol=1e-5, atol=1e-6)
    wrapper.remove()
    assert not torch.allclose(ran, model(x), rtol=1e-2, atol=1e-2)


def held(algebra):
    """What PEFT is an oracle for: its OFT folds a 3x3 convolution's patches back and runs otherwise than it merges."""
    return TRAINED[1:] if algebra == "oft" else TRAINED


def peft_model(model, algebra):
    peft = pytest.importorskip("peft", reason="peft is the oracle here; it is in the test environment")
    common = {"target_modules": list(held(algebra))}
    config = {
        "lora": lambda: peft.LoraConfig(r=4, lora_alpha=3, **common),
        "dora": lambda: peft.LoraConfig(r=4, lora_alpha=3, use_dora=True, **common),
        "loha": lambda: peft.LoHaConfig(r=4, alpha=3, **common),
        "lokr": lambda: peft.LoKrConfig(r=2, alpha=2, **common),
        "oft": lambda: peft.OFTConfig(oft_block_size=4, r=0, use_cayley_neumann=True, **common),
    }[algebra]()
    return peft.get_peft_model(copy.deepcopy(model), config)


NAMES = {"up": "lora_B", "down": "lora_A", "magnitude": "lora_magnitude_vector", "vectors": "oft_R"}


def peft_parameter(layer, name):
    """PEFT's parameter for one of ours."""
    name = name.removeprefix("inner.")
    found = getattr(layer, NAMES.get(name, name))["default"]
    return found if isinstance(found, nn.Parameter) else found.weight


@pytest.mark.parametrize("algebra", ALGEBRAS)
def test_gradients_are_pefts(algebra):
    model, x = small(), rand(2, 4, 8, 8)
    theirs = peft_model(model, algebra)
    adapters = {}
    for number, name in enumerate(held(algebra)):
        layer = theirs.base_model.model.get_submodule(name)
        there = place(model, name, alpha=3.0)
        weight = model.get_parameter(there.target.key).detach()
        adapters[there] = ours_from(layer, algebra, there, weight, number)
    wrapper = Wrapper(modules(model), adapters)
    wrapper.install()
    ran, truth = model(x), theirs(x)
    torch.testing.assert_close(ran, truth, rtol=1e-5, atol=1e-6)
    for y in (ran, truth):
        (y * rand(*y.shape, seed=9)).sum().backward()
    checked = 0
    for each in wrapper.trained:
        layer = theirs.base_model.model.get_submodule(each.place.target.names[0])
        for name, parameter in each.parameters.items():
            expected = peft_parameter(layer, name).grad
            assert parameter.grad is not None and expected is not None
            difference = (parameter.grad.flatten() - expected.flatten()).norm()
            assert difference <= 1e-5 * expected.norm(), (each.place.module, name)
            checked += 1
    assert checked >= len(held(algebra))


def ours_from(layer, algebra, where, weight, number):
    """PEFT's layer, its parameters set to random numbers, as our adapter of the same tensors."""
    begun = start(algebra, where.target.shape, 4, 3.0, generator(number), lambda: weight)
    names = {"lora": ("up", "down"), "dora": ("up", "down"), "oft": ("vectors",)}.get(algebra)
    if algebra in ("loha", "lokr"):
        names = [n for n in layer.adapter_layer_names if n in layer._modules and "default" in getattr(layer, n)]
    factors = {}
    for position, name in enumerate(names):
        parameter = peft_parameter(layer, name)
        scale = 0.02 if name == "vectors" else 0.2
        parameter.data = scale * rand(*parameter.shape, seed=100 * number + position)
        factors[name] = parameter.data.clone()
    if algebra == "oft":
        return InputOFT(factors["vectors"])
    if algebra in ("loha", "lokr"):
        return build({**factors, "alpha": torch.tensor(2.0 if algebra == "lokr" else 3.0)})  # whole ones: PEFT divides
    inner = LowRank(factors["up"], factors["down"], 3.0)
    if algebra == "lora":
        return inner
    assert isinstance(begun, DoRA)
    magnitude = peft_parameter(layer, "magnitude")
    magnitude.data = magnitude.data * (1 + 0.1 * rand(*magnitude.shape, seed=77))
    return DoRA(inner, magnitude.data.flatten().clone())


def test_bands_train_beside_rows_that_do_not():
    """FLUX's linear1 is q, k, v and mlp in one: here rows 6 to 12 and 18 to 24 train."""
    model, x = small(), rand(2, 4, 8, 8)
    model = model.requires_grad_(False)
    adapters = {}
    for number, band in enumerate((Band(18, 6), Band(6, 6))):
        there = place(model, "linear", band=band)
        adapters[there] = start("lora", there.target.delta_shape, 4, 4.0, generator(number), lambda: torch.ones(6))
    plain = model.linear(rand(3, 16))
    wrapper = Wrapper(modules(model), stirred(adapters))
    wrapper.install()
    y = model.linear(rand(3, 16))
    changed = (y != plain).any(0)
    assert changed.tolist() == [False] * 6 + [True] * 6 + [False] * 6 + [True] * 6
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in wrapper.parameters().values())


def test_weights_of_inference_mode_train_and_stay():
    """The host loads models in inference mode: torch refuses to keep such weights for a backward pass."""
    with torch.inference_mode():
        model = small()
        for module in model.modules():
            for name, parameter in module._parameters.items():
                module._parameters[name] = nn.Parameter(parameter.clone(), requires_grad=False)
    assert model.linear.weight.is_inference() and model.norm.weight.is_inference()
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    wrapper = Wrapper(modules(model), begun(model, "lora"))
    wrapper.install()
    model(rand(2, 4, 8, 8)).square().sum().backward()
    assert wrapper.parameters()["first.up"].grad.abs().sum() > 0
    wrapper.remove()
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1])
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_gradients_of_a_cast_weight_are_those_of_the_weight_it_is_cast_to(dtype):
    """A map whose weight is stored in another type, cast for each call, as the host's are."""

    class Cast(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)

    stored = nn.Parameter((rand(8, 8) / 3).to(dtype), requires_grad=False)
    cast, plain = Cast(8, 8), nn.Linear(8, 8)
    cast.weight, cast.bias = stored, plain.bias
    plain.weight = nn.Parameter(stored.float(), requires_grad=False)
    found = []
    for inner in (cast, plain):
        model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Tanh(), inner).requires_grad_(False)
        model[0].weight.copy_(rand(8, 8, seed=3))
        wrapper = Wrapper(modules(model), begun(model, "lora", names=("0",)))
        wrapper.install()
        model(rand(5, 8)).square().sum().backward()
        found.append(wrapper.parameters()["0.up"].grad)
        wrapper.remove()
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_dropout_is_the_same_for_the_same_draw_and_unbiased():
    model, x = small(), rand(2, 4, 8, 8)
    wrapper = Wrapper(modules(model), stirred(begun(model, "lora", names=("linear",))), dropout=0.5)
    wrapper.install()
    state = torch.get_rng_state()
    whole = model(x)
    wrapper.draw = Draw(0, 3, 0)
    first, second = model(x), model(x)
    wrapper.draw = Draw(0, 4, 0)
    other = model(x)
    assert torch.equal(first, second) and not torch.equal(first, other) and not torch.equal(first, whole)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_taken_off_makes_a_start_that_changes_no_bit_and_a_lora_of_twice_the_rank():
    model, x = small(), rand(2, 4, 8, 8)
    adapters = stirred(begun(model, "lora", alpha=3.0))
    plain = model(x)
    wrapper = Wrapper(modules(model), adapters, taken_off=adapters)
    wrapper.install()
    assert torch.equal(model(x), plain)
    with torch.no_grad():
        for parameter in wrapper.parameters().values():
            parameter += 0.1
    ran = model(x)
    wrapper.remove()
    truth = copy.deepcopy(model)
    for name, adapter in wrapper.now().items():
        assert adapter.rank == 8
        weight = truth.get_submodule(name).weight
        weight.data = merged(weight.data, [Piece(adapter, None, 1.0)])
    torch.testing.assert_close(ran, truth(x), rtol=1e-5, atol=1e-5)


def test_what_cannot_train_is_refused_by_name():
    model = small()
    target = Target("model", "norm.weight", (12, 1), names=("norm",))
    with pytest.raises(TargetError, match="norm.weight"):
        Wrapper(modules(model), {Place("norm", target, 4, 4.0): LowRank(rand(12, 4), rand(4, 1))})


def test_a_hook_of_another_below_is_refused_and_nothing_is_left():
    model = small()
    own = model.linear.forward
    model.linear.forward = lambda x: own(x) * 2
    wrapper = Wrapper(modules(model), begun(model, "lora"))
    with pytest.raises(TargetError, match="linear"):
        wrapper.install()
    assert "forward" not in vars(model.first)


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_under_autocast_maps_with_casts_are_what_the_modules_are_and_never_ask_for_their_weights(stored, learns):
    """To the bit in the output; the gradient to bfloat16's rounding."""
    found, asked = [], []

    def weight_of(module, like):
        asked.append(module)
        return stored_weight(module, like)

    for wrapped in (False, True):
        model = small().requires_grad_(False).to(stored)
        wrapper = Wrapper(modules(model), {}, weight_of=weight_of)
        if wrapped:
            wrapper.install()
            wrapper.make_casts(torch.bfloat16)
            weights = sum(each.weight.numel() for each in model.children() if each is not model.norm)
            assert wrapper.casts == (0 if stored == torch.bfloat16 else 2 * weights)
        asked.clear()
        x = rand(2, 4, 8, 8).requires_grad_(learns)
        with torch.autocast("cpu", torch.bfloat16):
            y = model.linear(torch.tanh(model.first(x))[:, :1].expand(-1, 16, -1, -1).flatten(2).mT)
        if learns:
            (y.float() * rand(*y.shape, seed=1)).sum().backward()
        found.append((y.detach(), x.grad))
        if wrapped:
            assert len(asked) == (2 if learns and stored == torch.bfloat16 else 0)
            wrapper.drop_casts()
            assert wrapper.casts == 0
    (plain, wanted), (ours, gradient) = found
    assert torch.equal(ours, plain) and ours.dtype == torch.bfloat16
    if learns:
        assert (gradient - wanted).norm() < 0.01 * wanted.norm()


def test_casts_are_for_autocast_to_their_own_type_alone():
    model = small()
    wrapper = Wrapper(modules(model), {})
    wrapper.install()
    wrapper.make_casts(torch.float16)
    for hook in wrapper._hooks:
        hook.cast.weight.fill_(torch.nan)
    x = rand(3, 16)
    exact = nn.functional.linear(x, model.linear.weight, model.linear.bias)
    assert torch.equal(model.linear(x), exact)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.linear(x).isfinite().all()


@pytest.mark.parametrize("inference", [False, True])
def test_weights_that_ask_for_gradients_get_none(inference):
    """As some hosts leave them: of maps, norms and tables, made in inference mode or not."""
    with torch.inference_mode(inference):
        model = nn.Sequential(nn.Embedding(7, 16), nn.LayerNorm(16), nn.Linear(16, 16), nn.LayerNorm(16))
    before = dict(model.named_parameters())
    assert all(parameter.requires_grad for parameter in before.values())
    there = place(model, "2")
    wrapper = Wrapper(modules(model), {there: start("lora", (16, 16), 4, 4.0, generator(0), rand)})
    wrapper.install()
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    wrapper.remove()
    assert wrapper.parameters()["2.up"].grad is not None
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in before.values())
