"""Where alpha can live, which place counts, and what is refused. PEFT itself is the judge in tests/oracles."""

from __future__ import annotations

import json

import pytest
import torch

from lora_ops.cli import main
from lora_ops.errors import FileError
from lora_ops.files import TensorFile, sha256, write
from lora_ops.lora import CONFIG_LIMIT, from_file, read_lora

PEFT = {"r": 4, "lora_alpha": 8}
KOHYA = {"ss_network_dim": "4", "ss_network_alpha": "2.0"}


def factors(module: str, *, rank: int = 4, ab: bool = False) -> dict[str, torch.Tensor]:
    up, down = (".lora_B.weight", ".lora_A.weight") if ab else (".lora_up.weight", ".lora_down.weight")
    return {module + up: torch.ones(6, rank), module + down: torch.ones(rank, 5)}


def read(tensors, metadata=None):
    return from_file(TensorFile("test", tensors, metadata or {}))


def header(**config):
    return {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in config.items()})}


@pytest.mark.parametrize(
    ("tensors", "metadata", "scale", "source"),
    [
        (factors("unet.a"), {}, 1.0, "none, scale 1"),
        (factors("unet.a") | {"unet.a.alpha": torch.tensor(12.0)}, header(**PEFT) | KOHYA, 3.0, "tensor"),
        (factors("unet.a") | {"unet.a.lora_alpha": torch.tensor(12.0)}, {}, 3.0, "tensor"),
        (factors("unet.a") | {"unet.a.alpha": torch.tensor(0.0)}, {}, 1.0, "tensor, 0 read as the rank"),
        (factors("unet.a"), header(**PEFT) | KOHYA, 2.0, "metadata"),
        (factors("a"), {"lora_adapter_metadata": json.dumps(PEFT)}, 2.0, "metadata"),
        (factors("text_encoder.a"), header(**PEFT), 1.0, "none, scale 1"),  # another network's configuration
        (factors("lora_unet_a"), KOHYA | {"adapter_config.json": json.dumps(PEFT)}, 0.5, "ss_network_alpha"),
        (factors("lora_unet_a"), KOHYA | {"ss_network_alpha": "Dynamic"}, 1.0, "none, scale 1"),
        (factors("lora_unet_a", rank=2), KOHYA, 1.0, "none, scale 1"),  # a convolution has another rank and alpha
        (factors("diffusion_model.a", ab=True), KOHYA, 1.0, "none, scale 1"),  # converted: alpha is in the factors
        (factors("base_model.model.a"), {"adapter_config.json": json.dumps(PEFT)}, 2.0, "adapter_config.json"),
        (factors("base_model.model.a"), {"adapter_config.json": "[]"}, 1.0, "none, scale 1"),
    ],
)
def test_the_first_place_that_speaks_of_a_module_counts(tensors, metadata, scale, source):
    lora = read(tensors, metadata)
    (module,) = lora.modules
    assert lora.modules[module].scale == scale and lora.alpha_source(module) == source


def test_kohyas_header_says_nothing_where_any_module_has_its_alpha():
    tensors = factors("lora_unet_a") | factors("lora_unet_b") | {"lora_unet_b.alpha": torch.tensor(1.0)}
    lora = read(tensors, KOHYA)
    assert {module: adapter.scale for module, adapter in lora.modules.items()} == {
        "lora_unet_a": 1.0,
        "lora_unet_b": 0.25,
    }


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"lora_alpha": "eight"}, "is no number"),
        ({"lora_alpha": True}, "is no number"),
        ({"lora_alpha": 1e999}, "is no number"),
        ({"r": 16, "lora_alpha": 8}, "has the rank 4, its metadata say 16"),
        (PEFT | {"rank_pattern": {"a": 8}}, "has the rank 4, its metadata say 8"),
        (PEFT | {"use_dora": True}, "lacks its magnitude"),
        (PEFT | {"lora_bias": True}, "lacks its bias"),
        (PEFT | {"fan_in_fan_out": True}, "stored transposed"),
        (PEFT | {"init_lora_weights": "pissa_niter_4"}, "changed base"),
        (PEFT | {"alpha_pattern": {"(a+)+": 1}}, "not understood"),
        ({"r": 4, "lora_alpha": 10**400}, "is no number"),
        ({"r": 4, "lora_alpha": 1.7e308, "use_rslora": True}, "is no number"),
        (PEFT | {"use_rslora": "false"}, "neither true nor false"),
        (PEFT | {"use_dora": 0}, "neither true nor false"),
        (PEFT | {"alpha_pattern": {"a?" * 32 + "b": 1}}, "not understood"),
        (PEFT | {"alpha_pattern": {"(aa|aa)" * 33 + "b": 1}}, "not understood"),
        (PEFT | {"alpha_pattern": {"(" * 10_000 + ")" * 10_000: 1}}, "not understood"),
        (PEFT | {"alpha_pattern": {"(": 1}}, "not understood"),
    ],
)
def test_a_configuration_that_is_not_understood_is_refused_and_told(config, words):
    lora = read(factors("unet.a"), header(**config))
    assert not lora.modules
    assert [(refusal.module, words in refusal.reason) for refusal in lora.leftover] == [("unet.a", True)]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        (r".*\.layers\.(0|1|2|3|4|5|6|7|8|9)\.attn\.(q_proj|k_proj|v_proj)", True),
        (r"(q|v)_proj", True),
        (r"layers\.[0-9]+\.attn\.q_proj", True),
        (r"layers\.\d\.attn\..*", True),
        (r"layers?\.5\..*_proj", True),
        (r".*.*.*.*b", None),
    ],
)
def test_usual_patterns_are_understood_and_slow_ones_refused(pattern, found):
    module = "unet.model.decoder.layers.5.attn.q_proj" if found else f"unet.{'a' * 60}"
    lora = read(factors(module), header(**PEFT, alpha_pattern={pattern: 20}))
    assert lora.modules[module].scale == 5 if found else "not understood" in lora.leftover[0].reason


