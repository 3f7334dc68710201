"""What a file says about itself: family, dialect, trigger words."""

from __future__ import annotations

import json

import pytest

from lora_ops.cli import main
from lora_ops.files import sha256, tensor_hash, write
from lora_ops.lora import read_lora
from lora_ops.report import report
from lora_ops.samples import small_checkpoint, write_samples
from lora_ops.words import TriggerWords


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    checkpoint = small_checkpoint()
    write(folder / "base.safetensors", checkpoint, overwrite=False)
    write_samples({key: tuple(tensor.shape) for key, tensor in checkpoint.items()}, folder)
    return folder


def test_a_report_names_family_dialect_and_numbers(folder):
    found = report(read_lora(str(folder / "ink_kohya.safetensors")), TriggerWords()).data
    assert (found["family"], found["dialect"], found["asked"]) == ("sd15", "kohya", None)
    assert found["modules"] == sum(found["parts"].values()) and found["parts"]["clip"] == 6
    assert set(found["rank"]) == {"4"} and set(found["scale"]) == {"0.5"} and set(found["alpha"]) == {"tensor"}


def test_a_report_names_the_source_of_the_words_and_the_name_asked_for(folder):
    words = TriggerWords(("ink wash", "sumi-e"), "ink.txt", ("ink.json is no JSON object.",))
    found = report(read_lora(str(folder / "ink_kohya.safetensors")), words, "old/ink")
    assert found.data["trigger_words"] == ["ink wash", "sumi-e"] and found.data["trigger_words_from"] == "ink.txt"
    assert found.data["trigger_words_faults"] == ["ink.json is no JSON object."]
    assert "trigger words: ink wash, sumi-e (from ink.txt)\nink.json is no JSON object." in found.text
    assert found.data["asked"] == "old/ink" and "asked for as old/ink" in found.text


@pytest.mark.parametrize("dialect", ["kohya", "comfy", "diffusers", "peft"])
def test_the_command_line_reads_and_checks_every_dialect(folder, dialect, capsys):
    file, model = str(folder / f"ink_{dialect}.safetensors"), str(folder / "base.safetensors")
    assert main(["info", file, "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["dialect"] == dialect and info["trigger_words_from"] == "modelspec.trigger_phrase"
    assert (info["file_sha256"], info["sha256"]) == (sha256(file), tensor_hash(file))
    assert main(["check", file, "--model", model, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["coverage"] == 1.0 and row["dialect"] == dialect and row["energy_landed"] == 1.0


def test_the_command_line_says_what_is_wrong_and_returns_one(folder, tmp_path, capsys):
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"\x80\x04 this is a pickle")
    assert main(["info", str(bad)]) == 1
    assert "is a Python pickle" in capsys.readouterr().err
    assert main(["info", str(folder / "base.safetensors")]) == 1
    assert "holds no LoRA" in capsys.readouterr().err
    flux = tmp_path / "flux.safetensors"
    import torch

    write(
        flux,
        {
            "lora_unet_single_blocks_0_linear2.lora_up.weight": torch.ones(3072, 2),
            "lora_unet_single_blocks_0_linear2.lora_down.weight": torch.ones(2, 15360),
        },
        overwrite=False,
    )
    assert main(["check", str(flux), "--model", str(folder / "base.safetensors")]) == 1
    assert "made for FLUX.1; the model is Stable Diffusion 1.5" in capsys.readouterr().err


def test_the_demo_does_the_job_without_a_host(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path)]) == 0
    assert {"checkpoint.safetensors", "checkpoint-with-loras.safetensors", "receipt.json"} <= {
        path.name for path in tmp_path.iterdir()
    }
    told = json.loads((tmp_path / "receipt.json").read_text("utf-8"))
    assert [row["coverage"] for row in told["rows"]] == [1.0] * 4
    assert "worst error against float64" in capsys.readouterr().out
