"""Landing: every module of a file is somewhere in the result, and nothing lands twice or by accident."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lora_ops.adapters import LowRank
from lora_ops.dialects import published_map, target_map
from lora_ops.errors import TargetError
from lora_ops.families import FAMILIES, recognise
from lora_ops.files import TensorFile
from lora_ops.landing import Piece, add_, guess, land, merged, require_coverage
from lora_ops.lora import Band, Lora, Refusal, from_file
from lora_ops.receipt import receipt
from lora_ops.samples import SAMPLES, small_checkpoint, tensors
from lora_ops.stack import Entry

ONE = {"model": 1.0, "clip": 1.0}
FLUX = {  # one double and one single block of width 8
    "diffusion_model.double_blocks.0.img_attn.qkv.weight": (24, 8),
    "diffusion_model.double_blocks.0.img_mod.lin.weight": (48, 8),
    "diffusion_model.vector_in.in_layer.weight": (8, 8),
    "diffusion_model.txt_in.weight": (8, 8),
    "diffusion_model.single_blocks.0.linear1.weight": (56, 8),
    "diffusion_model.final_layer.adaLN_modulation.1.weight": (16, 8),
}


def pair(rows: int, columns: int, seed: int = 0) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rows, 2, generator=generator), torch.randn(2, columns, generator=generator))


def lora(**modules: LowRank) -> Lora:
    return Lora("x.safetensors", {name.replace("__", "."): adapter for name, adapter in modules.items()})


@pytest.fixture(scope="module")
def sd15():
    shapes = {key: tuple(tensor.shape) for key, tensor in small_checkpoint().items()}
    return target_map(recognise(shapes), shapes)


@pytest.fixture(scope="module")
def flux():
    return target_map(recognise(FLUX), FLUX)


def published(family: str):
    return published_map(next(each for each in FAMILIES if each.name == family))


def test_the_shape_tells_which_text_encoder_a_file_of_peft_is_for():
    sdxl = published("sdxl")
    module = "base_model.model.text_model.encoder.layers.3.self_attn.k_proj"
    for width, key in ((768, "clip_l"), (1280, "clip_g")):
        (row,) = land([Entry(Lora("x", {module: pair(width, width)}), ONE)], sdxl).rows
        assert row.landed[module].target.key.startswith(f"{key}.transformer.")
    (row,) = land([Entry(Lora("x", {module: pair(512, 512)}), ONE)], sdxl).rows
    assert [refusal.reason for refusal in row.refused] == ["could be several places of this model"]


def test_a_stack_of_dialects_on_fused_weights_is_the_float64_sum():
    """FLUX.1's linear1 is q, k, v and the mlp: fused, split in four, and x-flux's qkv, each with a scale of its own."""
    shapes = {**FLUX, "diffusion_model.single_blocks.0.linear2.weight": (8, 40)}
    targets = target_map(recognise(shapes), shapes)
    split = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    fused = {"lora_unet_single_blocks_0_linear1": replace(pair(56, 8, 1), alpha=0.5)}
    bands = {
        f"transformer.single_transformer_blocks.0.{name}": replace(pair(32 if "mlp" in name else 8, 8, seed), alpha=3.0)
        for seed, name in enumerate(split, 2)
    }
    processor = {"single_blocks.0.processor.qkv": pair(24, 8, 7), "single_blocks.0.processor.proj": pair(8, 40, 8)}
    stack = [
        Entry(Lora(str(number), modules), {"model": strength, "clip": 1.0})
        for number, (modules, strength) in enumerate([(fused, 0.7), (bands, -1.3), (processor, 0.4)])
    ]
    landing = land(stack, targets)
    assert not any(row.refused for row in landing.rows)

    def delta(adapter, strength):
        return strength * adapter.scale * adapter.up.double() @ adapter.down.double()

    truth = delta(fused["lora_unet_single_blocks_0_linear1"], 0.7)
    truth += torch.cat([delta(adapter, -1.3) for adapter in bands.values()])
    truth[:24] += delta(processor["single_blocks.0.processor.qkv"], 0.4)
    ours = torch.zeros(56, 8, dtype=torch.float64)
    add_(ours, landing.of_part("model")["diffusion_model.single_blocks.0.linear1.weight"])
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)  # sums of a few products in float64


def test_split_projections_land_on_the_bands_of_the_fused_weight(flux):
    parts = {
        "transformer.single_transformer_blocks.0.attn.to_q": pair(8, 8, 1),
        "transformer.single_transformer_blocks.0.attn.to_v": pair(8, 8, 2),
        "transformer.single_transformer_blocks.0.proj_mlp": pair(32, 8, 3),
    }
    landing = land([Entry(Lora("x", parts), ONE)], flux)
    pieces = landing.pieces["model", "diffusion_model.single_blocks.0.linear1.weight"]
    weight = torch.randn(56, 8)
    q, v, mlp = (adapter.delta((adapter.up.shape[0], 8)) for adapter in parts.values())
    expected = weight + torch.cat((q, torch.zeros(8, 8), v, mlp))
    torch.testing.assert_close(merged(weight, pieces), expected, rtol=1e-5, atol=1e-5)


def test_the_swapped_last_layer_of_flux_is_swapped_back(flux):
    adapter = pair(16, 8)
    landing = land([Entry(Lora("x", {"transformer.norm_out.linear": adapter}), ONE)], flux)
    (pieces,) = landing.pieces.values()
    delta = adapter.delta((16, 8))
    torch.testing.assert_close(merged(torch.zeros(16, 8), pieces), torch.cat((delta[8:], delta[:8])))


def test_the_same_update_in_four_dialects_gives_the_same_weights(sd15):
    weights = []
    for sample in SAMPLES:
        file = from_file(TensorFile(sample.name, tensors(sample, sd15)))
        landing = land([Entry(file, ONE)], sd15)
        require_coverage(landing, 1.0)
        weights.append(landing.pieces)
    first, *others = weights
    for other in others:
        assert other.keys() == first.keys()
        for place, (piece,) in first.items():
            (same,) = other[place]
            shape = (piece.adapter.up.shape[0], *piece.adapter.down.shape[1:])
            assert torch.equal(piece.adapter.delta(shape), same.adapter.delta(shape)), place


def test_strength_zero_makes_no_piece_and_rounds_nothing(sd15):
    name = "lora_unet_middle_block_1_proj_in"
    shape = sd15.names[name].target.shape
    found = land([Entry(lora(**{name: pair(shape[0], shape[1])}), {"model": 0.0, "clip": 1.0})], sd15)
    assert not found.pieces and found.rows[0].matched("model") == 1
    require_coverage(found, 0.9)


def test_two_modules_for_one_place_land_once_and_the_second_is_refused(flux):
    both = Lora(
        "x",
        {
            "diffusion_model.double_blocks.0.img_attn.qkv": pair(24, 8),
            "transformer.transformer_blocks.0.attn.to_k": pair(8, 8),
        },
    )
    (row,) = land([Entry(both, ONE)], flux).rows
    assert list(row.landed) == ["diffusion_model.double_blocks.0.img_attn.qkv"]
    assert row.refused == (
        Refusal(
            "transformer.transformer_blocks.0.attn.to_k",
            "the same place as 'diffusion_model.double_blocks.0.img_attn.qkv'",
        ),
    )


def test_modules_of_an_unconnected_part_are_told_but_do_not_count():
    targets = published("sd15")
    shapes = {key: shape for key, shape in FAMILIES[0].published().items() if key.startswith("diffusion_model.")}
    model_only = target_map(recognise(shapes), shapes)
    te = {f"lora_te_text_model_encoder_layers_{n}_mlp_fc1": pair(3072, 768) for n in range(12)}
    unet = {"lora_unet_middle_block_1_proj_in": pair(1280, 1280)}
    (row,) = land([Entry(Lora("x", te | unet), ONE)], model_only).rows
    assert (row.total, row.coverage, len(row.unconnected["clip"])) == (1, 1.0, 12)
    assert land([Entry(Lora("x", te | unet), ONE)], targets).rows[0].total == 13
    unread = (Refusal("lora_te_text_model_encoder_layers_3_mlp_fc2", "has magnitude"),)
    (row,) = land([Entry(Lora("x", unet, {}, unread), ONE)], model_only).rows
    assert (row.coverage, len(row.unconnected["clip"])) == (1.0, 1)
    with pytest.raises(TargetError, match="all its 12 modules are for the CLIP, which is not connected. Connect CLIP"):
        require_coverage(land([Entry(Lora("x", te), ONE)], model_only), 0.9)


def test_a_lora_for_another_family_is_refused_with_both_names(sd15):
    modules = {f"lora_unet_double_blocks_{n}_img_attn_proj": pair(3072, 3072) for n in range(4)}
    with pytest.raises(TargetError) as caught:
        require_coverage(land([Entry(Lora("ink", modules), ONE)], sd15), 0.9)
    assert "4 of 4 modules" in str(caught.value)
    assert "made for FLUX.1; the model is Stable Diffusion 1.5" in str(caught.value)
    assert caught.value.facts["guess"] == "flux" and caught.value.facts["matched"] == 0


def test_sdxl_and_sd15_share_names_and_are_told_apart_by_shape(sd15):
    assert guess(lora(lora_unet_middle_block_1_transformer_blocks_0_attn2_to_k=pair(1280, 2048))).family == "sdxl"
    assert guess(lora(lora_unet_middle_block_1_transformer_blocks_0_attn2_to_k=pair(1280, 768))).family == "sd15"
    assert guess(lora(nothing_like_it=pair(4, 4))) is None


def test_coverage_below_the_minimum_stops_and_says_which_minimum_would_pass(sd15):
    name = "lora_unet_middle_block_1_proj_in"
    shape = sd15.names[name].target.shape
    modules = {name: pair(shape[0], shape[1]), "lora_unet_middle_block_1_proj_out": pair(3, 3)}
    landing = land([Entry(Lora("ink", modules), ONE)], sd15)
    require_coverage(landing, 0.5)
    with pytest.raises(TargetError, match="1 of 2 modules .*makes an update of .*min_coverage to 0.50"):
        require_coverage(landing, 0.9)


def test_every_module_of_the_file_is_in_the_row_exactly_once(sd15):
    known = "lora_unet_middle_block_1_proj_in"
    shape = sd15.names[known].target.shape
    modules = {
        known: pair(shape[0], shape[1]),
        f"diffusion_model.{known[10:]}": pair(1, 1),
        "lora_te_text_model_encoder_layers_0_mlp_fc1": pair(3072, 768),
        "lora_te_text_model_encoder_layers_11_mlp_fc1": pair(3072, 768),
        "lora_unet_input_blocks_99_proj": pair(4, 4),
    }
    file = Lora("x", modules, {}, (Refusal("bundle_emb.cat", "no known factor name"),))
    (row,) = land([Entry(file, ONE)], sd15).rows
    told = [
        *row.landed,
        *(refusal.module for refusal in row.refused),
        *(m for part in row.unconnected.values() for m in part),
    ]
    assert sorted(told) == sorted([*modules, "bundle_emb.cat"])
    reasons = {refusal.module: refusal.reason for refusal in row.refused}
    assert reasons["lora_te_text_model_encoder_layers_11_mlp_fc1"] == "no such weight in this model"


def test_merged_rounds_once_and_leaves_the_weight_alone():
    weight = torch.randn(24, 8).to(torch.bfloat16)
    before = weight.clone()
    pieces = [Piece(pair(24, 8, n), None, 0.3) for n in range(3)] + [Piece(pair(8, 8, 9), Band(8, 8), 0.5)]
    exact = weight.double()
    for piece in pieces:
        rows = exact if piece.band is None else exact[8:16]
        rows += piece.strength * piece.adapter.delta(tuple(rows.shape), torch.float64)
    result = merged(weight, pieces)
    assert torch.equal(weight, before)
    # bfloat16 keeps 8 significant bits: rounded once is within half a unit, 2^-8; float32 sums add next to nothing
    assert ((result.double() - exact).abs() <= exact.abs() * 2**-8 * 1.001 + 1e-6).all()


def test_the_receipt_tells_what_landed_and_what_did_not(sd15):
    name = "lora_unet_middle_block_1_proj_in"
    shape = sd15.names[name].target.shape
    adapter = LowRank(*pair(shape[0], shape[1]).packed()[:2], 1.0)
    file = Lora(
        "ink", {name: adapter, "lora_unet_nowhere": adapter}, {}, (Refusal("odd\n\x1b[2Jkey", "no known factor name"),)
    )
    entry = Entry(file, {"model": 0.8, "clip": 0.6})
    found = receipt(land([entry], sd15), 0.01)
    (row,) = found.data["rows"]
    assert (row["matched"], row["total"], row["dialect"]) == (1, 3, "kohya")
    assert row["scale"] == {"0.5": 1} and row["alpha"] == {"tensor": 1} and row["rank"] == {"2": 1}
    assert row["energy_landed"] == 0.5  # the same adapter twice, one of them lost
    assert {group["reason"] for group in row["refused"]} == {"name not known", "no known factor name"}
    assert "1 of 3 modules landed" in found.text and "\x1b" not in found.text
    assert (row["asked"], row["other_tensors"]) == (None, False) and "asked" not in found.text
    other = receipt(land([replace(entry, asked="old/in\nk", other_tensors=True)], sd15), 0.01)
    assert (other.data["rows"][0]["asked"], other.data["rows"][0]["other_tensors"]) == ("old/in\nk", True)
    assert "asked for as old/in\\nk\n   other tensors than those the row was written for" in other.text


def test_a_stack_of_mixed_dialects_on_fused_weights_is_the_written_out_sum():
    """Whole weights and their parts, with alpha in a tensor, in both headers, in PEFT's configuration, and nowhere."""
    linear1, qkv = "single_blocks.0.linear1", "double_blocks.0.img_attn.qkv"
    block, double = "single_transformer_blocks.0", "transformer_blocks.0.attn"
    parts = {"q": (0, 8), "k": (8, 8), "v": (16, 8)}
    q, k, v = (f"{block}.attn.to_{name}" for name in "qkv")

    def factors(module: str, rows: int, seed: int, up: str = "lora_B", down: str = "lora_A") -> dict[str, torch.Tensor]:
        adapter = pair(rows, 8, seed)
        return {f"{module}.{up}.weight": adapter.up, f"{module}.{down}.weight": adapter.down}

    kohya = factors("lora_unet_single_blocks_0_linear1", 56, 1, "lora_up", "lora_down")
    kohya |= {"lora_unet_single_blocks_0_linear1.alpha": torch.tensor(1.0)}
    lost = factors("lora_unet_double_blocks_0_img_attn_qkv", 24, 2, "lora_up", "lora_down")
    split = {key: t for n, name in enumerate((q, k, v)) for key, t in factors(f"transformer.{name}", 8, 3 + n).items()}
    split |= factors(f"transformer.{block}.proj_mlp", 32, 6)
    split |= factors(f"transformer.{double}.to_v", 8, 7)
    header = {"lora_adapter_metadata": '{"transformer.r": 2, "transformer.lora_alpha": 8}'}
    beside = {"adapter_config.json": '{"r": 2, "lora_alpha": 4, "use_rslora": true}'}
    files = (
        (kohya, {}, 0.7),
        (lost, {"ss_network_dim": "2", "ss_network_alpha": "3"}, -0.4),
        (split, header, 1.3),
        (factors(f"base_model.model.{k}", 8, 8), beside, 0.9),
        (factors(f"diffusion_model.{linear1}", 56, 9), {}, 0.25),
    )
    expected = {linear1: torch.zeros(56, 8, dtype=torch.float64), qkv: torch.zeros(24, 8, dtype=torch.float64)}

    def add(weight: str, start: int, rows: int, seed: int, factor: float) -> None:
        adapter = pair(rows, 8, seed)
        expected[weight][start : start + rows] += factor * (adapter.up.double() @ adapter.down.double())

    add(linear1, 0, 56, 1, 0.7 * 1 / 2)
    add(qkv, 0, 24, 2, -0.4 * 3 / 2)
    for number, (start, rows) in enumerate((*parts.values(), (24, 32))):
        add(linear1, start, rows, 3 + number, 1.3 * 8 / 2)
    add(qkv, *parts["v"], 7, 1.3 * 8 / 2)
    add(linear1, *parts["k"], 8, 0.9 * 4 / 2**0.5)
    add(linear1, 0, 56, 9, 0.25)

    stack = [
        Entry(from_file(TensorFile("x", tensors, metadata)), {"model": strength, "clip": 1.0})
        for tensors, metadata, strength in files
    ]
    landing = land(stack, target_map(recognise(FLUX), FLUX))
    assert all(row.coverage == 1 for row in landing.rows)
    for weight, exact in expected.items():
        found = torch.zeros(exact.shape, dtype=torch.float64)
        add_(found, landing.pieces["model", f"diffusion_model.{weight}.weight"])
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
