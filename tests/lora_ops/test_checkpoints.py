"""Checkpoints on disk: what they are, LoRAs merged into them and taken off again."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lora_ops import checkpoints, recipe, samples
from lora_ops.adapters import Additive, Full, LowRank
from lora_ops.checkpoints import merging
from lora_ops.cli import main, parse_lora
from lora_ops.dialects import published_map, target_map
from lora_ops.errors import AdapterError, FileError, LoraOpsError, StackError, TargetError
from lora_ops.families import FAMILIES, flux, recognise, unet
from lora_ops.families.text import clip_shapes
from lora_ops.files import read_header, write
from lora_ops.landing import Piece, land, merged, of_rows
from lora_ops.lora import Band, Lora
from lora_ops.recipe import Recipe
from lora_ops.stack import Entry, Schedule
from tests.laws import test_adapters, test_transforms

Tensors = Mapping[str, torch.Tensor]
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
ADAPTERS = {
    **{name: (adapter, shape) for name, (adapter, shape, _) in test_adapters.CASES.items()},
    **{name: (case.adapter, case.shape) for name, case in test_transforms.CASES.items()},
}
FLUX = {f"model.diffusion_model.{key}": s for key, s in flux.flux1_shapes(hidden=8, double=1, single=1).items()}


ONE = torch.ones(())


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def both(lora: Lora, strength: float = 1.0, sha256: str = "") -> Entry:
    return Entry(lora, {"model": strength, "clip": strength}, sha256=sha256)


def small_checkpoint() -> dict[str, torch.Tensor]:
    """SD1.5's make with two levels and one layer of text: all kinds of its weights, few of each."""
    denoiser = unet.shapes(
        channels=32, multipliers=(1, 2), depths=(1, 0), middle_depth=1, context=768, linear_projection=False
    )
    text = {key: shape for key, shape in clip_shapes(layers=1, width=768).items() if "embedding" not in key}
    shapes = {f"model.diffusion_model.{key}": shape for key, shape in denoiser.items()}
    shapes |= {f"cond_stage_model.transformer.{key}": shape for key, shape in text.items()}
    return {
        key: (rand(*shape, seed=number) / math.sqrt(math.prod(shape[1:]) or 1)).half()
        for number, (key, shape) in enumerate(shapes.items())
    }


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and bits(one[name]).equal(bits(other[name])) for name in one
    )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small SD1.5 checkpoint, `base`, and samples of LoRAs for it."""
    folder = tmp_path_factory.mktemp("checkpoints")
    tensors = small_checkpoint()
    tensors["first_stage_model.decoder.conv.weight"] = torch.full((3, 3), math.inf)
    tensors["step"] = torch.tensor(7)
    safetensors.torch.save_file(tensors, folder / "base.safetensors", {"format": "pt", "modelspec.hash_sha256": "0x1"})
    samples.write_samples({key: tuple(tensor.shape) for key, tensor in tensors.items()}, folder)
    return folder


@pytest.fixture(scope="module")
def result(folder) -> Path:
    assert (
        run("merge", folder / "base.safetensors", f"{folder / INK}:0.8/0.4", "-o", folder / "result.safetensors") == 0
    )
    return folder / "result.safetensors"


INK = "ink_kohya.safetensors"


def run(*arguments: object) -> int:
    return main(list(map(str, arguments)))


# What merging makes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_algebra_is_merged_to_one_rounding_of_the_exact_result_a_few_rows_at_a_time(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "ROWS", 4 * 8 * 3)  # three rows of a matrix of eight columns, one of a kernel
    weights, modules = {}, {}
    for number, (adapter, shape) in enumerate(ADAPTERS.values()):
        weights[f"model.diffusion_model.{number}.weight"] = rand(*shape, seed=number).to(dtype)
        modules[f"diffusion_model.{number}"] = adapter
    write(tmp_path / "base", weights, overwrite=True)
    base = checkpoints.opened(tmp_path / "base")
    landing = land([both(Lora("x", modules), 0.7)], base.targets)
    assert len(landing.pieces) == len(ADAPTERS)
    checkpoints.merge(base, landing, tmp_path / "out")
    stored = safetensors.torch.load_file(tmp_path / "out")
    for (_, key), pieces in landing.pieces.items():
        exact = weights[key].double()
        for piece in pieces:
            piece.adapter.add_(exact, piece.strength)
        # half a unit in the last place of the dtype, or half its smallest number; float32 computes with 1e-5 (NEAR)
        info = torch.finfo(dtype)
        least = info.smallest_normal * info.eps
        bound = (info.eps / 2 + 1e-5) * exact.abs() + least / 2 + 1e-5
        wrong = (stored[key].double() - exact).abs()
        assert stored[key].dtype == dtype and (wrong <= bound).all(), (key, pieces[0].adapter, float(wrong.max()))


def test_a_merge_at_strength_0_is_the_same_file_byte_for_byte(folder, tmp_path):
    assert run("merge", folder / "base.safetensors", f"{folder / INK}:0", "-o", tmp_path / "out") == 0
    base = folder / "base.safetensors"
    assert same(safetensors.torch.load_file(tmp_path / "out"), safetensors.torch.load_file(base))
    write(tmp_path / "ours", small_checkpoint(), {"format": "pt"}, overwrite=True)
    assert run("merge", tmp_path / "ours", f"{folder / INK}:0", "-o", tmp_path / "again") == 0
    assert (tmp_path / "again").read_bytes() == (tmp_path / "ours").read_bytes()


def test_what_no_lora_touches_is_copied_infinities_and_all(folder, result):
    base, stored = (safetensors.torch.load_file(folder / name) for name in ("base.safetensors", result.name))
    changed = {name for name in base if not same({"": base[name]}, {"": stored[name]})}
    opened = checkpoints.opened(folder / "base.safetensors")
    landing = land([parse_lora(str(folder / INK))], opened.targets)
    assert changed == {key for _, key in landing.pieces} and stored.keys() == base.keys()
    assert stored["first_stage_model.decoder.conv.weight"].isinf().all()


def test_metadata_is_kept_and_tells_the_recipe(folder, result):
    metadata = read_header(result).metadata
    [ink] = Recipe.of_metadata(metadata, "").loras
    assert (ink.lora, ink.strengths) == (INK, {"model": 0.8, "clip": 0.4}) and len(ink.sha256) == 64
    assert metadata["format"] == "pt" and metadata["modelspec.architecture"] == "stable-diffusion-v1"
    assert "modelspec.hash_sha256" not in metadata and metadata["modelspec.merged_from"] == INK


def test_a_second_merge_adds_to_the_recipe(folder, result, tmp_path):
    assert run("merge", result, folder / "ink_peft.safetensors", "-o", tmp_path / "out") == 0
    held = Recipe.of_metadata(read_header(tmp_path / "out").metadata, "")
    assert [each.lora for each in held.loras] == [INK, "ink_peft.safetensors"]


@pytest.mark.parametrize("name", checkpoints.DTYPES)
def test_a_dtype_is_for_the_model_and_its_encoders_and_rounds_once(name, folder, tmp_path):
    dtype = checkpoints.DTYPES[name]
    assert run("merge", folder / "base.safetensors", folder / INK, "-o", tmp_path / "out", "--dtype", name) == 0
    base = safetensors.torch.load_file(folder / "base.safetensors")
    stored = safetensors.torch.load_file(tmp_path / "out")
    opened = checkpoints.opened(folder / "base.safetensors")
    landing = land([parse_lora(str(folder / INK))], opened.targets)
    for key, tensor in base.items():
        matrix = "stage_model.d" not in key and key != "step" and (dtype.itemsize > 1 or tensor.ndim > 1)
        assert stored[key].dtype == (dtype if matrix else tensor.dtype), key
    (_, key), [piece] = next(iter(landing.pieces.items()))
    exact = base[key].double() + piece.strength * piece.adapter.delta(tuple(base[key].shape), torch.float64)
    info = torch.finfo(dtype)
    bound = (info.eps / 2 + 1e-6) * exact.abs() + info.smallest_normal * info.eps + 1e-8  # float32's sums
    assert ((stored[key].double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_result_that_the_dtype_cannot_hold_is_refused_by_name(dtype, tmp_path):
    key = "model.diffusion_model.a.weight"
    write(tmp_path / "base", {key: torch.ones(4, 4).to(dtype)}, overwrite=True)
    base = checkpoints.opened(tmp_path / "base")
    landing = land([both(Lora("x", {"diffusion_model.a": Full(torch.full((4, 4), 1e6))}))], base.targets)
    with pytest.raises(FileError, match="NaN or Inf") as caught:
        checkpoints.merge(base, landing, tmp_path / "out")
    assert caught.value.facts["tensor"] == key and [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize(
    "beside",
    [
        {"a.weight_scale": torch.ones(4)},
        {"a.comfy_quant": torch.ones(3).to(torch.uint8)},
        {"a.weight_scale_inv": ONE},
        {},
    ],
)
def test_weights_that_are_stored_as_something_else_are_refused_by_name(beside, tmp_path):
    weight = torch.ones(4, 4).to(torch.float8_e4m3fn if beside else torch.int8)
    prefix = "model.diffusion_model."
    write(tmp_path / "base", {prefix + k: v for k, v in {"a.weight": weight, **beside}.items()}, overwrite=True)
    base = checkpoints.opened(tmp_path / "base")
    landing = land([both(Lora("x", {"diffusion_model.a": Full(torch.ones(4, 4))}))], base.targets)
    with pytest.raises(AdapterError, match="is stored as") as caught:
        checkpoints.merge(base, landing, tmp_path / "out")
    assert "a." in (caught.value.module or "") and caught.value.file == str(tmp_path / "base")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("name", ["weight_scale", "scale_weight"])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_fp8_with_a_scale_is_changed_at_its_true_size_and_scaled_anew(dtype, name, shape, tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "ROWS", 4 * 8 * 3)
    key = "model.diffusion_model.a"
    limit = torch.finfo(dtype if name == "weight_scale" else torch.float8_e4m3fn).max  # as what the host reads it
    weight, scale = rand(12, 8).to(dtype), torch.full(shape, 0.02)
    other = {f"{key[:-1]}b.weight": weight, f"{key[:-1]}b.{name}": scale}
    write(tmp_path / "base", {f"{key}.weight": weight, f"{key}.{name}": scale, **other}, overwrite=True)
    lora = LowRank(rand(12, 2) / 10, rand(2, 8) / 10)
    base = checkpoints.opened(tmp_path / "base")
    checkpoints.merge(base, land([both(Lora("x", {"diffusion_model.a": lora}))], base.targets), tmp_path / "out")
    stored = safetensors.torch.load_file(tmp_path / "out")
    exact = weight.double() * 0.02 + lora.delta((12, 8), torch.float64)
    torch.testing.assert_close(stored[f"{key}.{name}"].double(), (exact.abs().max() / limit).expand(shape))
    found = stored[f"{key}.weight"].double() * stored[f"{key}.{name}"].double()
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps * stored[f"{key}.{name}"].item()
    assert ((found - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() * 1.001 + least).all()
    assert stored[f"{key}.weight"].dtype == dtype and stored[f"{key}.{name}"].shape == shape
    assert same({name: stored[name] for name in other}, other)


def test_progress_counts_the_pass_that_finds_a_new_scale_before_anything_of_the_weight_is_written(tmp_path):
    quantised_file(tmp_path / "base", {"a": 0.02, "b": 0.5}, "weight_scale")
    base, heard = checkpoints.opened(tmp_path / "base"), list[tuple[int, int]]()
    landing = land([both(Lora("x", {"diffusion_model.a": LowRank(rand(12, 2), rand(2, 8))}))], base.targets)
    checkpoints.merge(base, landing, tmp_path / "out", progress=lambda *told: heard.append(told))
    size, steps = (tmp_path / "out").stat().st_size, [heard[0][0], *(b - a for (a, _), (b, _) in pairwise(heard))]
    assert {total for _, total in heard} == {2 * size + 12 * 8} and heard[-1][0] == 2 * size + 12 * 8
    assert steps.index(12 * 8) < 4  # before the header, four scales and two biases


def text_tensor(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def quantised_file(path: Path, scales: Mapping[str, float], suffix: str = "scale_weight") -> dict[str, torch.Tensor]:
    """A model of fp8 weights with scales, and all that hosts have written beside such weights."""
    prefix, tensors = "model.diffusion_model.", {}
    for number, (name, scale) in enumerate(scales.items()):
        tensors[f"{prefix}{name}.weight"] = (rand(12, 8, seed=number) * 100).to(torch.float8_e4m3fn)
        tensors[f"{prefix}{name}.{suffix}"] = torch.tensor(scale)
        tensors[f"{prefix}{name}.bias"] = torch.ones(12).half()
        tensors[f"{prefix}{name}.{'scale_input' if suffix == 'scale_weight' else 'input_scale'}"] = ONE
    if suffix == "scale_weight":
        tensors[f"{prefix}scaled_fp8"] = torch.ones(2).to(torch.float8_e4m3fn)
    else:
        tensors |= {f"{prefix}{name}.comfy_quant": text_tensor('{"format": "float8_e4m3fn"}') for name in scales}
    write(path, tensors, {"_quantization_metadata": "{}", "note": "x"}, overwrite=True)
    return tensors


@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale"])
def test_fp8_with_scales_becomes_bf16_with_nothing_left_of_them(suffix, tmp_path):
    tensors = quantised_file(tmp_path / "base", {"a": 0.02, "b": 0.5}, suffix)
    base = checkpoints.opened(tmp_path / "base")
    lora = LowRank(rand(12, 2) / 10, rand(2, 8) / 10)
    landing = land([both(Lora("x", {"diffusion_model.a": lora}))], base.targets)
    assert not checkpoints.merge(base, landing, tmp_path / "out", dtype=torch.bfloat16)
    stored = safetensors.torch.load_file(tmp_path / "out")
    p = "model.diffusion_model."
    assert stored.keys() == {f"{p}{name}.{kind}" for name in "ab" for kind in ("weight", "bias")}
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    exact = {name: tensors[f"{p}{name}.weight"].double() * scale for name, scale in (("a", 0.02), ("b", 0.5))}
    exact["a"] = exact["a"] + lora.delta((12, 8), torch.float64)
    for name in "ab":
        torch.testing.assert_close(stored[f"{p}{name}.weight"].double(), exact[name], rtol=2**-8, atol=1e-6)
    metadata = read_header(tmp_path / "out").metadata
    assert metadata["note"] == "x" and "_quantization_metadata" not in metadata


def test_fp8_with_scales_stays_so_where_it_is_asked_for_as_fp8(tmp_path):
    tensors = quantised_file(tmp_path / "base", {"a": 0.02})
    base = checkpoints.opened(tmp_path / "base")
    checkpoints.merge(base, land([], base.targets), tmp_path / "out", dtype=torch.float8_e4m3fn)
    assert same(safetensors.torch.load_file(tmp_path / "out"), tensors)


def test_the_index_of_shards_names_no_scale_that_is_gone(tmp_path):
    shards(quantised_file(tmp_path / "file", {"a": 0.02, "b": 0.5}), tmp_path / "base")
    base = checkpoints.opened(tmp_path / "base")
    checkpoints.merge(base, land([], base.targets), tmp_path / "out", dtype=torch.float16)
    assert checkpoints.opened(tmp_path / "out").targets.family == base.targets.family
    assert len(loaded(tmp_path / "out")) == 4


@pytest.mark.parametrize(
    ("beside", "named"),
    [
        ({"a.weight_scale_2": ONE}, "nvfp4"),
        ({"a.weight.absmax": torch.ones(6)}, "nf4"),
        ({"a.qweight": torch.ones(2, 3).to(torch.int32)}, "GPTQ"),
    ],
)
def test_packed_weights_are_refused_by_format_with_what_to_use(beside, named, tmp_path):
    tensors = {"a.weight": torch.ones(12, 4).to(torch.uint8), "b.weight": torch.ones(3, 3), **beside}
    write(tmp_path / "base", {f"model.diffusion_model.{k}": v for k, v in tensors.items()}, overwrite=True)
    with pytest.raises(TargetError, match=named) as caught:
        checkpoints.opened(tmp_path / "base")
    assert "bf16" in caught.value.remedy and caught.value.module == "model.diffusion_model.a"
    assert ("Save Checkpoint" in caught.value.remedy) == (named == "nvfp4")  # which the host stores by its own rule


def test_a_dtype_that_cannot_apply_to_a_weight_is_refused_by_its_format(tmp_path):
    key = "model.diffusion_model.a"
    told = text_tensor('{"format": "int8_tensorwise"}')
    tensors = {f"{key}.weight": torch.ones(4, 4).to(torch.int8), f"{key}.weight_scale": ONE, f"{key}.comfy_quant": told}
    write(tmp_path / "base", tensors, overwrite=True)
    base = checkpoints.opened(tmp_path / "base")
    with pytest.raises(AdapterError, match="int8_tensorwise.*Save Checkpoint"):
        checkpoints.merge(base, land([], base.targets), tmp_path / "out", dtype=torch.bfloat16)
    checkpoints.merge(base, land([], base.targets), tmp_path / "out")
    assert same(safetensors.torch.load_file(tmp_path / "out"), tensors)


# How much survives


@pytest.mark.parametrize("how", ["plain", "scaled", "rounded to fp8"])
def test_the_meter_tells_what_a_comparison_of_the_two_files_tells(how, tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "ROWS", 4 * 8 * 3)
    p = "model.diffusion_model."
    scales, dtype = {"a": 1.0, "b": 1.0, "c": 1.0}, None
    if how == "scaled":
        scales = {"a": 0.02, "b": 0.5, "c": 0.1}
        tensors = quantised_file(tmp_path / "base", scales)
    else:
        dtype = torch.float8_e4m3fn if how == "rounded to fp8" else None
        kind = torch.bfloat16 if dtype else torch.float8_e4m3fn
        tensors = {f"{p}{name}.weight": rand(12, 8, seed=n).to(kind) for n, name in enumerate(scales)}
        write(tmp_path / "base", tensors, overwrite=True)
    base = checkpoints.opened(tmp_path / "base")
    loras = {name: LowRank(rand(12, 2) * size, rand(2, 8)) for name, size in (("a", 0.01), ("b", 2.0))}
    landing = land([both(Lora("x", {f"diffusion_model.{name}": each for name, each in loras.items()}))], base.targets)
    told = checkpoints.merge(base, landing, tmp_path / "out", dtype=dtype)
    stored = safetensors.torch.load_file(tmp_path / "out")
    assert told.keys() == {f"{p}{name}.weight" for name in loras}
    for name, lora in loras.items():
        scale = stored.get(f"{p}{name}.scale_weight", ONE).double()
        delta = lora.delta((12, 8), torch.float64)
        found = stored[f"{p}{name}.weight"].double() * scale - tensors[f"{p}{name}.weight"].double() * scales[name]
        cosine = float((delta * found).sum() / (delta.norm() * found.norm())) if found.any() else 0
        each = told[f"{p}{name}.weight"]
        assert (each.cosine, each.norm) == pytest.approx((cosine, float(found.norm() / delta.norm())), abs=1e-4)
    assert told[f"{p}a.weight"].little and not told[f"{p}b.weight"].little


def test_a_merge_into_fp8_says_how_much_of_each_layer_survives_and_what_to_do(folder, tmp_path, capsys):
    asked = ("merge", folder / "base.safetensors", f"{folder / INK}:0.1", "--dtype", "fp8_e5m2", "-o", tmp_path / "out")
    assert run(*asked) == 0
    text = capsys.readouterr().out
    assert "what survives" in text and "measured, 84 layers" in text and "bf16" in text
    assert run(*asked, "--overwrite", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["survival"]["little"] and len(told["survival_by_weight"]) == 84
    worst = told["survival"]["worst"][0]
    assert told["survival_by_weight"][worst["weight"]]["cosine"] == worst["cosine"]
    assert worst["cosine"] == min(each["cosine"] for each in told["survival_by_weight"].values())


def test_a_strength_that_changes_while_sampling_is_refused(folder, tmp_path):
    base = checkpoints.opened(folder / "base.safetensors")
    entry = replace(parse_lora(str(folder / INK)), schedule=Schedule(end=0.5))
    with pytest.raises(StackError, match="follows a schedule") as caught:
        checkpoints.merge(base, land([entry], base.targets), tmp_path / "out")
    assert caught.value.file == INK and not list(tmp_path.iterdir())


# Shards and folders


def shards(tensors: Tensors, folder: Path, stem: str = "model", count: int = 3) -> None:
    folder.mkdir(parents=True)
    where = {name: f"{stem}-{1 + number % count:05}-of-{count:05}.safetensors" for number, name in enumerate(tensors)}
    for file in set(where.values()):
        shard = {name: tensor for name, tensor in tensors.items() if where[name] == file}
        safetensors.torch.save_file(shard, folder / file, {"format": "pt"})
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in folder.glob("*.safetensors") for n, t in safetensors.torch.load_file(path).items()}


def test_shards_come_out_as_shards_with_the_same_tensors_as_one_file(folder, result, tmp_path):
    shards(safetensors.torch.load_file(folder / "base.safetensors"), tmp_path / "base")
    (tmp_path / "base/model.fp32.bin").write_bytes(b"old weights")
    (tmp_path / "base/README.md").write_text("hello")
    lora = f"{folder / INK}:0.8/0.4"
    assert run("merge", tmp_path / "base", lora, "-o", tmp_path / "out") == 0
    assert same(loaded(tmp_path / "out"), safetensors.torch.load_file(result))
    names = {path.name for path in (tmp_path / "base").iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names - {"model.fp32.bin"}
    index = tmp_path / "base/model.safetensors.index.json"
    assert run("merge", index, lora, "-o", tmp_path / "one", "--single-file") == 0
    assert same(safetensors.torch.load_file(tmp_path / "one"), safetensors.torch.load_file(result))
    assert run("merge", index, lora, "-o", tmp_path / "out", "--dtype", "fp32", "--overwrite") == 0
    told = json.loads((tmp_path / "out" / index.name).read_text())["metadata"]["total_size"]
    assert told == sum(tensor.nbytes for tensor in loaded(tmp_path / "out").values())


@pytest.mark.parametrize("fault", ["missing file", "missing tensor", "no index", "no weights"])
def test_shards_that_are_not_whole_are_refused(fault, folder, tmp_path):
    shards(safetensors.torch.load_file(folder / "base.safetensors"), tmp_path / "base")
    index = tmp_path / "base/model.safetensors.index.json"
    first = sorted((tmp_path / "base").glob("*.safetensors"))[0]
    if fault == "missing file":
        first.unlink()
    elif fault == "missing tensor":
        write(first, {"a": torch.ones(1)}, overwrite=True)
    elif fault == "no index":
        index.write_text("[]")
    else:
        shutil.rmtree(tmp_path / "base")
        (tmp_path / "base").mkdir()
    with pytest.raises(FileError) as caught:
        checkpoints.opened(tmp_path / "base")
    assert caught.value.remedy


def pipeline(tensors: Tensors, folder: Path) -> None:
    """The same model as a folder of diffusers: each weight under the names, and in the bands, of its family's table."""
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    targets = target_map(recognise(shapes), shapes)
    split: dict[str, dict[str, torch.Tensor]] = {}
    covered: set[str] = set()
    for name, (target, dialect) in targets.names.items():
        component, _, rest = name.partition(".")
        if dialect == "diffusers" and component in ("unet", "transformer", "text_encoder"):
            if target.part == "model" and component != ("unet" if "unet" in names_of(targets) else "transformer"):
                continue
            for suffix in (".weight", ".bias"):
                key = target.key.removesuffix(".weight") + suffix
                if key in tensors and not rest.startswith(("unet.", "transformer.")):
                    rows = tensors[key].narrow(0, target.rows.start, target.rows.length)
                    rows = torch.cat(rows.chunk(2)[::-1]) if target.swap else rows
                    split.setdefault(component, {})[rest + suffix] = rows.clone()
                    covered.add(key)
    for component, weights in split.items():
        shards(weights, folder / component, "diffusion_pytorch_model", 2)
    (folder / "vae").mkdir()
    write(folder / "vae/diffusion_pytorch_model.safetensors", {"a": torch.ones(3)}, overwrite=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "scheduler").mkdir()
    (folder / "scheduler/config.json").write_text("{}")


