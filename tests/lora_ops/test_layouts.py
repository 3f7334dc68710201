"""Writing a LoRA: what is read back has the source's effect to the bit, in every layout of every family."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from lora_ops import files
from lora_ops.adapters import LoKr, LowRank
from lora_ops.algebra import swap_halves
from lora_ops.cli import main
from lora_ops.dialects import published_map, target_map
from lora_ops.errors import AdapterError, FileError, LoraOpsError, TargetError
from lora_ops.families import FAMILIES, UNKNOWN, flux, recognise
from lora_ops.files import TensorFile, read_header
from lora_ops.landing import land, merged
from lora_ops.layouts import LAYOUTS, Layout, laid_out, write
from lora_ops.layouts.factors import alpha_of, overlap
from lora_ops.layouts.metadata import metadata
from lora_ops.lora import Band, Lora, Refusal, Target, TargetMap, from_file, read_lora
from lora_ops.samples import small_checkpoint, write_samples
from lora_ops.stack import Entry

KOHYA, COMFY, DIFFUSERS, PEFT, LYCORIS = LAYOUTS
ONE = {"model": 1.0, "clip": 1.0}
BY_NAME = {family.name: family for family in FAMILIES}
FLUX = BY_NAME["flux"]
SMALL = {f"diffusion_model.{key}": shape for key, shape in flux.flux1_shapes(hidden=8, double=1, single=1).items()}
LINEAR1 = "lora_unet_single_blocks_0_linear1"
FC1 = "text_model.encoder.layers.0.mlp.fc1"
Q, K, V = (f"transformer.single_transformer_blocks.0.attn.to_{name}" for name in "qkv")
ALPHAS = (1.0, 4.0, 0.1, 7.3, None, 0.0)

each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)


def whole_numbers(*shape: int, seed: int) -> torch.Tensor:
    """Factors of whole numbers: their products have no rounding that could depend on the order of a sum."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


def pair(rows: int, inputs: int, alpha: float | None = None, *, rank: int = 2, seed: int = 0) -> LowRank:
    return LowRank(whole_numbers(rows, rank, seed=seed), whole_numbers(rank, inputs, seed=seed + 1), alpha)


def effect(lora: Lora, targets: TargetMap) -> dict[tuple[str, str], torch.Tensor]:
    """What a LoRA makes of whole-numbered inputs, at each weight, without rounding but that of the scale."""
    assert not lora.leftover
    landing = land([Entry(lora, ONE)], targets)
    (row,) = landing.rows
    assert not row.refused and not row.unconnected
    found = {}
    for place, pieces in landing.pieces.items():
        shape = next(target.shape for target, _ in row.landed.values() if (target.part, target.key) == place)
        found[place] = torch.zeros(shape[0], 3, dtype=torch.float64)
        for piece in pieces:
            up, down = piece.adapter.up.flatten(1).double(), piece.adapter.down.flatten(1).double()
            seen = piece.adapter.scale * (up @ (down @ whole_numbers(down.shape[1], 3, seed=9).double()))
            start = piece.band.start if piece.band else 0
            found[place][start : start + len(seen)] += seen
    return found


def same(one: dict, other: dict) -> bool:
    """Equal to the bit; a weight that is missing on one side must be zero on the other."""
    return all(
        torch.equal(one.get(place, torch.zeros(1)).expand_as(seen), seen)
        for one, other in ((one, other), (other, one))
        for place, seen in other.items()
    )


@cache
def published(name: str) -> TargetMap:
    return published_map(BY_NAME[name])


@cache
def spoken(family: str) -> dict[str, list[tuple[str, Target]]]:
    """Each dialect's names for the matrices of the published model."""
    found: dict[str, list[tuple[str, Target]]] = {}
    for name, (target, dialect) in published(family).names.items():
        if len(target.shape) > 1:
            found.setdefault(dialect, []).append((name, target))
    return found


@cache
def matrices(family: str, dialect: str) -> tuple[tuple[str, Target], ...]:
    """A dialect's names for all the matrices of the published model; none means rows that another one means."""
    found: list[tuple[str, Target]] = []
    taken: dict[str, list[Band]] = {}
    for name, target in spoken(family)[dialect]:
        bands = taken.setdefault(target.key, [])
        if not any(overlap(target.rows, band).length for band in bands):
            bands.append(target.rows)
            found.append((name, target))
    return tuple(found)


@cache
def of_every_kind(family: str, dialect: str) -> Lora:
    """A LoRA on one weight of every kind that the published model has; the kinds have different alphas."""
    first: dict[str, str] = {}
    alphas: dict[str, float | None] = {}
    modules: dict[str, LowRank] = {}
    for seed, (name, target) in enumerate(matrices(family, dialect)):
        if first.setdefault(re.sub(r"\d+", "#", target.key), target.key) == target.key:
            alpha = alphas.setdefault(target.key, ALPHAS[len(alphas) % len(ALPHAS)])
            rows, *inputs = target.delta_shape
            modules[name] = LowRank(whole_numbers(rows, 2, seed=seed), whole_numbers(2, *inputs, seed=-seed), alpha)
    return Lora(f"{dialect}.safetensors", modules, {"ss_tag_frequency": "{}", "author": "ü"})