@pytest.mark.parametrize("text", ['{"unet.r": 4, "unet.lora_al', "[1]", "", "[" * 100_000])
def test_a_damaged_header_is_no_missing_one(text):
    tensors = factors("unet.a") | factors("unet.b") | {"unet.b.alpha": torch.tensor(8.0)}
    lora = read(tensors, {"lora_adapter_metadata": text})
    assert lora.modules.keys() == {"unet.b"} and lora.modules["unet.b"].scale == 2
    assert [(module, "no JSON object" in reason) for module, reason, _ in lora.leftover] == [("unet.a", True)]


def test_a_header_names_modules_without_pefts_prefix():
    config = PEFT | {"alpha_pattern": {"^inner.a": 20}}
    lora = read(factors("base_model.model.inner.a"), {"lora_adapter_metadata": json.dumps(config)})
    assert lora.modules["base_model.model.inner.a"].scale == 5


def test_a_configuration_beside_another_file_says_nothing_about_it(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(PEFT))
    for name in ("adapter_model.safetensors", "mine.safetensors"):
        write(tmp_path / name, factors("base_model.model.a", ab=True), {}, overwrite=False)
    assert read_lora(str(tmp_path / "mine.safetensors")).modules["base_model.model.a"].scale == 1.0
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        assert read_lora(str(path)).modules["base_model.model.a"].scale == 2.0


def test_the_command_line_takes_a_folder(tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text(json.dumps(PEFT))
    module = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    write(tmp_path / "adapter_model.safetensors", factors(module, ab=True), {}, overwrite=False)
    assert main(["info", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "scale 2, alpha from: adapter_config.json" in told
    assert sha256(tmp_path / "adapter_model.safetensors") in told


def test_a_file_of_pefts_name_without_its_configuration_is_read_alone(tmp_path):
    write(tmp_path / "adapter_model.safetensors", factors("base_model.model.a", ab=True), {}, overwrite=False)
    assert read_lora(str(tmp_path / "adapter_model.safetensors")).modules["base_model.model.a"].scale == 1.0
    with pytest.raises(FileError, match=r"adapter_config\.json"):  # a folder without it is no PEFT folder
        read_lora(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[1, 2]", "no JSON object"),
        (b'{"r": ', "no valid JSON"),
        (b"[" * 100_000, "no valid JSON"),
        (b"\xff\xfe", "no UTF-8 text"),
        (b" " * (CONFIG_LIMIT + 1), "over the limit"),
    ],
)
def test_a_configuration_that_is_none_is_a_file_error(content, words, tmp_path):
    write(tmp_path / "adapter_model.safetensors", factors("base_model.model.a", ab=True), {}, overwrite=False)
    (tmp_path / "adapter_config.json").write_bytes(content)
    with pytest.raises(FileError, match=words) as caught:
        read_lora(str(tmp_path))
    assert caught.value.file.endswith("adapter_config.json")


def test_a_folder_without_tensors_is_a_file_error(tmp_path):
    with pytest.raises(FileError, match=r"adapter_model\.safetensors"):
        read_lora(str(tmp_path))