def names_of(targets) -> str:
    return "unet" if targets.family.startswith("sd1") else "transformer"


@pytest.mark.parametrize(("family", "dialect"), [("sd15", "kohya"), ("flux", "kohya"), ("flux", "diffusers")])
def test_a_folder_of_diffusers_gets_the_same_update_as_one_file(family, dialect, folder, tmp_path):
    if family == "sd15":
        tensors = {k: v for k, v in small_checkpoint().items() if "text_projection" not in k}
    else:
        tensors = {key: rand(*shape, seed=number) for number, (key, shape) in enumerate(FLUX.items())}
    write(tmp_path / "base", tensors, overwrite=True)
    [lora] = [
        path
        for path in samples.write_samples({k: tuple(v.shape) for k, v in tensors.items()}, tmp_path)
        if dialect in path.name
    ]
    pipeline(tensors, tmp_path / "folder")
    options = (f"{lora}:0.7:role:mlp=0.5", "--min-coverage", "1", "-o")
    assert run("merge", tmp_path / "base", *options, tmp_path / "merged") == 0
    assert run("merge", tmp_path / "folder", *options, tmp_path / "out") == 0
    pipeline(safetensors.torch.load_file(tmp_path / "merged"), tmp_path / "expected")
    for component in ("unet", "transformer", "text_encoder"):
        if (tmp_path / "expected" / component).exists():
            found, expected = (loaded(tmp_path / name / component) for name in ("out", "expected"))
            before = loaded(tmp_path / "folder" / component)
            assert found.keys() == expected.keys()
            assert any(not torch.equal(found[name], before[name]) for name in found)
            for name in found:  # sums of the same terms in another order
                torch.testing.assert_close(
                    found[name], expected[name], rtol=1e-3 if family == "sd15" else 1e-6, atol=1e-6
                )
    copied = "vae/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "out" / copied).read_bytes() == (tmp_path / "folder" / copied).read_bytes()
    assert (tmp_path / "out/scheduler/config.json").exists()