def of_one_network(lora: Lora, layout: Layout, targets: TargetMap) -> Lora:
    """A PEFT folder is for one network: the denoiser."""
    names = {name: each for name, each in lora.modules.items() if targets.names[name].target.part == "model"}
    return Lora(lora.name, names, lora.metadata) if layout.folder else lora


@each_layout
@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
@each_family
def test_what_is_written_reads_back_with_the_same_effect(tmp_path, family, dialect, layout):
    lora = of_one_network(of_every_kind(family.name, dialect), layout, published(family.name))
    laid = write(tmp_path / "new", lora, layout, family)
    assert not laid.folded and len(lora.modules) > 5
    back = read_lora(str(tmp_path / "new"))
    for name in back.modules:
        target, dialect = published(family.name).names[name]
        borrowed = layout is LYCORIS and target.part == "clip"
        assert dialect == layout.name or (borrowed and dialect.startswith("kohya"))
    assert same(effect(lora, published(family.name)), effect(back, published(family.name)))


@each_layout
@each_family
def test_every_matrix_has_a_name_in_every_layout(family, layout):
    one = torch.ones(1)
    modules = {
        name: LowRank(one.expand(target.delta_shape[0], 1), one.expand(1, *target.shape[1:]))
        for name, target in matrices(family.name, "comfy")
    }
    lora = of_one_network(Lora("x", modules), layout, published(family.name))
    laid = laid_out(lora, layout, family)
    names = {module.full_name for module in laid.modules}
    assert len(names) == len(laid.modules) >= len(lora.modules) > 80  # FLUX.2 klein has 89


@each_family
def test_fused_and_split_are_each_others_inverse(family):
    lora = of_every_kind(family.name, "kohya")
    there = laid_out(lora, DIFFUSERS, family)
    back = laid_out(from_file(TensorFile("x", there.tensors, there.metadata)), KOHYA, family)
    direct = laid_out(lora, KOHYA, family)
    assert back.tensors.keys() == direct.tensors.keys()
    assert all(torch.equal(back.tensors[key], direct.tensors[key]) for key in direct.tensors)
    assert all(back.tensors[key].dtype == direct.tensors[key].dtype for key in direct.tensors)


