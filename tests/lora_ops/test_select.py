"""Selectors: which places they choose, what they make of an update, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_ops.adapters import LowRank
from lora_ops.dialects import published_map, target_map
from lora_ops.errors import AdapterError, StackError
from lora_ops.families import FAMILIES, ROLES, UNKNOWN, Place, recognise
from lora_ops.landing import add_, land, merged
from lora_ops.lora import Band, Lora, Named, Target, TargetMap
from lora_ops.receipt import receipt
from lora_ops.select import Pattern, choose, parse_selectors
from lora_ops.stack import Entry
from tests.lora_ops.test_landing import FLUX

ONE = {"model": 1.0, "clip": 1.0}
LINEAR1 = "diffusion_model.single_blocks.0.linear1.weight"
FUSED = "lora_unet_single_blocks_0_linear1"
SPLIT = {  # diffusers' name of a band of linear1 -> its rows
    "transformer.single_transformer_blocks.0.attn.to_q": slice(0, 8),
    "transformer.single_transformer_blocks.0.attn.to_k": slice(8, 16),
    "transformer.single_transformer_blocks.0.attn.to_v": slice(16, 24),
    "transformer.single_transformer_blocks.0.proj_mlp": slice(24, 56),
}


SMALL = target_map(recognise(FLUX), FLUX)


@pytest.fixture
def flux():
    return SMALL


def pair(rows: int, columns: int, seed: int = 0) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rows, 2, generator=generator), torch.randn(2, columns, generator=generator), 1.0)


def of_one(module: str, adapter: LowRank) -> Lora:
    return Lora("x.safetensors", {module: adapter})


def delta(lora: Lora, blocks: str, targets: TargetMap, strength: float = 1.0) -> torch.Tensor:
    """What a LoRA with these blocks adds to linear1, by the pieces that land; float64."""
    entry = Entry(lora, {"model": strength, "clip": 1.0}, blocks=parse_selectors(blocks))
    found = torch.zeros(56, 8, dtype=torch.float64)
    for piece in land([entry], targets).pieces.get(("model", LINEAR1), ()):
        rows = found if piece.band is None else found.narrow(0, piece.band.start, piece.band.length)
        rows += piece.strength * piece.adapter.delta(tuple(rows.shape), torch.float64)
    return found


@pytest.mark.parametrize(
    ("pattern", "names", "others"),
    [
        ("a.b", ["a.b", "a.b.c"], ["a.bc", "x.a.b", "a"]),
        ("a.0-9", ["a.0", "a.9.c"], ["a.10", "a.x", "a.-1"]),
        ("a.8-11.c", ["a.8.c", "a.10.c.d", "a.11.c"], ["a.7.c", "a.12.c", "a.1.c"]),
        ("*.0-1.c", ["a.5.b.1.c", "a.0.c"], ["a.5.c", "a.10.c", "0.c"]),
        ("*", ["a", "a.b.c"], []),
        ("*attn*", ["img_attn.qkv", "attn", "a.attn"], ["img_mlp"]),
        ("*.attn.*", ["a.attn.to_q"], ["attn.to_q", "a.img_attn.to_q", "a.attn"]),
        ("*.attn", ["a.attn", "a.attn.to_q"], ["a.attn2", "attn"]),
        ("a*c", ["abc", "ac", "a.b.c", "a.b.c.d"], ["abcd", "bac"]),
        ("a*b*c", ["a.b.b.c", "abc"], ["acb"]),
        ("2-1", ["2-1", "2-1.linear"], ["1", "2"]),  # Z-Image calls a layer so
        ("a.0-1*", ["a.0-1x"], ["a.0"]),  # no component of its own, so no range
        ("a.?", ["a.?"], ["a.b"]),
        ("a+.(b", ["a+.(b"], ["aa.(b"]),
    ],
)
def test_a_pattern_means_names_and_all_below_them(pattern, names, others):
    found = Pattern.parse(pattern)
    assert [name for name in [*names, *others] if found.matches([name], "mlp")] == names


def test_a_role_means_places_of_that_role_whatever_their_name():
    assert Pattern.parse("role: mlp ").matches(["attn"], "mlp")
    assert not Pattern.parse("role:mlp").matches(["role:mlp", "mlp"], "attn")


def test_selectors_are_separated_by_commas_and_lines():
    found = parse_selectors(" a.0-9=0.5, *.b = -1e-3\n\nrole:mlp=0,,")
    assert [(each.pattern.text, each.factor) for each in found] == [("a.0-9", 0.5), ("*.b", -0.001), ("role:mlp", 0.0)]
    assert [str(each) for each in found] == ["a.0-9=0.5", "*.b=-0.001", "role:mlp=0"]
    assert parse_selectors(" \n, ") == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a", "'a' has no finite number as its factor"),
        ("a=", "no finite number"),
        ("a=50%", "no finite number"),
        ("a=nan", "no finite number"),
        ("a=1_0", "no finite number"),
        ("a=-inf", "no finite number"),
        ("a=1e999", "no finite number"),
        ("=1", "names no place"),
        ("role:attention=1", "'attention' is no role. Roles are attn, cross-attn, mlp, norm, embed, conv, text"),
        ("role:=1", "is no role"),
        (",".join(["a=1"] * 200), "201 selectors are too many: the limit is 200"),
    ],
)
def test_what_is_no_selector_is_refused(text, words):
    with pytest.raises(StackError, match=words):
        parse_selectors(f"b=1, {text}")


WORDS = st.sampled_from([*"*.-=,0129", "\n", "role:", "mlp", "double_blocks", "0-9", "img_attn", "transformer_blocks"])


@settings(deadline=None)
@given(st.one_of(st.text(), st.lists(WORDS).map("".join)))
def test_any_text_is_understood_or_a_stack_error(text):
    try:
        choose(parse_selectors(text), SMALL)
    except StackError as error:
        assert str(error)


def test_many_stars_take_no_time():
    name = "a" * 200
    assert not Pattern.parse("*a" * 100 + "b").matches([name], "mlp")


def test_overlapping_selectors_multiply_in_any_order_to_the_same_bits(flux):
    texts = ["double_blocks=0.1", "*attn*=0.3", "role:attn=0.7", "*=1.1"]
    whole = flux.names["diffusion_model.double_blocks.0.img_attn.qkv"].target
    orders = (texts, texts[::-1], texts[2:] + texts[:2])
    factors = {choose(parse_selectors(",".join(order)), flux).of(whole)[0].factor for order in orders}
    assert len(factors) == 1 and factors.pop() == pytest.approx(0.1 * 0.3 * 0.7 * 1.1)


def test_factors_that_multiply_to_no_number_are_refused(flux):
    with pytest.raises(StackError, match="multiply to inf"):
        choose(parse_selectors("*=1e200, role:mlp=1e200"), flux)


def test_all_one_lands_the_very_same_pieces(flux):
    modules = {FUSED: pair(56, 8), "transformer.norm_out.linear": pair(16, 8)}
    entry = Entry(Lora("x", modules), {"model": 0.3, "clip": 1.0})
    plain = land([entry], flux).pieces
    chosen = land([replace(entry, blocks=parse_selectors("*=1, role:mlp=1, *.to_q=1"))], flux).pieces
    assert chosen.keys() == plain.keys()
    for place, there in plain.items():
        assert [vars(piece) for piece in chosen[place]] == [vars(piece) for piece in there]


def test_factor_zero_makes_no_piece(flux):
    entry = Entry(of_one(FUSED, pair(56, 8)), ONE, blocks=parse_selectors("single_blocks=0"))
    landing = land([entry], flux)
    assert not landing.pieces and landing.rows[0].matched("model") == 1
    weight = torch.randn(56, 8)
    half = land([replace(entry, blocks=parse_selectors("role:mlp=0"))], flux)
    changed = merged(weight, half.pieces["model", LINEAR1])
    assert torch.equal(changed[24:], weight[24:]) and not torch.equal(changed[:24], weight[:24])


@pytest.mark.parametrize(
    ("blocks", "factors"),
    [
        ("role:mlp=0.3", (1, 1, 1, 0.3)),
        ("role:attn=-2", (-2, -2, -2, 1)),
        ("*.attn.to_k=0", (1, 0, 1, 1)),
        ("single_transformer_blocks.*.proj_mlp=0.3", (1, 1, 1, 0.3)),
        ("single_transformer_blocks.0-5.attn=0.3, *.to_v=0.5", (0.3, 0.3, 0.15, 1)),
        ("single_blocks.0.linear1=0.3, *.to_q=2", (0.6, 0.3, 0.3, 0.3)),
        ("diffusion_model.single_blocks=0.3", (0.3, 0.3, 0.3, 0.3)),
    ],
)
def test_a_fused_weight_is_cut_where_its_bands_get_different_factors(flux, blocks, factors):
    """Whoever wrote the file, fused or split, and whoever wrote the selectors: the update is the float64 sum."""
    fused = pair(56, 8, 1)
    exact = 0.5 * fused.up.double() @ fused.down.double()  # alpha / rank is a half
    split = {name: LowRank(fused.up[rows], fused.down, 1.0) for name, rows in SPLIT.items()}
    for factor, rows in zip(factors, SPLIT.values(), strict=True):
        exact[rows] *= 0.7 * factor
    for lora in (of_one(FUSED, fused), Lora("x", split)):
        torch.testing.assert_close(delta(lora, blocks, flux, 0.7), exact, rtol=1e-14, atol=1e-14)


def test_a_band_is_cut_again_where_another_begins_inside_it():
    outer = Target("model", "w", (24, 4), Band(8, 16), names=("outer",), role="mlp")
    inner = Target("model", "w", (24, 4), Band(16, 4), names=("inner",), role="attn")
    targets = TargetMap("unknown", {"m": Named(outer, "x")}, lambda name: (Named(outer, "x"),), (outer, inner))
    adapter = pair(16, 4)
    landing = land([Entry(of_one("m", adapter), ONE, blocks=parse_selectors("inner=0.5, role:mlp=3"))], targets)
    exact = adapter.delta((16, 4), torch.float64) * torch.tensor([3.0] * 8 + [0.5] * 4 + [3.0] * 4)[:, None]
    found = torch.zeros(24, 4, dtype=torch.float64)
    add_(found, landing.pieces["model", "w"])
    torch.testing.assert_close(found, torch.cat((torch.zeros(8, 4), exact)), rtol=1e-14, atol=1e-14)


def test_a_swapped_weight_is_swapped_and_scaled(flux):
    adapter = pair(16, 8)
    entry = Entry(of_one("transformer.norm_out.linear", adapter), ONE, blocks=parse_selectors("final_layer=0.5"))
    (pieces,) = land([entry], flux).pieces.values()
    whole = adapter.delta((16, 8))
    torch.testing.assert_close(merged(torch.zeros(16, 8), pieces), 0.5 * torch.cat((whole[8:], whole[:8])))


def test_an_update_that_cannot_be_cut_says_what_to_do(flux):
    class Whole(LowRank):
        ALGEBRA = "Whole"
        narrowed = LowRank.__bases__[0].narrowed

    lora = of_one(FUSED, Whole(*pair(56, 8).packed()))
    with pytest.raises(AdapterError, match="cannot be cut Select whole weights") as caught:
        delta(lora, "role:mlp=0", flux)
    assert (caught.value.file, caught.value.module) == ("x.safetensors", FUSED)
    assert delta(lora, "*=0.5", flux).any()


def test_alpha_is_never_touched(flux):
    entry = Entry(of_one(FUSED, pair(56, 8)), ONE, blocks=parse_selectors("role:mlp=0.3"))
    assert {piece.adapter.alpha for piece in land([entry], flux).pieces["model", LINEAR1]} == {1.0}


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("*.img_atn.*=1", "img_attn"),
        ("double_block.0=1", "double_blocks"),
        ("double_blocks.3=1", "double_blocks.0"),
        ("role:cross-attn=1", "attn, embed, mlp, norm"),
    ],
)
def test_a_selector_that_chooses_nothing_is_an_error_with_the_nearest_names(flux, text, near):
    lora = of_one(FUSED, pair(56, 8))
    with pytest.raises(StackError) as caught:
        land([Entry(lora, ONE, blocks=parse_selectors(f"*=1, {text}"))], flux)
    assert "file 'x.safetensors'" in str(caught.value) and "FLUX.1" in str(caught.value) and near in str(caught.value)
    assert str(caught.value.facts["selector"]) == text and caught.value.facts["family"] == "flux"


def part(targets: TargetMap, part: str) -> TargetMap:
    shapes = {target.key: target.shape for target in targets.targets if target.part == part}
    return target_map(recognise(shapes), shapes)


def test_places_of_a_part_that_is_not_connected_are_chosen_too():
    whole = published_map(next(family for family in FAMILIES if family.name == "sdxl"))
    for text in ("role:text=0", "text_model.encoder.layers.0-5=0", "clip_g.transformer=0"):
        choose(parse_selectors(text), part(whole, "model"))
    for text in ("role:cross-attn=0", "input_blocks.4=0", "double_blocks=0"):
        choose(parse_selectors(text), part(whole, "clip"))
    for text in ("role:text=0, text_modle=0", "t5xxl=0"):
        with pytest.raises(StackError, match="chooses nothing"):
            choose(parse_selectors(text), part(whole, "model"))


def test_without_any_model_nobody_can_tell():
    entry = Entry(of_one(FUSED, pair(56, 8)), ONE, blocks=parse_selectors("anything=0, role:mlp=1"))
    landing = land([entry], target_map(UNKNOWN, {}))
    assert landing.rows[0].chosen == (0, 0)
    assert receipt(landing, 0.0).data["rows"][0]["blocks"] == {"anything=0": 0, "role:mlp=1": 0}


def test_a_model_of_no_known_family_has_its_own_names_and_guessed_roles():
    shapes = {"diffusion_model.strange.0.to_q.weight": (8, 8), "diffusion_model.strange.0.to_k.weight": (8, 8)}
    targets = target_map(recognise(shapes), shapes)
    choice = choose(parse_selectors("strange.*.to_q=0.5, role:text=0"), targets)
    factors = [choice.of(target)[0].factor for target in targets.targets]
    assert factors == [0.5, 1.0]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_row_of_a_family_has_one_role(family):
    """Also where several places share rows: of the same size they do the same."""
    roles: dict = {}
    for target in published_map(family).targets:
        roles.setdefault((target.part, target.key, target.rows), set()).add(target.role)
        assert target.role in ROLES and (target.role == "text") == (target.part == "clip")
    assert {rows: found for rows, found in roles.items() if len(found) > 1} == {}


@pytest.mark.parametrize(
    ("role", "names"),
    [
        ("attn", "input_blocks.1.1.transformer_blocks.0.attn1.to_q, middle_block.1.proj_in, attentions.0.proj_out"),
        (
            "attn",
            "double_blocks.0.txt_attn.proj, joint_blocks.0.x_block.attn2.qkv, transformer_blocks.0.attn.to_add_out",
        ),
        ("attn", "blocks.0.self_attn.q, layers.0.attention.qkv, visual_transformer_blocks.0.self_attention.to_query"),
        ("attn", "txt_in.individual_token_refiner.blocks.0.self_attn.qkv, noise_refiner.0.attention.out"),
        ("cross-attn", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k, blocks.0.cross_attn.k_img"),
        ("cross-attn", "visual_transformer_blocks.0.cross_attention.to_query"),
        ("mlp", "transformer_blocks.0.ff.net.0.proj, transformer_blocks.0.ff_context.net.2, double_blocks.0.img_mlp.0"),
        (
            "mlp",
            "blocks.0.ffn.0, layers.0.feed_forward.w1, joint_blocks.0.context_block.mlp.fc1, single_blocks.0.linear2",
        ),
        (
            "norm",
            "double_blocks.0.img_mod.lin, single_blocks.0.modulation.lin, joint_blocks.0.x_block.adaLN_modulation.1",
        ),
        (
            "norm",
            "transformer_blocks.0.img_mod.1, norm_out.linear, adaln_single.linear, double_stream_modulation_img.lin",
        ),
        ("norm", "visual_transformer_blocks.0.visual_modulation.out_layer, transformer_blocks.0.norm1_context.linear"),
        ("embed", "time_embed.0, label_emb.0.0, time_in.in_layer, vector_in.out_layer, guidance_in.in_layer, img_in"),
        (
            "embed",
            "txt_in, time_text_embed.timestep_embedder.linear_1, x_embedder.proj, t_embedder.mlp.0, cap_embedder.1",
        ),
        (
            "embed",
            "text_embedding.0, time_projection.1, head.head, final_layer.linear, proj_out, middle_block.0.emb_layers.1",
        ),
    ],
)
def test_a_role_is_guessed_from_a_name(role, names):
    denoiser = UNKNOWN.components[0]
    for name in names.split(", "):
        assert denoiser.role(Place(f"{name}.weight", name, None), (8, 8)) == role, name
        if name != "single_blocks.0.linear2":
            assert denoiser.role(Place("x.weight", None, name), (8, 8)) == role, name


def test_shapes_tell_what_names_do_not():
    denoiser = UNKNOWN.components[0]
    assert denoiser.role(Place("input_blocks.1.0.in_layers.2.weight", "", None), (8, 8, 3, 3)) == "conv"
    assert denoiser.role(Place("input_blocks.1.0.in_layers.0.weight", "", None), (8,)) == "norm"
    assert denoiser.role(Place("conv_in.weight", "", None), (8, 4, 3, 3)) == "embed"


def test_the_receipt_tells_how_many_modules_each_selector_touched(flux):
    modules = {FUSED: pair(56, 8), "lora_unet_txt_in": pair(8, 8)}
    blocks = parse_selectors("role:mlp=0.5, *.to_q=1, double_blocks=0")
    found = receipt(land([Entry(Lora("x", modules), ONE, blocks=blocks)], flux), 0.0)
    assert found.data["rows"][0]["blocks"] == {"role:mlp=0.5": 1, "*.to_q=1": 1, "double_blocks=0": 0}
    assert "blocks: role:mlp=0.5 (1 modules), *.to_q=1 (1 modules), double_blocks=0 (0 modules)" in found.text
    assert "! x (model 1)" in found.text  # whatever double_blocks=0 was meant to change, it did not
    assert "✓ x (model 1)" in receipt(land([Entry(Lora("x", modules), ONE, blocks=blocks[:2])], flux), 0.0).text
    assert "blocks" not in receipt(land([Entry(Lora("x", modules), ONE)], flux), 0.0).text


def test_a_piece_says_what_its_selectors_put_into_its_strength(flux):
    entry = Entry(of_one(FUSED, pair(56, 8)), {"model": 0.5, "clip": 1.0}, blocks=parse_selectors("role:mlp=0.3"))
    found = [(piece.strength, piece.factor) for piece in land([entry], flux).pieces["model", LINEAR1]]
    assert found == [(0.5, 1.0), (0.5 * 0.3, 0.3)]