def test_a_component_alone_is_a_checkpoint_file_or_folder(tmp_path):
    tensors = {key: rand(*shape, seed=number) for number, (key, shape) in enumerate(FLUX.items())}
    pipeline(tensors, tmp_path / "folder")
    part = checkpoints.opened(tmp_path / "folder/transformer")
    write(tmp_path / "one.safetensors", loaded(tmp_path / "folder/transformer"), overwrite=True)
    one = checkpoints.opened(tmp_path / "one.safetensors")
    assert part.targets.family == one.targets.family == "flux" and part.folder and not one.folder
    assert {target.key for target in part.targets.targets} == {target.key for target in one.targets.targets}


def test_two_denoisers_in_one_folder_are_not_mistaken_for_one(tmp_path):
    for name in ("transformer", "transformer_2"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "a.safetensors", {"a": torch.ones(1)}, overwrite=True)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(FileError, match="transformer_2"):
        checkpoints.opened(tmp_path)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    write(tmp_path / "x.safetensors", {"a": torch.ones(1)}, overwrite=True)
    with pytest.raises(TargetError, match="no model"):
        checkpoints.opened(tmp_path / "x.safetensors")
    with pytest.raises(FileError):
        checkpoints.opened(tmp_path / "missing")


# Unmerging


def test_unmerging_all_leaves_what_rounding_left_and_says_how_much(folder, result, tmp_path, capsys):
    out = tmp_path / "out"
    asked = ("unmerge", result, "-o", out, "--loras", folder, "--json")
    assert run(*asked, "--base", folder / "base.safetensors") == 0
    told = json.loads(capsys.readouterr().out)["distance"]
    base, stored = (safetensors.torch.load_file(path) for path in (folder / "base.safetensors", out))
    assert recipe.KEY not in read_header(out).metadata
    model = [name for name in base if name.startswith(("model.", "cond_"))]
    wrong = sum(float((stored[name].double() - base[name].double()).square().sum()) for name in model)
    whole = sum(float(base[name].double().square().sum()) for name in model)
    assert told["relative"] == pytest.approx((wrong / whole) ** 0.5, rel=1e-6) and 0 < told["relative"] < 2**-11
    assert run(*asked, "--overwrite") == 0
    assert json.loads(capsys.readouterr().out)["bounds"] == {"float16": {"share": 2**-10, "least": 2**-24}}
    merged = safetensors.torch.load_file(result)
    for name in model:
        largest = torch.maximum(base[name].abs(), merged[name].abs()).double()
        assert ((stored[name].double() - base[name].double()).abs() <= 2**-10 * largest * 1.001 + 2**-24).all()


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_the_distance_and_the_bound_of_fp8_are_those_of_its_true_values(scaled, tmp_path):
    p, dtype = "model.diffusion_model.", None if scaled else torch.float8_e4m3fn
    if scaled:
        quantised_file(tmp_path / "base", {"a": 0.02, "b": 0.5})
    else:  # half of them below the smallest normal number
        tensors = {f"{p}{name}.weight": (rand(12, 8, seed=len(name)) / 64).bfloat16() for name in ("a", "bb")}
        write(tmp_path / "base", tensors, overwrite=True)
    base = checkpoints.opened(tmp_path / "base")
    entry = both(Lora("x", {"diffusion_model.a": LowRank(rand(12, 2) / 50, rand(2, 8) / 5)}))
    checkpoints.merge(base, land([entry], base.targets), tmp_path / "merged", dtype=dtype)
    merged_one = checkpoints.opened(tmp_path / "merged")
    held = Recipe.of_metadata(merged_one.metadata, "")
    landing, left = checkpoints.subtract(held, [], lambda _: entry, merged_one.targets, "x")
    checkpoints.merge(merged_one, landing, tmp_path / "out", loras=left)
    out = checkpoints.opened(tmp_path / "out")

    def values(name: str) -> torch.Tensor:
        tensors = safetensors.torch.load_file(tmp_path / name)
        return tensors[f"{p}a.weight"].double() * tensors.get(f"{p}a.scale_weight", ONE).double()

    [(kind, (share, least))] = checkpoints.bounds(merged_one, out, landing).items()
    apart, largest = (values("out") - values("base")).abs(), torch.maximum(values("base").abs(), values("merged").abs())
    assert kind == "float8_e4m3fn" and (apart <= torch.clamp(share * largest * 1.01, min=least * 1.01)).all()
    assert (apart > share * largest * 1.01).any() or scaled, "the bound's second half is needed"
    found = checkpoints.distance(out, base)
    assert not scaled or found.worst == pytest.approx(float(apart.norm() / values("base").norm()))
    assert found.weights == (4 if scaled else 2) and (found.worst_name == f"{p}a.weight" or not scaled)