def test_a_chain_over_all_layouts_changes_nothing(tmp_path):
    targets = target_map(FLUX, SMALL)
    names = [name for name, _ in matrices("flux", "kohya") if name in targets.names]
    shapes = {name: targets.names[name].target.shape for name in names}
    modules = {name: pair(*shape, alpha=seed + 0.1, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
    lora = Lora("x", modules)
    seen = effect(lora, targets)
    assert len(seen) > 20
    for number, layout in enumerate([PEFT, COMFY, DIFFUSERS, LYCORIS, KOHYA, LYCORIS, PEFT, KOHYA, COMFY, COMFY]):
        write(tmp_path / str(number), lora, layout, FLUX, shapes=SMALL)
        lora = read_lora(str(tmp_path / str(number)))
        assert same(seen, effect(lora, targets))
    assert [adapter.rank for adapter in lora.modules.values()] == [2] * len(modules)


def in_fused(*adapters: tuple[str, LowRank]) -> tuple[Lora, LowRank]:
    """Split modules of FLUX's linear1, and what they are as one."""
    lora = Lora("split.safetensors", dict(adapters))
    laid = laid_out(lora, KOHYA, FLUX, shapes=SMALL)
    assert list(laid.tensors) == [f"{LINEAR1}{end}" for end in (KOHYA.up, KOHYA.down, ".alpha")]
    (adapter,) = from_file(TensorFile("x", laid.tensors)).modules.values()
    assert isinstance(adapter, LowRank)
    return lora, adapter


def test_ranks_add_where_split_modules_are_fused():
    lora, fused = in_fused((Q, pair(8, 8, 1.0, seed=1)), (V, pair(8, 8, 1.5, rank=3, seed=2)))
    assert (fused.rank, fused.scale) == (5, 0.5)
    q, v = lora.modules.values()
    delta = fused.delta((56, 8), torch.float64)
    assert torch.equal(delta[:8], q.delta((8, 8), torch.float64))
    assert torch.equal(delta[16:24], v.delta((8, 8), torch.float64))
    assert not delta[8:16].any() and not delta[24:].any()


def test_a_missing_part_costs_no_rank_and_is_missing_again_when_split():
    lora, fused = in_fused((Q, pair(8, 8, 1.0)))
    assert fused.rank == 2 and not fused.up[8:].any()
    laid = laid_out(Lora("fused", {LINEAR1: fused}), DIFFUSERS, FLUX, shapes=SMALL)
    assert set(laid.tensors) == {Q + DIFFUSERS.up, Q + DIFFUSERS.down}
    assert torch.equal(laid.tensors[Q + DIFFUSERS.up], lora.modules[Q].up)


def test_a_fused_module_splits_into_rows_of_up_with_all_of_down():
    fused = pair(56, 8, 3.0)
    laid = laid_out(Lora("fused", {LINEAR1: fused}), DIFFUSERS, FLUX, shapes=SMALL)
    assert torch.equal(laid.tensors[K + DIFFUSERS.up], fused.up[8:16])
    assert len(laid.modules) == 4 and {module.factors.alpha for module in laid.modules} == {3.0}
    assert all(torch.equal(module.factors.down, fused.down) for module in laid.modules)


def test_an_untrained_fused_module_keeps_all_its_parts():
    idle = LowRank(torch.zeros(56, 2), torch.ones(2, 8))
    laid = laid_out(Lora("fused", {LINEAR1: idle}), DIFFUSERS, FLUX, shapes=SMALL)
    assert len(laid.modules) == 4 and {module.factors.rank for module in laid.modules} == {2}


@pytest.mark.parametrize(("alphas", "exact"), [((1.0, 4.0), True), ((1.0, 0.3), False)])
def test_parts_of_different_scales_have_the_ratio_folded_into_up(alphas, exact):
    generator = torch.Generator().manual_seed(0)
    ups = [torch.randn(8, 2, generator=generator) for _ in alphas]
    parts = [LowRank(up, torch.eye(2, 8), alpha) for up, alpha in zip(ups, alphas, strict=True)]
    lora, fused = in_fused(*zip((Q, K), parts, strict=True))
    assert laid_out(lora, KOHYA, FLUX, shapes=SMALL).folded == (LINEAR1,)
    assert fused.scale == 0.5
    for start, adapter in zip((0, 8), lora.modules.values(), strict=True):
        truth, ours = adapter.delta((8, 8), torch.float64), fused.delta((56, 8), torch.float64)[start : start + 8]
        # one rounding to float32; a ratio that is a power of two rounds nothing
        assert torch.equal(ours, truth) if exact else ((ours - truth).abs() <= 2**-24 * truth.abs()).all()
    if not exact:
        assert not torch.equal(ours, truth)


def test_the_last_layer_of_flux_has_its_halves_exchanged_for_diffusers_alone():
    adapter = pair(16, 8)
    native, foreign = "final_layer.adaLN_modulation.1", "transformer.norm_out.linear"
    for name, swapped in ((f"diffusion_model.{native}", {DIFFUSERS, PEFT, LYCORIS}), (foreign, {KOHYA, COMFY})):
        for layout in LAYOUTS:
            (module,) = laid_out(Lora("x", {name: adapter}), layout, FLUX, shapes=SMALL).modules
            assert torch.equal(module.factors.up, swap_halves(adapter.up) if layout in swapped else adapter.up)


@pytest.mark.parametrize("flat", [True, False])
def test_factors_have_the_shape_of_their_weight(flat):
    """A 1×1 convolution is written as a matrix by some and read as one by others."""
    name, conv = "unet.down_blocks.0.attentions.0.proj_in", pair(320, 320)
    if not flat:
        conv = LowRank(conv.up[..., None, None], conv.down[..., None, None])
    laid = laid_out(Lora("x", {name: conv}), KOHYA, BY_NAME["sd15"])
    up, down = (laid.tensors[f"lora_unet_input_blocks_1_1_proj_in{end}"] for end in (KOHYA.up, KOHYA.down))
    assert up.shape == (320, 2, 1, 1) and down.shape == (2, 320, 1, 1)
    linear = Lora("x", {"unet.mid_block.attentions.0.proj_in": pair(1280, 1280)})
    (module,) = laid_out(linear, KOHYA, BY_NAME["sdxl"]).modules
    assert module.factors.up.ndim == module.factors.down.ndim == 2


def test_every_alpha_reads_back_as_the_same_scale():
    """Kohya's alphas are float32; those from JSON, rank-stabilised ones too, may be any float64."""
    dice, wide = random.Random(0), 0
    for _ in range(20_000):
        rank, alpha = dice.randint(1, 320), dice.uniform(0.01, 300) * 10 ** dice.randint(-3, 3)
        if dice.random() < 0.5:
            alpha = float(torch.tensor(alpha))
        found = alpha_of(alpha / rank, rank)
        assert found is not None and found / rank == alpha / rank
        wide += float(torch.tensor(found)) != found
    assert 0 < wide < 15_000  # neither kind is untried


@pytest.mark.parametrize("layout", [KOHYA, COMFY])
def test_an_alpha_is_a_float32_unless_that_would_change_the_scale(layout):
    name = "lora_unet_img_in"
    for alpha, dtype in ((7.5, torch.float32), (16 * 32**0.5, torch.float64), (0.1, torch.float64)):
        laid = laid_out(Lora("x", {name: pair(8, 64, alpha)}), layout, FLUX, shapes=SMALL)
        (tensor,) = (tensor for key, tensor in laid.tensors.items() if key.endswith(".alpha"))
        assert tensor.dtype == dtype and float(tensor) / 2 == alpha / 2 and tensor.shape == ()


def test_a_scale_that_no_alpha_of_the_summed_rank_says_gets_directions_of_zeros():
    dice, padded = random.Random(1), 0
    for _ in range(300):
        rank = dice.randint(1, 40)
        alpha = dice.uniform(0.1, 64)
        parts = [(name, pair(8, 8, alpha, rank=rank, seed=seed)) for seed, name in enumerate((Q, K, V))]
        lora, fused = in_fused(*parts)
        assert fused.scale == lora.modules[Q].scale == alpha / rank
        assert 3 * rank <= fused.rank <= 6 * rank
        padded += fused.rank > 3 * rank
        assert not fused.up[:, 3 * rank :].any()
    assert padded


def test_factors_keep_their_dtype_unless_another_one_is_asked_for():
    halves = LowRank(torch.randn(8, 2).half(), torch.randn(2, 8).bfloat16(), 1.0)
    lora = Lora("x", {Q: halves})
    laid = laid_out(lora, DIFFUSERS, FLUX, shapes=SMALL)
    assert [tensor.dtype for tensor in laid.tensors.values()] == [torch.float16, torch.bfloat16]
    laid = laid_out(lora, KOHYA, FLUX, shapes=SMALL, dtype=torch.bfloat16)
    assert [tensor.dtype for tensor in laid.tensors.values()] == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert torch.equal(laid.tensors[f"{LINEAR1}{KOHYA.up}"][:8], halves.up.bfloat16())


def test_factors_of_different_dtypes_are_fused_in_one_that_holds_both():
    _, fused = in_fused(
        (Q, LowRank(torch.full((8, 1), 65504.0).half(), torch.ones(1, 8))),
        (K, LowRank(torch.full((8, 1), 1e30).bfloat16(), torch.zeros(1, 8).half())),
    )
    assert fused.up.dtype == torch.float32
    assert float(fused.up[0, 0]) == 65504 and float(fused.up[8, 1]) == float(torch.tensor(1e30).bfloat16())


def refusal(write_it: Callable[[Path], object], folder: Path) -> LoraOpsError:
    """The error of a write that must leave nothing behind."""
    before = sorted(folder.iterdir())
    with pytest.raises(LoraOpsError) as caught:
        write_it(folder / "new")
    assert sorted(folder.iterdir()) == before
    return caught.value


@pytest.mark.parametrize(
    ("lora", "kind", "module"),
    [
        (Lora("bad", {Q: pair(8, 8)}, leftover=(Refusal("odd.key", "no known factor name"),)), AdapterError, "odd.key"),
        (Lora("bad", {Q: pair(8, 8), "transformer.nowhere": pair(8, 8)}), TargetError, "transformer.nowhere"),
        (Lora("bad", {Q: pair(9, 8)}), TargetError, Q),
        (Lora("bad", {Q: pair(8, 8), LINEAR1: pair(56, 8)}), TargetError, LINEAR1),
        (Lora("bad", {f"text_encoder.{FC1}": pair(3072, 768)}), TargetError, f"text_encoder.{FC1}"),
        (Lora("bad", {}), AdapterError, None),
    ],
    ids=["unread", "unknown", "misfit", "twice", "no such part", "empty"],
)
@each_layout
def test_what_would_be_half_a_file_is_refused_and_nothing_is_written(tmp_path, layout, lora, kind, module):
    error = refusal(lambda path: write(path, lora, layout, FLUX, shapes=SMALL), tmp_path)
    assert type(error) is kind and error.file == "bad" and error.remedy
    assert error.module == module


@each_layout
@pytest.mark.parametrize(
    "adapter",
    [
        LoKr(torch.ones(2, 2), lokr_w2=torch.ones(4, 4)),
        LowRank(torch.ones(8, 2), torch.ones(2, 8), mid=torch.ones(2, 2)),
    ],
    ids=["LoKr", "LoRA with a core"],
)
def test_parts_of_a_fused_weight_have_other_algebras_in_lycoris_names_alone(tmp_path, layout, adapter):
    lora = Lora("parts", {Q: adapter, V: adapter})
    if layout is LYCORIS:
        names = [module.full_name for module in laid_out(lora, layout, FLUX, shapes=SMALL).modules]
        assert names == [f"lycoris_single_transformer_blocks_0_attn_to_{name}" for name in "qv"]
        return
    error = refusal(lambda path: write(path, lora, layout, FLUX, shapes=SMALL), tmp_path)
    assert isinstance(error, AdapterError) and error.file == "parts"
    assert error.module in (Q, V) and error.remedy


def test_a_weight_that_a_layout_has_no_name_for_is_refused(tmp_path):
    shapes = {"diffusion_model.strange.to_q.weight": (8, 8)}
    lora = Lora("strange", {"diffusion_model.strange.to_q": pair(8, 8)})
    assert laid_out(lora, KOHYA, UNKNOWN, shapes=shapes).modules[0].full_name == "lora_unet_strange_to_q"
    for layout in (DIFFUSERS, PEFT, LYCORIS):
        error = refusal(lambda path, layout=layout: write(path, lora, layout, UNKNOWN, shapes=shapes), tmp_path)
        assert isinstance(error, TargetError) and error.module == "diffusion_model.strange.to_q"
        assert "no name" in error.what and error.file == "strange"


def test_a_peft_folder_is_for_one_network(tmp_path):
    text = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    lora = Lora("both", {"lora_unet_img_in": pair(3072, 64), text: pair(3072, 768)})
    error = refusal(lambda path: write(path, lora, PEFT, FLUX), tmp_path)
    assert isinstance(error, TargetError) and error.module == text
    for alone in lora.modules:
        assert laid_out(Lora("one", {alone: lora.modules[alone]}), PEFT, FLUX).config
    assert len(laid_out(lora, DIFFUSERS, FLUX).modules) == 2


def test_a_value_that_the_asked_dtype_cannot_hold_is_refused(tmp_path):
    lora = Lora("loud", {Q: LowRank(torch.full((8, 1), 1e5), torch.ones(1, 8))})
    error = refusal(lambda path: write(path, lora, DIFFUSERS, FLUX, shapes=SMALL, dtype=torch.float16), tmp_path)
    assert isinstance(error, AdapterError) and error.module == Q and "float16" in error.what
    write(tmp_path / "new", lora, DIFFUSERS, FLUX, shapes=SMALL, dtype=torch.bfloat16)


SOURCE = {
    "modelspec.title": "Ink",
    "modelspec.hash_sha256": "0xabc",
    "sshs_model_hash": "abc",
    "modelspec.architecture": "wan-2.1/lora",
    "modelspec.implementation": "https://example.org/trainer",
    "ss_network_dim": "64",
    "ss_network_alpha": "32",
    "ss_network_module": "lycoris.kohya",
    "ss_base_model_version": "wan2.1",
    "modelspec.author": "Ann",
    "ss_tag_frequency": "{}",
    "lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 16}),
    "adapter_config.json": json.dumps({"r": 2, "lora_alpha": 16}),
}


@each_layout
def test_metadata_are_kept_completed_and_true(tmp_path, layout):
    lora = Lora("x", {"lora_unet_img_in": pair(8, 64, 3.0)}, SOURCE)
    laid = write(tmp_path / "new", lora, layout, FLUX, shapes=SMALL, metadata={"modelspec.trigger_phrase": "ink wash"})
    written = tmp_path / "new" / "adapter_model.safetensors" if layout.folder else tmp_path / "new"
    found = read_header(written).metadata
    assert found == laid.metadata
    assert found["ss_tag_frequency"] == "{}" and found["modelspec.title"] == "Ink"
    assert found["modelspec.trigger_phrase"] == "ink wash" and found["modelspec.author"] == "Ann"
    assert found["modelspec.sai_model_spec"] == "1.0.1" and found["modelspec.architecture"] == "flux-1/lora"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]{8}\+00:00", found["modelspec.date"])
    assert not {"modelspec.hash_sha256", "sshs_model_hash", "adapter_config.json"} & found.keys()
    assert ("lora_adapter_metadata" in found) == (layout is DIFFUSERS)
    assert found["modelspec.implementation"] == layout.implementation
    names = ("ss_network_dim", "ss_network_alpha", "ss_network_module", "ss_base_model_version")
    told = {"ss_network_dim": "2", "ss_network_alpha": "3.0"}
    told |= {"ss_network_module": "networks.lora_flux", "ss_base_model_version": "flux1"}
    assert {name: found[name] for name in names if name in found} == (told if layout is KOHYA else {})
    assert {adapter.scale for adapter in read_lora(str(tmp_path / "new")).modules.values()} == {1.5}


def test_a_file_without_a_title_is_called_by_its_name(tmp_path):
    write(tmp_path / "ink wash.safetensors", Lora("x", {Q: pair(8, 8)}), COMFY, FLUX, shapes=SMALL)
    assert read_header(tmp_path / "ink wash.safetensors").metadata["modelspec.title"] == "ink wash"


def test_a_pattern_means_no_other_module_whose_name_ends_alike():
    last, block = "proj_out", "single_transformer_blocks.0.proj_out"
    adapters = {f"transformer.{last}": pair(64, 8, 6.0), f"transformer.{block}": pair(8, 40, 2.0), Q: pair(8, 8, 2.0)}
    laid = laid_out(Lora("x", adapters), PEFT, FLUX, shapes=SMALL)
    assert laid.config is not None and laid.config["alpha_pattern"] == {"^proj_out": 6.0}
    laid = laid_out(Lora("x", adapters), DIFFUSERS, FLUX, shapes=SMALL)
    back = from_file(TensorFile("x", laid.tensors, laid.metadata))
    assert {name: adapter.scale for name, adapter in back.modules.items()} == {
        name: adapter.scale for name, adapter in adapters.items()
    }


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_peft_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    lora, final = Lora("x", {Q: pair(8, 8)}), tmp_path / "new"

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    for name in ("write_laid", "write_synced"):
        with monkeypatch.context() as patch:
            patch.setattr(files.folder, name, full)
            error = refusal(lambda path: write(path, lora, PEFT, FLUX, shapes=SMALL), tmp_path)
            assert isinstance(error, FileError) and error.file == str(final) and "No space" in error.what
    write(final, lora, PEFT, FLUX, shapes=SMALL)
    assert set(content(final)) == {"adapter_model.safetensors", "adapter_config.json"}
    before = content(final)
    other = Lora("x", {Q: pair(8, 8, seed=5)})
    assert "exists" in refusal(lambda path: write(path, other, PEFT, FLUX, shapes=SMALL), tmp_path).what
    with monkeypatch.context() as patch:
        patch.setattr(files.folder, "write_laid", full)
        refusal(lambda path: write(path, other, PEFT, FLUX, shapes=SMALL, overwrite=True), tmp_path)
    assert content(final) == before
    write(final, other, PEFT, FLUX, shapes=SMALL, overwrite=True)
    assert content(final).keys() == before.keys() and content(final) != before
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(tmp_path, monkeypatch):
    """Where the system cannot exchange two names."""
    monkeypatch.setattr(files.folder, "_exchanged", lambda *_: False)
    write(tmp_path / "new", Lora("x", {Q: pair(8, 8)}), PEFT, FLUX, shapes=SMALL)
    before, rename = content(tmp_path / "new"), files.folder.os.rename

    def stubborn(source, target):
        if str(source).endswith(files.writing.TEMPORARY):
            raise PermissionError(13, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(files.folder.os, "rename", stubborn)
    refusal(lambda path: write(path, Lora("x", {K: pair(8, 8)}), PEFT, FLUX, shapes=SMALL, overwrite=True), tmp_path)
    assert content(tmp_path / "new") == before


@pytest.mark.parametrize("foreign", ["README.md", "adapter_model.bin"])
def test_a_folder_with_other_files_is_not_replaced(tmp_path, foreign):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / foreign).write_text("mine")
    lora = Lora("x", {Q: pair(8, 8)})
    error = refusal(lambda path: write(path, lora, PEFT, FLUX, shapes=SMALL, overwrite=True), tmp_path)
    assert foreign in error.what and content(tmp_path / "new") == {foreign: b"mine"}


def test_convert_says_what_it_did(tmp_path, capsys):
    lora = Lora("x", {LINEAR1: pair(21504, 3072, 3.0)})
    source, out = tmp_path / "in.safetensors", tmp_path / "out"
    write(source, lora, KOHYA, FLUX)
    command = ["convert", str(source), "-o", str(out), "--layout", "peft"]
    assert main([*command, "--dtype", "bfloat16"]) == 0
    told = capsys.readouterr().out
    assert "1 modules as 4 in the layout peft, for FLUX.1" in told and "alpha 3 in adapter_config.json" in told
    assert {adapter.up.dtype for adapter in read_lora(str(out)).modules.values()} == {torch.bfloat16}
    assert main(command) == 1
    assert "exists" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    assert main([*command, "--family", "sd15", "--overwrite"]) == 1
    assert "no place in Stable Diffusion 1.5" in capsys.readouterr().err
    assert main(["convert", str(out), "-o", str(tmp_path / "back"), "--layout", "kohya"]) == 0
    assert same(effect(lora, published("flux")), effect(read_lora(str(tmp_path / "back")), published("flux")))


@each_layout
@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_convert_tells_of_scales_that_not_every_program_reads(tmp_path, capsys, layout, alpha):
    write(tmp_path / "in", Lora("x", {LINEAR1: pair(21504, 3072, alpha)}), KOHYA, FLUX)
    assert main(["convert", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--layout", layout.name]) == 0
    told = "(ComfyUI's own loader) takes every scale as 1" in capsys.readouterr().out
    assert told == (alpha == 1.0 and layout in (DIFFUSERS, PEFT))


def test_convert_takes_the_shapes_of_a_model_that_is_not_the_published_one(tmp_path, capsys):
    checkpoint = small_checkpoint()
    files.write(tmp_path / "model.safetensors", checkpoint, overwrite=False)
    shapes = {key: tuple(tensor.shape) for key, tensor in checkpoint.items()}
    source = write_samples(shapes, tmp_path)[0]
    command = ["convert", str(source), "-o", str(tmp_path / "out.safetensors"), "--layout", "diffusers"]
    assert main(command) == 1
    assert "Name the family or the model" in capsys.readouterr().err
    assert main([*command, "--model", str(tmp_path / "model.safetensors")]) == 0
    assert "in the layout diffusers, for Stable Diffusion 1.5" in capsys.readouterr().out
    targets = target_map(recognise(shapes), shapes)
    assert same(effect(read_lora(str(source)), targets), effect(read_lora(str(tmp_path / "out.safetensors")), targets))


def test_a_family_without_words_of_sd_scripts_keeps_none_of_the_source():
    found = metadata(SOURCE, KOHYA, BY_NAME["wan"].name, ())
    assert not {"ss_network_module", "ss_base_model_version"} & found.keys()


def test_convert_tells_of_scales_that_it_folded(tmp_path, capsys):
    names = [f"transformer.transformer_blocks.0.attn.to_{name}" for name in "qk"]
    lora = Lora("x", {name: pair(3072, 3072, alpha) for name, alpha in zip(names, (1.0, 0.3), strict=True)})
    write(tmp_path / "in", lora, DIFFUSERS, FLUX)
    assert main(["convert", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--layout", "comfy"]) == 0
    assert "1 modules join parts of different scales" in capsys.readouterr().out


# Other algebras: passed through with their own factors


BLOCK = "lora_unet_input_blocks_1"
IN, CONV, TO_Q = f"{BLOCK}_1_proj_in", f"{BLOCK}_0_in_layers_2", f"{BLOCK}_1_transformer_blocks_0_attn1_to_q"
NORM = f"{BLOCK}_0_in_layers_0"
SD15 = {
    f"diffusion_model.input_blocks.1.{name}": shape
    for name, shape in {
        "1.proj_in.weight": (8, 8, 1, 1),
        "0.in_layers.2.weight": (8, 12, 3, 3),
        "0.in_layers.2.bias": (8,),
        "0.in_layers.0.weight": (12,),
        "0.in_layers.0.bias": (12,),
        "1.transformer_blocks.0.attn1.to_q.weight": (8, 8),
    }.items()
}
_DOWN_UP = {"lora_down.weight": (2, 8), "lora_up.weight": (8, 2)}
_HADA = {"hada_w1_a": (8, 2), "hada_w1_b": (2, 108), "hada_w2_a": (8, 2), "hada_w2_b": (2, 108)}
_CORES = {"hada_w1_a": (2, 8), "hada_w1_b": (2, 12), "hada_w2_a": (2, 8), "hada_w2_b": (2, 12)}
_CORE, _ALPHA = (2, 2, 3, 3), {"alpha": ()}
OTHERS = {
    "DoRA": (TO_Q, {**_DOWN_UP, "dora_scale": (8, 1), **_ALPHA}),
    "DoRA per input": (TO_Q, {**_DOWN_UP, "dora_scale": (1, 8)}),
    "DoRA of PEFT": (TO_Q, {**_DOWN_UP, "lora_magnitude_vector": (8,)}),
    "DoRA of a convolution": (
        CONV,
        {"lora_down.weight": (2, 12, 3, 3), "lora_up.weight": (8, 2, 1, 1), "dora_scale": (1, 12, 1, 1)},
    ),
    "DoRA around LoHa": (CONV, {**_HADA, "dora_scale": (8, 1, 1, 1)}),
    "LoRA with a core": (
        CONV,
        {"lora_down.weight": (2, 12, 1, 1), "lora_up.weight": (8, 2, 1, 1), "lora_mid.weight": _CORE, **_ALPHA},
    ),
    "LoHa": (CONV, {**_HADA, **_ALPHA}),
    "LoHa with cores": (CONV, {**_CORES, "hada_t1": _CORE, "hada_t2": _CORE}),
    "LoKr": (TO_Q, {"lokr_w1": (2, 4), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 2), **_ALPHA}),
    "LoKr of matrices": (CONV, {"lokr_w1": (2, 4), "lokr_w2": (4, 3, 3, 3), **_ALPHA}),
    "LoKr with a core": (CONV, {"lokr_w1": (2, 4), "lokr_w2_a": (2, 4), "lokr_w2_b": (2, 3), "lokr_t2": _CORE}),
    "LoKr with two cores": (
        CONV,
        {
            "lokr_w1_a": (2, 2),
            "lokr_w1_b": (2, 4),
            "lokr_t1": (2, 2, 1, 1),
            "lokr_w2_a": (2, 4),
            "lokr_w2_b": (2, 3),
            "lokr_t2": _CORE,
        },
    ),
    "GLoRA with a core": (
        CONV,
        {
            "a1.weight": (12, 2, 1, 1),
            "a2.weight": (2, 12, 1, 1),
            "b1.weight": (8, 2, 1, 1),
            "b2.weight": (2, 12, 1, 1),
            "bm.weight": _CORE,
        },
    ),
    "GLoRA": (TO_Q, {"a1.weight": (8, 2), "a2.weight": (2, 8), "b1.weight": (8, 2), "b2.weight": (2, 8), **_ALPHA}),
    "Diag-OFT": (TO_Q, {"oft_blocks": (2, 4, 4), "rescale": (8, 1), **_ALPHA}),
    "Diag-OFT without alpha": (TO_Q, {"oft_blocks": (2, 4, 4)}),
    "BOFT": (CONV, {"oft_blocks": (2, 4, 2, 2), "rescale": (8, 1, 1, 1)}),
    "OFT": (IN, {"oft_R.weight": (2, 6)}),
    "OFT of OneTrainer": (IN, {"oft_R.weight": (2, 6), "oft_R.scaled_oft": ()}),
    "(IA)3": (CONV, {"weight": (1, 8, 1, 1), "on_input": 0}),
    "(IA)3 per input": (TO_Q, {"weight": (8,), "on_input": 1}),
    "(IA)3 of PEFT": (TO_Q, {"ia3_l": (1, 8)}),
    "a difference": (CONV, {"diff": (8, 12, 3, 3), "diff_b": (8,)}),
    "a norm": (NORM, {"w_norm": (12,), "b_norm": (12,)}),
    "a LoRA with a bias": (
        CONV,
        {"lora_A.weight": (2, 12, 3, 3), "lora_B.weight": (8, 2, 1, 1), "lora_B.bias": (8,)},
    ),
}


def random_file(module: str, shapes: dict, *, dtype: torch.dtype = torch.float32) -> Lora:
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, shape in shapes.items():
        made = torch.tensor(shape) if isinstance(shape, int) else torch.randn(shape, generator=generator).to(dtype) / 2
        tensors[f"{module}.{name}"] = made
    lora = from_file(TensorFile("x", tensors))
    assert lora.modules and not lora.leftover
    return lora


def weights_with(lora: Lora, targets: TargetMap) -> dict[str, torch.Tensor]:
    """What it makes of random weights."""
    landing = land([Entry(lora, ONE)], targets)
    (row,) = landing.rows
    assert not row.refused and not lora.leftover
    shapes = {target.key: target.shape for target, _ in row.landed.values()}
    generator = torch.Generator().manual_seed(1)
    weights = {key: torch.randn(shape, generator=generator) for key, shape in sorted(shapes.items())}
    return {key: merged(weights[key], pieces) for (_, key), pieces in landing.pieces.items()}


@pytest.mark.parametrize("layout", [KOHYA, COMFY, LYCORIS], ids=lambda layout: layout.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", OTHERS.values(), ids=OTHERS)
def test_every_algebra_reads_back_with_the_same_change_to_the_bit(case, layout, dtype, tmp_path):
    lora, targets = random_file(*case, dtype=dtype), target_map(BY_NAME["sd15"], SD15)
    laid = write(tmp_path / "new", lora, layout, BY_NAME["sd15"], shapes=SD15)
    back = read_lora(str(tmp_path / "new"))
    assert {targets.names[name].dialect for name in back.modules} == {layout.name} and not laid.folded
    before, after = weights_with(lora, targets), weights_with(back, targets)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    again = laid_out(back, layout, BY_NAME["sd15"], shapes=SD15)
    assert again.tensors.keys() == laid.tensors.keys()
    if layout is KOHYA and case is not OTHERS["a LoRA with a bias"]:
        assert "lycoris" in laid.metadata["ss_network_module"]


def test_a_fused_dora_splits_into_doras(tmp_path):
    """Its norms are of rows; a magnitude per input is of all of them and cannot be cut."""
    rows = {"lora_down.weight": (2, 8), "lora_up.weight": (56, 2)}
    targets = target_map(FLUX, SMALL)
    lora = random_file(LINEAR1, {**rows, "dora_scale": (56, 1)})
    for layout in (DIFFUSERS, PEFT):
        write(tmp_path / layout.name, lora, layout, FLUX, shapes=SMALL)
        back = read_lora(str(tmp_path / layout.name))
        assert [adapter.ALGEBRA for adapter in back.modules.values()] == ["DoRA"] * 4
        (one,), (other,) = weights_with(lora, targets).values(), weights_with(back, targets).values()
        # the same sums: a norm is of one row
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    per_input = random_file(LINEAR1, {**rows, "dora_scale": (1, 8)})
    with pytest.raises(AdapterError, match="cannot be cut"):
        laid_out(per_input, DIFFUSERS, FLUX, shapes=SMALL)


@pytest.mark.parametrize(
    ("name", "layout", "words"),
    [
        *((name, PEFT, "which the layout 'peft' cannot hold") for name in ("LoHa", "GLoRA", "Diag-OFT", "(IA)3")),
        ("LoKr", DIFFUSERS, "is LoKr .* which the layout 'diffusers' cannot hold"),
        ("DoRA per input", PEFT, "is DoRA .* which the layout 'peft' cannot hold"),
        ("DoRA around LoHa", PEFT, "is DoRA .* which the layout 'peft' cannot hold"),
        ("LoRA with a core", PEFT, "is LoRA .*mid.* which the layout 'peft' cannot hold"),
        ("a difference", DIFFUSERS, "is full"),
    ],
)
def test_what_a_layout_has_no_words_for_is_refused_by_name(name, layout, words):
    lora = random_file(*OTHERS[name])
    with pytest.raises(AdapterError, match=words) as caught:
        laid_out(lora, layout, BY_NAME["sd15"], shapes=SD15)
    assert caught.value.module in lora.modules and caught.value.remedy == "Choose another layout."


def test_only_lora_is_fused_and_peft_has_dora_everywhere_or_nowhere():
    lokr = Lora("x", {Q: LoKr(torch.ones(2, 2), lokr_w2=torch.ones(4, 4))})
    with pytest.raises(AdapterError, match="is LoKr for a part .* only LoRA is fused") as caught:
        laid_out(lokr, KOHYA, FLUX, shapes=SMALL)
    assert "layout lycoris" in (caught.value.remedy or "")
    mixed = random_file(*OTHERS["DoRA"])
    mixed = Lora("x", {**mixed.modules, CONV: random_file(*OTHERS["a LoRA with a bias"]).modules[CONV]})
    with pytest.raises(AdapterError, match="is LoRA beside DoRA") as caught:
        laid_out(mixed, PEFT, BY_NAME["sd15"], shapes=SD15)
    assert "in_layers.2" in (caught.value.module or "") or "conv1" in (caught.value.module or "")
