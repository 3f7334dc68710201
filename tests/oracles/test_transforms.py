"""PEFT and LyCORIS as oracles of what depends on the weight in hand: what they save, merged by us, is what they run."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_ops.files import TensorFile
from lora_ops.landing import Piece, land, merged
from lora_ops.lora import Lora, Named, Target, TargetMap, from_file, read_lora
from lora_ops.stack import Entry

peft = pytest.importorskip("peft", reason="peft is an oracle here; it is in the test environment")
lycoris = pytest.importorskip("lycoris.modules", reason="lycoris is an oracle here; it is in the test environment")

LAYERS = {
    "linear": lambda: nn.Linear(24, 16),
    "conv1d": lambda: nn.Conv1d(6, 16, 3),
    "conv2d": lambda: nn.Conv2d(6, 16, 3),
    "conv3d": lambda: nn.Conv3d(6, 16, (1, 3, 3)),
    "point": lambda: nn.Conv2d(6, 16, 1),
    "square": lambda: nn.Conv2d(16, 16, 3),  # outputs and inputs are told apart by the spelling alone
}
each_layer = pytest.mark.parametrize("layer", LAYERS)


class Model(nn.Module):
    def __init__(self, layer: str) -> None:
        super().__init__()
        self.layer = LAYERS[layer]()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def require_equal(lora: Lora, weight: Tensor, truth: Tensor) -> None:
    """Both compute in float32: a few units in the last place of the sums."""
    assert not lora.leftover
    (adapter,) = lora.modules.values()
    adapter.require_fit(tuple(weight.shape))
    ours = merged(weight, [Piece(adapter, None, 1.0)])
    assert float((ours - truth).norm() / (truth - weight).norm()) < 1e-5
    assert float((truth - weight).norm() / weight.norm()) > 1e-2


@each_layer
@pytest.mark.parametrize("alpha", [4, 6])
def test_dora_that_peft_saved_is_merged_as_peft_merges_it(layer, alpha):
    torch.manual_seed(0)
    base = Model(layer)
    weight = base.layer.weight.detach().clone()
    config = peft.LoraConfig(r=4, lora_alpha=alpha, use_dora=True, target_modules=["layer"], init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    magnitude = model.base_model.model.layer.lora_magnitude_vector["default"].weight
    magnitude.data *= 1 + torch.rand(magnitude.shape)
    saved = dict(peft.get_peft_model_state_dict(model))
    saved["base_model.model.layer.alpha"] = torch.tensor(float(alpha))
    truth = model.merge_and_unload().layer.weight.detach()
    require_equal(from_file(TensorFile("peft", saved)), weight, truth)


def of_lycoris(kind: str, layer: str, **options: object) -> tuple[Lora, Tensor, Tensor]:
    """A LyCORIS module with random parameters as a file, the weight, and the weight that its forward makes of it."""
    torch.manual_seed(1)
    base = LAYERS[layer]()
    module = getattr(lycoris, kind)("layer", base, **options)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name != "scalar":
                parameter += 0.1 * torch.randn(parameter.shape)
    state = module.custom_state_dict() or module.state_dict()
    tensors = {f"unet.layer.{name}": tensor.detach().clone() for name, tensor in state.items() if tensor is not None}
    module.eval()
    weight, inputs = base.weight.detach(), base.weight[0].numel()
    # What a unit input puts out is a column of the weight: forward is the truth, whatever get_merged_weight says.
    units = torch.eye(inputs).reshape(inputs, *weight.shape[1:])
    with torch.no_grad():
        puts_out = module(units) - (0 if base.bias is None else base.bias.reshape(-1, *(1 for _ in weight.shape[2:])))
    truth = puts_out.reshape(inputs, -1).T.reshape(weight.shape)
    return from_file(TensorFile("lycoris", tensors)), weight, truth


@each_layer
@pytest.mark.parametrize("on_output", [True, False], ids=["per output", "per input"])
@pytest.mark.parametrize("kind", ["LoConModule", "LohaModule", "LokrModule"])
def test_dora_of_lycoris(layer, kind, on_output):
    options = {"lora_dim": 2, "factor": 4} if kind == "LokrModule" else {"lora_dim": 4}
    require_equal(*of_lycoris(kind, layer, alpha=2.0, weight_decompose=True, wd_on_out=on_output, **options))


@each_layer
@pytest.mark.parametrize("rescaled", [False, True], ids=["", "rescaled"])
@pytest.mark.parametrize("constraint", [0.0, 0.01, 10.0])
@pytest.mark.parametrize("kind", ["DiagOFTModule", "ButterflyOFTModule"])
def test_oft_of_lycoris(layer, kind, constraint, rescaled):
    require_equal(*of_lycoris(kind, layer, lora_dim=4, constraint=constraint, rescaled=rescaled))


@each_layer
@pytest.mark.parametrize("on_input", [False, True], ids=["outputs", "inputs"])
def test_ia3_of_lycoris(layer, on_input):
    require_equal(*of_lycoris("IA3Module", layer, train_on_input=on_input))


OFT = {
    "default": {},
    "exact": {"use_cayley_neumann": False},
    "two terms": {"num_cayley_neumann_terms": 2},
    "three terms": {"num_cayley_neumann_terms": 3},
    "seven terms": {"num_cayley_neumann_terms": 7},
    "constrained": {"coft": True, "eps": 0.3},
    "constrained, exact": {"coft": True, "eps": 0.3, "use_cayley_neumann": False},
    "one block for all": {"block_share": True},
}


@pytest.mark.parametrize("layer", ["linear", "conv2d", "square"])
@pytest.mark.parametrize("switches", OFT.values(), ids=OFT)
def test_oft_that_peft_saved_is_merged_as_peft_merges_it(layer, switches, tmp_path):
    torch.manual_seed(0)
    base = Model(layer)
    weight = base.layer.weight.detach().clone()
    config = peft.OFTConfig(oft_block_size=6, target_modules=["layer"], init_weights=False, **switches)
    model = peft.get_peft_model(base, config)
    model.save_pretrained(tmp_path)
    truth = model.merge_and_unload().layer.weight.detach()
    require_equal(read_lora(str(tmp_path)), weight, truth)
    if not switches:  # what both do by default needs no configuration
        alone = from_file(TensorFile("alone", load_file(tmp_path / "adapter_model.safetensors")))
        require_equal(alone, weight, truth)


def test_ia3_on_inputs_that_peft_saved_is_merged_as_peft_merges_it(tmp_path):
    base = Model("linear")
    weight = base.layer.weight.detach().clone()
    config = peft.IA3Config(target_modules=["layer"], feedforward_modules=["layer"])
    model = peft.get_peft_model(base, config)
    model.base_model.model.layer.ia3_l["default"].data += torch.rand(1, 24)
    model.save_pretrained(tmp_path)
    require_equal(read_lora(str(tmp_path)), weight, model.merge_and_unload().layer.weight.detach())


@pytest.mark.parametrize("bias", [True, False])
def test_ia3_on_outputs_that_peft_saved_is_of_the_bias_too(tmp_path, bias):
    base = Model("linear")
    base.layer = nn.Linear(24, 16, bias=bias)
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    model = peft.get_peft_model(base, peft.IA3Config(target_modules=["layer"], feedforward_modules=[]))
    model.base_model.model.layer.ia3_l["default"].data += torch.rand(16, 1)
    model.save_pretrained(tmp_path)
    lora = read_lora(str(tmp_path))
    name = "base_model.model.layer"
    targets = {name: Target("model", "layer.weight", (16, 24)), f"{name}.bias": Target("model", "layer.bias", (16,))}
    names = {key: Named(target, "peft") for key, target in list(targets.items())[: 2 if bias else 1]}
    where = TargetMap("none", names, lambda key: (names[key],) if key in names else (), tuple(targets.values()))
    landing = land([Entry(lora, {"model": 1.0})], where)
    assert landing.rows[0].coverage == 1
    found = {key: merged(before[key], pieces) for (_, key), pieces in landing.pieces.items()}
    truth = model.merge_and_unload().state_dict()
    assert found.keys() == truth.keys()
    for key, tensor in truth.items():
        torch.testing.assert_close(found[key], tensor)
        assert not torch.equal(tensor, before[key])


def test_ia3_of_a_convolution_that_peft_saved_is_refused(tmp_path):
    """Its factors have one shape on outputs and on inputs."""
    config = peft.IA3Config(target_modules=["layer"], feedforward_modules=[])
    peft.get_peft_model(Model("conv2d"), config).save_pretrained(tmp_path)
    (refusal,) = read_lora(str(tmp_path)).leftover
    assert "only that of a linear layer" in refusal.reason and "with PEFT" in refusal.remedy


@pytest.mark.parametrize("switches", [{"use_dora": True}, {"use_dora": True, "use_rslora": True}])
def test_a_dora_folder_is_read_with_its_scale(switches, tmp_path):
    torch.manual_seed(0)
    base = Model("linear")
    weight = base.layer.weight.detach().clone()
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["layer"], init_lora_weights=False, **switches)
    model = peft.get_peft_model(base, config)
    model.save_pretrained(tmp_path)
    lora = read_lora(str(tmp_path))
    assert {lora.alpha_source(module) for module in lora.modules} == {"adapter_config.json"}
    require_equal(lora, weight, model.merge_and_unload().layer.weight.detach())


def test_an_oft_configuration_in_the_header_counts():
    torch.manual_seed(0)
    base = Model("linear")
    weight = base.layer.weight.detach().clone()
    config = peft.OFTConfig(oft_block_size=6, target_modules=["layer"], init_weights=False, use_cayley_neumann=False)
    model = peft.get_peft_model(base, config)
    vectors = model.base_model.model.layer.oft_R["default"].weight.detach().clone()
    header = {
        f"unet.{key}": value for key, value in model.peft_config["default"].to_dict().items() if key != "peft_type"
    }
    told = {"lora_adapter_metadata": json.dumps({k: v for k, v in header.items() if isinstance(v, int | float)})}
    file = TensorFile("diffusers", {"unet.layer.oft_R.weight": vectors}, told)
    require_equal(from_file(file), weight, model.merge_and_unload().layer.weight.detach())


def test_a_scaled_oft_of_onetrainer_is_its_vectors_divided():
    """OneTrainer divides by 2 √(size - 1) where the file holds `scaled_oft`."""
    vectors, weight = torch.randn(4, 15), torch.randn(16, 24)
    scaled = {"unet.layer.oft_R.weight": vectors, "unet.layer.oft_R.scaled_oft": torch.tensor(True)}
    divided = {"unet.layer.oft_R.weight": vectors / (2 * 5**0.5)}
    (adapter,) = from_file(TensorFile("plain", divided)).modules.values()
    require_equal(from_file(TensorFile("scaled", scaled)), weight, merged(weight, [Piece(adapter, None, 1.0)]))