def test_one_lora_of_several_is_taken_off_and_the_others_stay_in_the_recipe(folder, result, tmp_path):
    assert run("merge", result, f"{folder / 'ink_peft.safetensors'}:0.5", "-o", tmp_path / "two") == 0
    assert run("unmerge", tmp_path / "two", folder / INK, "-o", tmp_path / "out") == 1, "the other one cannot be read"
    assert run("unmerge", tmp_path / "two", folder / INK, "--loras", folder, "-o", tmp_path / "out") == 0
    [left] = Recipe.of_metadata(read_header(tmp_path / "out").metadata, "").loras
    assert left.lora == "ink_peft.safetensors"
    assert run("merge", folder / "base.safetensors", f"{folder / left.lora}:0.5", "-o", tmp_path / "alone") == 0
    one, other = (safetensors.torch.load_file(tmp_path / name) for name in ("out", "alone"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=2**-9, atol=2**-9, equal_nan=True)


def test_a_lora_that_was_renamed_is_found_by_its_tensors_and_another_of_its_name_is_not_taken(folder, result, tmp_path):
    (tmp_path / "loras").mkdir()
    shutil.copy(folder / "ink_peft.safetensors", tmp_path / "loras" / INK)
    asked = ("unmerge", result, "-o", tmp_path / "out", "--loras", tmp_path / "loras")
    assert run(*asked) == 1
    shutil.copy(folder / INK, tmp_path / "loras/renamed.safetensors")
    assert run(*asked) == 0


@pytest.mark.parametrize("name", ["DoRA 0-D per output", "(IA)³ PEFT"])
def test_what_depends_on_the_weight_cannot_be_subtracted_nor_what_came_before_it(name, tmp_path):
    case = test_transforms.CASES[name]
    assert not isinstance(case.adapter, Additive)
    write(tmp_path / "base", {"model.diffusion_model.a.weight": rand(*case.shape)}, overwrite=True)
    base = checkpoints.opened(tmp_path / "base")
    entries = {
        "sum": both(Lora("sum", {"diffusion_model.a": LowRank(rand(12, 2), rand(2, 8))})),
        "bent": both(Lora("bent", {"diffusion_model.a": case.adapter})),
    }
    held = recipe.of(land(list(entries.values()), base.targets))
    for names in ([], ["bent"], ["sum"]):
        with pytest.raises(AdapterError, match="cannot be subtracted") as caught:
            checkpoints.subtract(held, names, lambda each: entries[each.lora], base.targets, "x")
        assert caught.value.file == "bent"
    landing, left = checkpoints.subtract(
        Recipe(held.loras[::-1]), ["sum"], lambda each: entries[each.lora], base.targets, "x"
    )
    assert [each.lora for each in left.loras] == ["bent"] and len(landing.pieces) == 1


def test_a_file_without_a_recipe_or_without_that_lora_in_it_is_refused(folder, result, tmp_path, capsys):
    assert run("unmerge", folder / "base.safetensors", "-o", tmp_path / "out") == 1
    assert "no recipe" in capsys.readouterr().err
    assert run("unmerge", result, "other", "-o", tmp_path / "out") == 1
    assert INK in capsys.readouterr().err and not list(tmp_path.iterdir())


# The command line


@pytest.mark.parametrize(
    ("written", "strengths", "blocks"),
    [
        ("", (1.0, 1.0), []),
        (":0.8", (0.8, 0.8), []),
        (":-0.8/.4", (-0.8, 0.4), []),
        (":1:role:mlp=0, *.attn2.*=0.5", (1.0, 1.0), ["role:mlp=0", "*.attn2.*=0.5"]),
    ],
)
@pytest.mark.parametrize("name", ["ink.safetensors", "C:ink:0.5", "a b"])
def test_a_lora_is_written_with_its_strengths_and_blocks_whatever_colons_its_path_has(
    name, written, strengths, blocks, folder, tmp_path
):
    shutil.copy(folder / INK, tmp_path / name)
    entry = parse_lora(f"{tmp_path / name}{written}")
    assert tuple(entry.strengths.values()) == strengths and list(map(str, entry.blocks)) == blocks
    assert entry.lora.name == name and len(entry.sha256) == 64


@pytest.mark.parametrize("written", [":", "::role:mlp=0", ":x", ":nan", ":1/2/3", ":1:x", ":1e999", "x:1", ":1/"])
def test_a_strength_that_cannot_be_read_is_refused(written, folder):
    with pytest.raises((StackError, FileError)) as caught:
        parse_lora(f"{folder / INK}{written}")
    assert isinstance(caught.value, LoraOpsError)


def test_a_lora_for_another_model_is_refused_and_nothing_is_written(folder, tmp_path, capsys):
    write(tmp_path / "flux", {key: torch.zeros(shape) for key, shape in FLUX.items()}, overwrite=True)
    assert run("merge", tmp_path / "flux", folder / INK, "-o", tmp_path / "out") == 1
    assert "made for Stable Diffusion" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_interrupt_leaves_nothing_and_says_so(folder, tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_ops.cli._progress", lambda: interrupt)
    assert run("merge", folder / "base.safetensors", folder / INK, "-o", tmp_path / "out") == 130
    assert "nothing was changed" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_check_takes_shards_and_folders(folder, tmp_path, capsys):
    shards(safetensors.torch.load_file(folder / "base.safetensors"), tmp_path / "base")
    assert run("check", folder / INK, "--model", tmp_path / "base") == 0
    assert "84 of 84" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux", "wan", "qwen_image", "z_image", "kandinsky22_prior"])
def test_a_family_is_told_by_its_names_in_diffusers(name):
    (family,) = (family for family in FAMILIES if family.name == name)
    prefix = family.components[0].prefixes["diffusers"][0]
    names = {
        module: target.delta_shape
        for module, (target, dialect) in published_map(family).names.items()
        if dialect == "diffusers" and module.startswith(prefix)
    }
    found = checkpoints.disk._of_diffusers(names)
    assert found is not None and found[0].family == name
    assert {named: target.delta_shape for named, target in found[1].items()} == names


@pytest.mark.parametrize("step", [1, 3, 5, 12])
def test_blocks_of_rows_together_are_the_whole_whatever_bands_the_pieces_have(step):
    one, other = LowRank(rand(12, 2), rand(2, 8)), LowRank(rand(5, 2, seed=2), rand(2, 8, seed=3))
    pieces = [Piece(one, None, 0.5), Piece(other, Band(4, 5), 2.0), Piece(one.narrowed(0, 3), Band(9, 3), -1.0)]
    weight = rand(12, 8, seed=4).double()
    blocks = [merged(rows, of_rows(pieces, start, len(rows))) for start, rows in cut(weight, step)]
    torch.testing.assert_close(torch.cat(blocks), merged(weight, pieces), rtol=1e-12, atol=1e-12)


def cut(weight: torch.Tensor, step: int) -> list[tuple[int, torch.Tensor]]:
    return [(start, weight[start : start + step]) for start in range(0, len(weight), step)]
