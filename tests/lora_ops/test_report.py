"""What a file says about itself: family, dialect, trigger words."""

from __future__ import annotations

import json

import pytest

from lora_ops.cli import main
from lora_ops.files import write
from lora_ops.lora import read_lora
from lora_ops.report import report, trigger_words
from lora_ops.samples import small_checkpoint, write_samples


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    checkpoint = small_checkpoint()
    write(folder / "base.safetensors", checkpoint, overwrite=False)
    write_samples({key: tuple(tensor.shape) for key, tensor in checkpoint.items()}, folder)
    return folder


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({}, []),
        ({"modelspec.trigger_phrase": "ink wash, sumi-e"}, ["ink wash", "sumi-e"]),
        ({"modelspec.trigger_phrase": " ", "trigger_words": "zwx"}, ["zwx"]),
        (
            {
                "ss_tag_frequency": json.dumps({"10_cat": {"zwx": 20, "cat ": 18, "sofa": 3}}),
                "ss_dataset_dirs": json.dumps({"10_cat": {"n_repeats": 10, "img_count": 20}}),
            },
            ["zwx", "cat"],
        ),
        ({"ss_tag_frequency": json.dumps({"10_sks dog": {}})}, ["sks dog"]),
        ({"ss_tag_frequency": "{broken"}, []),
        ({"ss_tag_frequency": "[1]"}, []),
        ({"ss_tag_frequency": json.dumps({"3_a": "text"})}, ["a"]),
    ],
)
def test_trigger_words_come_from_the_author_then_from_the_captions(metadata, words):
    assert trigger_words(metadata) == words


def test_a_report_names_family_dialect_and_numbers(folder):
    found = report(read_lora(str(folder / "ink_kohya.safetensors"))).data
    assert (found["family"], found["dialect"], found["trigger_words"]) == ("sd15", "kohya", ["ink wash"])
    assert found["modules"] == sum(found["parts"].values()) and found["parts"]["clip"] == 6
    assert set(found["rank"]) == {"4"} and set(found["scale"]) == {"0.5"} and set(found["alpha"]) == {"tensor"}


@pytest.mark.parametrize("dialect", ["kohya", "comfy", "diffusers", "peft"])
def test_the_command_line_reads_and_checks_every_dialect(folder, dialect, capsys):
    file, model = str(folder / f"ink_{dialect}.safetensors"), str(folder / "base.safetensors")
    assert main(["info", file, "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["dialect"] == dialect and len(info["sha256"]) == 64
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
