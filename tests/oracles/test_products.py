"""LyCORIS and PEFT as oracles of LoHa, LoKr, GLoRA and Tucker cores: what they save is merged as they run it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lora_ops.adapters import Adapter
from lora_ops.files import TensorFile
from lora_ops.landing import Piece, merged
from lora_ops.lora import from_file, read_lora

peft = pytest.importorskip("peft", reason="peft is an oracle here; it is in the test environment")
lycoris = pytest.importorskip("lycoris.modules", reason="lycoris is an oracle here; it is in the test environment")
glora = pytest.importorskip("lycoris.modules.glora", reason="lycoris is an oracle here")

LAYERS = {
    "linear": lambda: nn.Linear(24, 16),
    "conv1d": lambda: nn.Conv1d(12, 16, 3),
    "conv2d": lambda: nn.Conv2d(12, 16, (3, 2)),
    "conv3d": lambda: nn.Conv3d(12, 16, (1, 3, 3)),
    "point": lambda: nn.Conv2d(12, 16, 1),
}
each_layer = pytest.mark.parametrize("layer", LAYERS)


def read(tensors: dict[str, Tensor], factors: set[str]) -> Adapter:
    """The one module of a file, which should have these factors and no others."""
    lora = from_file(
        TensorFile("oracle", {f"base_model.model.layer.{name}": tensor for name, tensor in tensors.items()})
    )
    assert not lora.leftover and {name.removesuffix(".weight") for name in tensors} == factors | {"alpha"}
    (adapter,) = lora.modules.values()
    return adapter


def require_equal(adapter: Adapter, base: nn.Module, output: nn.Module) -> None:
    """What a unit input puts out is a column of the weight: the forward pass is the truth.

    Both compute in float32, a few units in the last place of the sums.
    """
    weight = base.weight.detach()
    inputs = weight[0].numel()
    with torch.no_grad():
        units = torch.eye(inputs).reshape(inputs, *weight.shape[1:])
        found = output(units) - base.bias.reshape(-1, *(1 for _ in weight.shape[2:]))
    truth = found.reshape(inputs, -1).T.reshape(weight.shape)
    adapter.require_fit(tuple(weight.shape))
    ours = merged(weight, [Piece(adapter, None, 1.0)])
    assert float((truth - weight).norm() / weight.norm()) > 1e-2
    assert float((ours - truth).norm() / (truth - weight).norm()) < 1e-5


def of_lycoris(kind: str, layer: str, factors: set[str], **options: object) -> None:
    torch.manual_seed(1)
    base = LAYERS[layer]()
    module = getattr(lycoris, kind)("layer", base, alpha=3.0, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.5 * torch.randn(parameter.shape)
    state = module.custom_state_dict() or module.state_dict()
    module.eval()
    require_equal(read({name: tensor.detach().clone() for name, tensor in state.items()}, factors), base, module)


TUCKER = ("conv1d", "conv2d", "conv3d")  # LyCORIS has cores for kernels only


@each_layer
def test_locon_of_lycoris(layer):
    core = {"lora_mid"} if layer in TUCKER else set()
    of_lycoris("LoConModule", layer, {"lora_up", "lora_down"} | core, lora_dim=4, use_tucker=True)


HALVES = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}


@each_layer
@pytest.mark.parametrize("tucker", [False, True], ids=["plain", "Tucker"])
def test_loha_of_lycoris(layer, tucker):
    cores = {"hada_t1", "hada_t2"} if tucker and layer in TUCKER else set()
    of_lycoris("LohaModule", layer, HALVES | cores, lora_dim=4, use_tucker=tucker)


WHOLE, LOW = {"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}


@each_layer
@pytest.mark.parametrize("tucker", [False, True], ids=["plain", "Tucker"])
@pytest.mark.parametrize("both", [False, True], ids=["one factored", "both factored"])
@pytest.mark.parametrize("factor", [-1, 2, 4])
def test_lokr_of_lycoris(layer, tucker, both, factor):
    first = {"lokr_w1_a", "lokr_w1_b"} if both and factor != 2 else {"lokr_w1"}
    core = {"lokr_t2"} if tucker and layer in TUCKER else set()
    of_lycoris(
        "LokrModule",
        layer,
        first | LOW | core,
        lora_dim=1,
        factor=factor,
        decompose_both=both,
        use_tucker=tucker,
    )


@each_layer
def test_lokr_of_whole_matrices_of_lycoris(layer):
    """Their scale is 1, whatever alpha says."""
    of_lycoris("LokrModule", layer, {"lokr_w1"} | WHOLE, lora_dim=2, factor=4, full_matrix=True)


@each_layer
def test_glora_of_lycoris(layer):
    of_lycoris("GLoRAModule", layer, {"a1", "a2", "b1", "b2"}, lora_dim=4)


@pytest.mark.parametrize("layer", TUCKER)
def test_the_core_of_a_glora_is_what_lycoris_makes_of_it(layer):
    """Its modules make none (they ask for a kernel that is of ones and is not); the function that merges has it."""
    torch.manual_seed(1)
    weight, rank = LAYERS[layer]().weight.detach(), 4
    rows, inputs, *kernel = weight.shape
    ones = [1] * len(kernel)
    shapes = {"a1": (inputs, rank), "a2": (rank, inputs), "b1": (rows, rank), "b2": (rank, inputs)}
    factors = {name: torch.randn(*shape, *ones) / 2 for name, shape in shapes.items()}
    factors["bm"] = torch.randn(rank, rank, *kernel) / 2
    change = glora._glora_weight(weight, *factors.values(), 0.75)
    tensors = {f"{name}.weight": factor for name, factor in factors.items()}
    adapter = read({**tensors, "alpha": torch.tensor(3.0)}, set(factors))
    ours = merged(weight, [Piece(adapter, None, 1.0)]) - weight
    assert float((ours - change).norm() / change.norm()) < 1e-5


def of_peft(config: object, layer: str, factors: set[str], alpha: float | None) -> None:
    """alpha: what PEFT's scale is as an alpha; PEFT keeps it outside the file's tensors."""
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = LAYERS[layer]()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    model = peft.get_peft_model(Model(), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "base_layer" not in name:
                parameter += 0.5 * torch.randn(parameter.shape)
    saved = {k.removeprefix("base_model.model.layer."): t for k, t in peft.get_peft_model_state_dict(model).items()}
    base = model.base_model.model.layer.get_base_layer()
    require_equal(read({**saved, "alpha": torch.tensor(alpha)}, factors), base, model)


@pytest.mark.parametrize("layer", ["linear", "conv1d", "conv2d", "point"])  # all that PEFT has
@pytest.mark.parametrize("tucker", [False, True], ids=["plain", "Tucker"])
def test_loha_of_peft(layer, tucker):
    config = peft.LoHaConfig(r=4, alpha=6, target_modules=["layer"], init_weights=False, use_effective_conv2d=tucker)
    of_peft(config, layer, HALVES | ({"hada_t1", "hada_t2"} if tucker and layer in TUCKER else set()), 6.0)


@pytest.mark.parametrize("layer", ["linear", "conv1d", "conv2d", "point"])
@pytest.mark.parametrize("tucker", [False, True], ids=["plain", "Tucker"])
@pytest.mark.parametrize("both", [False, True], ids=["one factored", "both factored"])
def test_lokr_of_peft(layer, tucker, both):
    if tucker and layer == "conv1d":
        pytest.skip("PEFT's own forward fails there")
    first = {"lokr_w1_a", "lokr_w1_b"} if both else {"lokr_w1"}
    config = peft.LoKrConfig(
        r=1,
        alpha=3,
        target_modules=["layer"],
        init_weights=False,
        use_effective_conv2d=tucker,
        decompose_both=both,
    )
    of_peft(config, layer, first | LOW | ({"lokr_t2"} if tucker and layer in TUCKER else set()), 3.0)


def test_pefts_scale_of_a_lokr_of_whole_matrices_is_not_the_others():
    """PEFT divides its alpha by a rank that such a file does not have; equal they are at alpha = rank only."""
    config = {"r": 32, "target_modules": ["layer"], "init_weights": False}
    of_peft(peft.LoKrConfig(alpha=32, **config), "linear", {"lokr_w1"} | WHOLE, 32.0)
    with pytest.raises(AssertionError, match="< 1e-05"):
        of_peft(peft.LoKrConfig(alpha=16, **config), "linear", {"lokr_w1"} | WHOLE, 16.0)


CONFIGS = {"LoHa": lambda **options: peft.LoHaConfig(**options), "LoKr": lambda **options: peft.LoKrConfig(**options)}


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 16), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_folder_that_peft_saved_has_pefts_scales(kind, tmp_path):
    """PEFT keeps alpha and patterns in its configuration, where LoHa and LoKr call it alpha."""
    torch.manual_seed(0)
    patterns = {"alpha_pattern": {"second": 5}, "rank_pattern": {"second": 1}}
    config = CONFIGS[kind](r=2, alpha=6, target_modules=["first", "second"], init_weights=False, **patterns)
    model = peft.get_peft_model(Pair(), config)
    model.save_pretrained(tmp_path)
    lora = read_lora(str(tmp_path))
    assert not lora.leftover and len(lora.modules) == 2
    for name in ("first", "second"):
        adapter, layer = lora.modules[f"base_model.model.{name}"], getattr(model.base_model.model, name)
        assert adapter.scale == (3 if name == "first" else 5)
        ours = adapter.delta((16, 24))
        torch.testing.assert_close(ours, layer.get_delta_weight("default").detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("alpha", "read"), [(32, True), (16, False)])
def test_pefts_lokr_of_whole_matrices_is_refused_unless_its_scale_is_1(alpha, read, tmp_path):
    config = peft.LoKrConfig(r=32, alpha=alpha, target_modules=["first"], init_weights=False)
    peft.get_peft_model(Pair(), config).save_pretrained(tmp_path)
    lora = read_lora(str(tmp_path))
    assert bool(lora.modules) == read
    assert read or "PEFT's scale" in lora.leftover[0].reason
