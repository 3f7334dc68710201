"""Training Dataset on the real host: what pictures and captions become, what is kept on disk, and what is told."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from harness import small
from harness.server import WorkflowError

IMAGES = {"folder": "none", "images": [torch.ones(1, 64, 64, 3)]}
WIDE, TALL, SQUARE = (300, 110), (110, 300), (160, 160)  # pixels


def noise(size: tuple[int, int], seed: int) -> Image.Image:
    draws = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (9, 9, 3), dtype=torch.uint8, generator=draws)
    return Image.fromarray(blocks.numpy()).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def loaded(pack, small_files):
    """The small SD1.5's VAE and CLIP, by the host's own loader. clip takes a second less for a text: it makes something
    of the tokens alone; real is the CLIP as it is."""
    import comfy.sd

    file = small_files / small.FILES["sd15"][0]
    _, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(str(file))
    quick = clip.clone()

    def encode(tokens):
        draws = torch.Generator().manual_seed(
            sum(number * token for number, (token, _) in enumerate(tokens["l"][0], 1))
        )
        return [[torch.randn(1, 77, 8, generator=draws), {"pooled_output": torch.randn(1, 8, generator=draws)}]]

    quick.encode_from_tokens_scheduled = encode
    return SimpleNamespace(clip=quick, vae=vae, real=clip)


@pytest.fixture
def place(pack, tmp_path, monkeypatch):
    """The host's folders, of our own: input with zorps of three shapes, and user."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path / "user"))
    zorps = tmp_path / "input" / "zorps"
    zorps.mkdir(parents=True)
    for number, size in enumerate((WIDE, TALL, SQUARE, WIDE)):
        noise(size, number).save(zorps / f"{number}.png")
        (zorps / f"{number}.txt").write_text(f"a zorp, number {number}, on grass")
    return SimpleNamespace(zorps=zorps, cache=tmp_path / "user" / "lora_ops" / "cache", input=tmp_path / "input")


@pytest.fixture
def run(ours, place, monkeypatch):
    """run(folder="zorps", vae=…): the node's outputs, as the host calls it, with the schema's defaults."""
    node = ours("nodes.dataset").LoraOpsDataset
    schema = node.define_schema()

    def execute(**given):
        lists = ours("nodes.dataset").LISTS
        values = {entry.id: getattr(entry, "default", None) for entry in schema.inputs if not entry.optional}
        values |= {"folder": "zorps", "resolution": "128"} | given
        wires = {name: value for name, value in values.items() if value is not None}
        node.hidden = SimpleNamespace(unique_id="1")
        found = node.execute(
            **{name: value if name in lists or isinstance(value, list) else [value] for name, value in wires.items()}
        )
        dataset, preview, report = found.result
        return SimpleNamespace(dataset=dataset, preview=preview, report=json.loads(report), text=found.ui["text"][0])

    return execute


@pytest.fixture
def silent(loaded, monkeypatch):
    """silent(): from here on nothing may be encoded."""

    def stop():
        def refused(*_, **__):
            raise AssertionError("encoded again")

        monkeypatch.setattr(loaded.vae, "encode", refused)
        monkeypatch.setattr(loaded.clip, "encode_from_tokens_scheduled", refused)

    return stop


def same(one, other) -> bool:
    """Whether two data sets hold the same, bit for bit."""
    alike = [
        all(map(torch.equal, a.latents, b.latents))
        and all(map(torch.equal, a.masks, b.masks))
        and all(torch.equal(x[0][0], y[0][0]) for x, y in zip(a.conditions, b.conditions, strict=True))
        and all(
            torch.equal(x[0][1]["pooled_output"], y[0][1]["pooled_output"])
            for x, y in zip(a.conditions, b.conditions, strict=True)
        )
        and (a.name, a.captions, a.size) == (b.name, b.captions, b.size)
        for a, b in zip(one.pictures, other.pictures, strict=True)
    ]
    return all(alike)


def test_pictures_and_captions_become_what_the_hosts_own_nodes_make_of_them(run, loaded, place):
    import nodes

    found = run(vae=loaded.vae, clip=loaded.real, mirror=True)
    first = found.dataset.pictures[0]
    assert (first.name, first.size, first.captions) == ("0.png", (64, 192), ("a zorp, number 0, on grass",))
    whole = noise(WIDE, 0).resize((192, 64), Image.Resampling.LANCZOS, box=(0, 5, 300, 105))
    pixels = torch.frombuffer(bytearray(whole.tobytes()), dtype=torch.uint8).view(1, 64, 192, 3) / 255
    (wanted,) = nodes.VAEEncode().encode(loaded.vae, pixels)
    (turned,) = nodes.VAEEncode().encode(loaded.vae, pixels.flip(2))
    assert torch.equal(first.latents[0], wanted["samples"][0])
    assert torch.equal(first.latents[1], turned["samples"][0])
    (condition,) = nodes.CLIPTextEncode().encode(loaded.real, first.captions[0])
    assert torch.equal(first.conditions[0][0][0], condition[0][0])
    assert torch.equal(first.conditions[0][0][1]["pooled_output"], condition[0][1]["pooled_output"])
    (empty,) = nodes.CLIPTextEncode().encode(loaded.real, "")
    assert found.dataset.dropout == 0.05 and torch.equal(found.dataset.empty[0][0], empty[0][0])
    assert found.report["buckets"] == [["192×64", 2], ["64×192", 1], ["128×128", 1]]
    assert "4 pictures to learn from" in found.text and "2 of 192×64" in found.text
    assert found.preview.shape[0] == 1


def test_stable_cascades_latents_are_those_of_its_own_node(run, pack):
    """Stage C's are 42 times smaller than a picture, its encoder's 32."""
    import comfy.sd
    from comfy.ldm.cascade.stage_c_coder import StageC_coder
    from comfy_extras.nodes_stable_cascade import StableCascade_StageC_VAEEncode

    draw, weights = torch.Generator().manual_seed(0), StageC_coder().state_dict()  # those are memory as it was found
    drawn = {name: 0.1 * torch.rand(each.shape, generator=draw) for name, each in weights.items() if each.ndim}
    vae = comfy.sd.VAE(sd=weights | drawn)
    image = torch.rand(1, 256, 256, 3)
    condition = [[torch.zeros(1, 77, 8), {}]]
    found = run(folder="none", images=[image], conditioning=[condition], vae=vae, resolution="256", cache=False)
    (latent,) = found.dataset.pictures[0].latents
    wanted = StableCascade_StageC_VAEEncode.execute((image * 255).round() / 255, vae, 42).result[0]["samples"][0]
    assert torch.equal(latent, wanted) and latent.shape[-2:] == (6, 6)


def test_what_was_encoded_once_comes_from_the_disk_bit_for_bit(run, loaded, place, silent):
    made = run(vae=loaded.vae, clip=loaded.clip, mirror=True)
    assert made.report["kept"] == {"latents": [0, 4], "texts": [0, 5]}
    silent()
    again = run(vae=loaded.vae, clip=loaded.clip, mirror=True)
    assert same(made.dataset, again.dataset)
    assert again.report["kept"] == {"latents": [4, 4], "texts": [5, 5]}
    assert "from the cache: 4 of 4 latents, 5 of 5 texts" in again.text
    moved = place.zorps.with_name("moved")
    place.zorps.rename(moved)
    assert same(made.dataset, run(folder="moved", vae=loaded.vae, clip=loaded.clip, mirror=True).dataset)


def test_whatever_changes_the_result_is_made_anew_and_nothing_else_is(run, loaded, place):
    run(vae=loaded.vae, clip=loaded.clip)

    def kept(**given):
        told = run(**{"vae": loaded.vae, "clip": loaded.clip} | given).report["kept"]
        return told["latents"][0], told["texts"][0]

    assert kept(trigger_word="blue") == (4, 1)
    assert kept(resolution="192", enlarge=True) == (0, 5)
    assert kept(mirror=True) == (0, 5)
    assert kept(mask_from="transparency") == (0, 5)
    assert kept(cache=False) == (0, 0)
    noise(WIDE, 9).save(place.zorps / "0.png")
    noise(TALL, 10).convert("L").save(place.zorps / "1_mask.png")
    (place.zorps / "2.txt").write_text("a zorp in the sea")
    assert kept() == (2, 4)
    skipping = loaded.clip.clone()
    skipping.clip_layer(-2)
    skipping.encode_from_tokens_scheduled = loaded.clip.encode_from_tokens_scheduled
    assert kept(clip=skipping) == (4, 0)


@pytest.mark.parametrize("part", ["vae", "clip"])
def test_another_vae_or_clip_of_one_other_weight_finds_nothing_of_the_first(run, loaded, place, ours, part):
    """And a patched one is asked each time: its weights are not those of its file."""
    run(vae=loaded.vae, clip=loaded.clip)
    caches = ours("nodes.host.caches")
    kept = {"vae": "latents", "clip": "texts"}[part]
    patcher = getattr(loaded, part).patcher
    weight = list(patcher.model.parameters())[-1]
    before = weight.detach().clone()
    with torch.inference_mode(False), torch.no_grad():
        weight.view(-1)[-1] += 1
        caches.weights.pop(patcher.model)
        assert run(vae=loaded.vae, clip=loaded.clip).report["kept"][kept][0] == 0
        weight.copy_(before)
        caches.weights.pop(patcher.model)
    assert run(vae=loaded.vae, clip=loaded.clip).report["kept"][kept][0] > 3
    name = next(name for name, each in patcher.model.named_parameters() if each is weight)
    patcher.patches[name] = []
    try:
        found = run(vae=loaded.vae, clip=loaded.clip)
        assert found.report["kept"][kept][0] == 0 and f"the {part.upper()} is patched" in found.text
    finally:
        patcher.patches.pop(name)


def test_a_cache_that_cannot_be_written_is_told_and_all_goes_on(run, loaded, place):
    made = run(vae=loaded.vae, clip=loaded.clip)
    for file in place.cache.rglob("*.safetensors"):
        file.unlink()
    for folder in place.cache.iterdir():
        folder.rmdir()
    place.cache.rmdir()
    place.cache.write_text("in the way")
    found = run(vae=loaded.vae, clip=loaded.clip)
    assert same(made.dataset, found.dataset)
    (note,) = found.report["notes"]
    assert "the cache cannot be written" in note and str(place.cache) in note and note in found.text


def test_a_read_only_cache_is_still_read(run, loaded, place, ours, monkeypatch):
    run(vae=loaded.vae, clip=loaded.clip)
    noise(WIDE, 9).save(place.zorps / "0.png")
    noise(TALL, 9).save(place.zorps / "1.png")
    tried = []

    def refused(path, *_, **__):
        tried.append(path)
        raise ours("lora_ops.errors").FileError("cannot be written: Read-only file system.", file=path)

    monkeypatch.setattr(ours("nodes.host.shelf"), "write", refused)
    found = run(vae=loaded.vae, clip=loaded.clip)
    assert found.report["kept"] == {"latents": [2, 4], "texts": [5, 5]} and len(tried) == 1
    assert "Read-only file system" in found.text


def test_a_damaged_file_of_the_cache_is_made_again(run, loaded, place, silent):
    made = run(vae=loaded.vae, clip=loaded.clip)
    files = sorted(place.cache.rglob("*.safetensors"))
    for file in files[::2]:
        file.write_bytes(file.read_bytes()[:-7])
    again = run(vae=loaded.vae, clip=loaded.clip)
    assert same(made.dataset, again.dataset)
    assert sum(kept for kept, _ in again.report["kept"].values()) == len(files) // 2
    silent()
    assert same(made.dataset, run(vae=loaded.vae, clip=loaded.clip).dataset)


def test_the_cache_stays_within_its_limit_and_the_longest_unused_go_first(ours, place, monkeypatch):
    shelf = ours("nodes.host.shelf")
    found = shelf.shelf()
    for number in range(4):
        found.put(f"{number}" * 64, {"a": torch.zeros(1000)})
    for number, file in enumerate(sorted(place.cache.rglob("*.safetensors"))):
        os.utime(file, (number, number))
    assert found.get("0" * 64) is not None  # used now
    monkeypatch.setattr(shelf, "LIMIT", 10_000)
    found.trim()
    assert [found.get(f"{n}" * 64) is not None for n in range(4)] == [True, False, False, True]


def test_cancelling_keeps_what_was_encoded_until_then(run, loaded, place, ours, monkeypatch):
    class Cancelled(Exception):
        pass

    class Meter(ours("nodes.host.progress").Meter):
        def __call__(self, done, total):
            if done == 2:
                raise Cancelled

    with monkeypatch.context() as patch:
        patch.setattr(ours("nodes.host.datasets"), "Meter", Meter)
        with pytest.raises(Cancelled):
            run(vae=loaded.vae, clip=loaded.clip)
    assert run(vae=loaded.vae, clip=loaded.clip).report["kept"] == {"latents": [2, 4], "texts": [0, 5]}


def test_what_cannot_be_used_is_left_out_by_name_and_the_rest_is_learned(run, loaded, place):
    (place.zorps / "0.png").write_bytes((place.zorps / "0.png").read_bytes()[:900])
    (place.zorps / "1.png").write_text("no picture at all")
    noise((40, 300), 5).save(place.zorps / "thin.png")
    Image.new("L", SQUARE, 0).save(place.zorps / "2_mask.png")
    (place.zorps / "film.mp4").write_bytes(b"x")
    noise(SQUARE, 6).save(place.zorps / "4.png")
    (place.zorps / "4_mask.png").write_bytes(b"damaged")
    noise(SQUARE, 6).save(place.zorps / "5.png")
    noise(WIDE, 6).save(place.zorps / "5_mask.png")
    found = run(vae=loaded.vae, clip=loaded.clip, unmasked_weight=0.0)
    assert [each.name for each in found.dataset.pictures] == ["3.png"]
    reasons = dict(found.report["left_out"])
    assert "truncated" in reasons["0.png"] and "is no picture" in reasons["1.png"]
    assert "smaller than 64×64" in reasons["thin.png"] and "mask leaves nothing" in reasons["2.png"]
    assert "4_mask.png is no picture" in reasons["4.png"] and "the mask is 300×110" in reasons["5.png"]
    assert "kind that is not read" in reasons["film.mp4"]
    assert all(name in found.text for name in reasons) and len(reasons) == 7
    with pytest.raises(Exception, match="None of the pictures") as caught:
        (place.zorps / "3.png").unlink()
        run(vae=loaded.vae, clip=loaded.clip, unmasked_weight=0.0)
    assert "0.png" in str(caught.value) and "truncated" in str(caught.value)


def test_a_mask_is_of_the_latents_size_mirrored_with_it_and_lets_a_little_through(run, loaded, place):
    mask = Image.new("L", SQUARE, 0)
    mask.paste(255, (0, 0, 80, 160))
    mask.save(place.zorps / "2_mask.png")
    found = run(vae=loaded.vae, clip=loaded.clip, mirror=True, unmasked_weight=0.2)
    (one,) = (each for each in found.dataset.pictures if each.masks)
    assert one.name == "2.png" and [each.shape for each in one.masks] == [(1, 16, 16)] * 2
    plain, turned = one.masks
    assert plain[0, 8, 0] == 1 and plain[0, 8, 15] == pytest.approx(0.2)
    assert torch.equal(turned, plain.flip(-1))
    assert found.report["masks"] == 1 and not run(vae=loaded.vae, clip=loaded.clip, mask_from="off").report["masks"]


@pytest.fixture
def pairs(place):
    """Pictures before an edit, of two of the zorps: one of its shape, larger, one of another shape as a second one."""
    for name, size in (("0", (600, 220)), ("2", SQUARE)):
        place.zorps.joinpath("control").mkdir(exist_ok=True)
        noise(size, 30).save(place.zorps / "control" / f"{name}.png")
    noise(TALL, 31).save(place.zorps / "2_control_2.png")
    return place


def cut(image, size, box) -> torch.Tensor:
    scaled = image.resize(size, Image.Resampling.LANCZOS, box=box)
    return torch.frombuffer(bytearray(scaled.tobytes()), dtype=torch.uint8).view(1, size[1], size[0], 3) / 255


def test_control_pictures_are_cut_like_their_pictures_encoded_mirrored_with_them_and_cached(run, loaded, pairs, silent):
    import nodes

    given = {"vae": loaded.vae, "clip": loaded.clip, "mirror": True}
    found = run(**given)
    first, second = found.dataset.pictures
    before = cut(noise((600, 220), 30), (192, 64), (0, 10, 600, 210))
    for controls, pixels in zip(first.controls, (before, before.flip(2)), strict=True):
        (wanted,) = nodes.VAEEncode().encode(loaded.vae, pixels)
        assert len(controls) == 1 and torch.equal(controls[0], wanted["samples"][0])
    (shaped, (wanted,)) = (
        second.controls[0],
        (nodes.VAEEncode().encode(loaded.vae, cut(noise(SQUARE, 30), (128, 128), None))),
    )
    assert len(shaped) == 2
    assert {tuple(each.shape) for each in shaped} == {(4, 16, 16), (4, 24, 8)}
    assert torch.equal(shaped[1], wanted["samples"][0])  # that beside it comes first
    reasons = dict(found.report["left_out"])
    assert reasons == {"1.png": "no control picture of its name", "3.png": "no control picture of its name"}
    assert found.report["controls"] == 2 and "2 with control pictures" in found.text
    noise((600, 220), 33).save(pairs.zorps / "control" / "0.png")
    assert run(**given).report["kept"]["latents"] == [1, 2]
    silent()
    again = run(**given)
    assert again.report["kept"]["latents"] == [2, 2]
    (kept,) = (each for each in again.dataset.pictures if each.name == "2.png")
    assert all(map(torch.equal, kept.controls[1], second.controls[1]))


def test_a_chosen_folder_of_control_pictures_and_what_is_wrong_with_one(run, loaded, place):
    was = place.input / "was"
    was.mkdir()
    given = {"vae": loaded.vae, "clip": loaded.clip, "control_folder": "was"}
    for number in range(3):
        noise(SQUARE, number).save(was / f"{number}.png")
    (was / "0.png").write_bytes((was / "0.png").read_bytes()[:900])
    (was / "1.png").write_text("none")
    found = run(**given)
    reasons = dict(found.report["left_out"])
    assert [each.name for each in found.dataset.pictures] == ["2.png"] and len(reasons) == 3
    assert "its control picture cannot be read" in reasons["0.png"] and "truncated" in reasons["0.png"]
    assert "its control picture is no picture" in reasons["1.png"] and "no control picture" in reasons["3.png"]


def test_control_pictures_over_wires_go_with_images_or_latents(run, loaded):
    images = [torch.rand(1, 64, 64, 3), torch.rand(1, 64, 128, 3)]
    wires = {"folder": "none", "images": images, "vae": loaded.vae, "clip": loaded.clip, "captions": ["x"]}
    before = [torch.rand(1, 64, 64, 3), torch.rand(1, 64, 128, 3)]
    found = run(**wires, control_images=before).dataset
    for picture, image in zip(found.pictures, before, strict=True):
        assert torch.equal(picture.controls[0][0], loaded.vae.encode((image * 255).round() / 255)[0])
    latents = [{"samples": torch.rand(2, 4, 8, 8)}]
    controls = [{"samples": torch.rand(1, 4, 8, 8)}, {"samples": torch.rand(1, 4, 8, 8)}]
    found = run(folder="none", latents=latents, captions=["x"], clip=loaded.clip, control_latents=controls).dataset
    assert [each.controls[0][0] is not None for each in found.pictures] == [True, True]
    assert torch.equal(found.pictures[1].controls[0][0], controls[1]["samples"][0])


@pytest.fixture
def seeing(loaded):
    """A stand-in for Qwen-Image's CLIP and VAE: of the host's class, quick, and it tells whatever it is given apart."""
    from comfy.text_encoders.qwen_image import QwenImageTEModel

    clip = loaded.clip.clone()
    clip.cond_stage_model = QwenImageTEModel.__new__(QwenImageTEModel)
    clip.layer_idx = clip.apply_hooks_to_conds = None

    def tokenize(text, images=(), llama_template=""):
        parts = [float(each.mean()) * (n + 1) + float(each[:, :, 0].mean()) for n, each in enumerate(images)]
        return {"text": [text, llama_template], "sees": [*map(float, parts)], "sizes": [list(i.shape) for i in images]}

    def encode(tokens):
        told = sum(map(ord, "".join(tokens["text"])))
        return [[torch.full((1, 3, 8), told + sum(tokens["sees"])), {"attention_mask": torch.ones(1, 3)}]]

    clip.tokenize, clip.encode_from_tokens_scheduled = tokenize, encode

    class Vae:
        def __getattr__(self, name):
            return getattr(loaded.vae, name)

        def encode(self, pixels):
            return torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)[:, :, None]

    return SimpleNamespace(clip=clip, vae=Vae())


@pytest.mark.parametrize("way", ["edit plus", "edit"])
def test_qwens_text_encoder_sees_the_control_pictures_as_the_hosts_own_node_shows_them(
    run, seeing, ours, way, monkeypatch
):
    from comfy_extras import nodes_qwen

    node = nodes_qwen.TextEncodeQwenImageEditPlus if way == "edit plus" else nodes_qwen.TextEncodeQwenImageEdit
    wires = {"folder": "none", "images": [torch.rand(1, 64, 64, 3)], "captions": ["make it red"]}
    before = (torch.rand(1, 128, 128, 3) * 255).round() / 255
    monkeypatch.setattr(ours("nodes.host.encoding"), "weights_key", lambda patcher: "weights")
    given = {**wires, "control_images": [before], "clip": seeing.clip, "vae": seeing.vae, "mirror": True}
    found = run(**given, control_seen=way)
    (picture,) = found.dataset.pictures
    assert not picture.controls and len(picture.latents) == 2
    for text, condition in (("make it red", picture.conditions[0]), ("", picture.empty)):
        for image, shown in zip((before, before.flip(2)), condition, strict=True):
            ((cross, options),) = node.execute(seeing.clip, text, seeing.vae, image).result[0]
            assert torch.equal(shown[0][0], cross)
            assert torch.equal(shown[0][1]["reference_latents"][0], options["reference_latents"][0])
    again = run(**given, control_seen=way)
    assert again.report["kept"] == {"latents": [1, 1], "texts": [5, 5]} and found.report["controls"] == 1
    other = run(**given, control_seen={"edit": "edit plus", "edit plus": "edit"}[way])
    assert other.report["kept"]["texts"] == [1, 5]
    error = ours("lora_ops.errors").TrainingError
    with pytest.raises(error, match="shown the control pictures"):
        latents = {"samples": torch.rand(1, 16, 1, 8, 8)}
        run(folder="none", latents=[latents], captions=["x"], control_latents=[latents], clip=seeing.clip)


def test_regularisation_pictures_have_a_weight_and_no_trigger_word_and_are_never_held_out(run, loaded, place):
    folder = place.input / "dogs" / "3_a dog"
    folder.mkdir(parents=True)
    noise(SQUARE, 20).save(folder / "a.png")
    (place.input / "dogs" / "0.png").write_text("damaged, and called like one to learn from")
    given = {"vae": loaded.vae, "clip": loaded.clip, "trigger_word": "qx", "repeats": 5, "validation": 0.3}
    found = run(**given, regularisation="dogs", regularisation_weight=0.5)
    (dog,) = (each for each in found.dataset.pictures if each.regularisation)
    assert (dog.name, dog.captions, dog.weight, dog.repeats) == ("dogs/3_a dog/a.png", ("a dog",), 0.5, 3)
    assert [name for name, _ in found.report["left_out"]] == ["dogs/0.png"]
    others = [each for each in found.dataset.pictures if not each.regularisation]
    assert len(others) == 3 and len(found.dataset.held_out) == 1
    assert all(each.captions[0].startswith("qx, a zorp") and each.repeats == 5 for each in others)
    assert "3 pictures to learn from, 1 held out, 1 for regularisation; an epoch is 18" in found.text


def test_several_resolutions_hold_each_picture_once_a_size(run, loaded, place):
    found = run(vae=loaded.vae, clip=loaded.clip, resolution="64, 128", validation=0.01)
    sizes = {}
    for each in (*found.dataset.pictures, *found.dataset.held_out):
        sizes.setdefault(each.name, []).append(each.size)
    assert sizes["0.png"] == [(64, 64), (64, 192)] and sizes["2.png"] == [(64, 64), (128, 128)]
    apart = {each.name for each in found.dataset.held_out}
    assert len(apart) == 1 and not apart & {each.name for each in found.dataset.pictures}


def test_latents_and_conditionings_of_cores_nodes_are_taken_as_they_are(run, loaded):
    from comfy_extras.nodes_dataset import MakeTrainingDataset, ResolutionBucket

    images = [torch.rand(1, 64, width, 3) for width in (64, 128, 64)]
    made = MakeTrainingDataset.execute(images, [loaded.vae], [loaded.clip], ["a", "b", "c"]).result
    plain = run(folder="none", latents=made[0], conditioning=made[1]).dataset
    bucketed = ResolutionBucket.execute(made[0], [[each] for each in made[1]]).result
    grouped = run(folder="none", latents=bucketed[0], conditioning=bucketed[1]).dataset
    for found, order in ((plain, (0, 1, 2)), (grouped, (0, 2, 1))):
        assert len(found.pictures) == 3 and found.empty is None and found.dropout == 0
        for picture, number in zip(found.pictures, order, strict=True):
            assert torch.equal(picture.latents[0], made[0][number]["samples"][0])
            assert picture.conditions == (made[1][number],) and picture.captions == () and picture.size is None
    told = run(folder="none", latents=made[0], captions=["a zorp"], clip=loaded.clip)
    assert [each.captions for each in told.dataset.pictures] == [("a zorp",)] * 3
    assert (
        "captions are never left out: that needs a CLIP"
        in run(folder="none", latents=made[0], conditioning=made[1]).text
    )


def test_images_over_a_wire_bring_captions_and_masks_or_conditionings(run, loaded):
    images = [torch.rand(2, 64, 64, 3), torch.rand(1, 64, 128, 4)]
    masks = [torch.ones(1, 64, 64), torch.zeros(1, 64, 64), torch.ones(1, 64, 128)]
    wires = {"folder": "none", "images": images, "vae": loaded.vae, "clip": loaded.clip}
    found = run(**wires, captions=["a", "b", "c"], masks=masks)
    assert [each.captions for each in found.dataset.pictures] == [("a",), ("b",), ("c",)]
    assert [float(each.masks[0].mean()) for each in found.dataset.pictures] == [1, pytest.approx(0.1), 1]
    condition = loaded.clip.encode_from_tokens_scheduled(loaded.clip.tokenize("x"))
    assert all(each.conditions == (condition,) for each in run(**wires, conditioning=[condition]).dataset.pictures)
    assert run(**wires, trigger_word="qx").dataset.pictures[0].captions == ("qx",)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"folder": "none"}, "Choose a folder"),
        ({"folder": "zorps", "images": [torch.rand(1, 64, 64, 3)]}, "from images and from folder"),
        ({"folder": "zorps", "captions": ["x"]}, "captions do not go with folder"),
        (
            {"folder": "none", "images": [torch.rand(1, 64, 64, 3)] * 3, "captions": ["x"] * 2},
            "3 pictures and 2 captions",
        ),
        ({"folder": "none", "latents": [{"samples": torch.rand(1, 4, 8, 8)}]}, "with captions or with conditionings"),
        (
            {"folder": "none", "latents": [{"samples": torch.rand(1, 4, 8, 8)}], "captions": ["x"], "mirror": True},
            "mirror",
        ),
        ({**IMAGES, "conditioning": [[[torch.zeros(1, 1, 1), {}]]], "trigger_word": "qx"}, "change captions"),
        ({**IMAGES, "conditioning": [[[torch.zeros(1, 1, 1), {}]]], "tag_orders": 2}, "change captions"),
        ({**IMAGES, "masks": [torch.ones(1, 64, 64)], "mask_from": "off"}, "mask_from is off"),
        ({**IMAGES, "resolution": ["64", "128"]}, "resolution has 2 values"),
        ({"resolution": "large"}, "is no resolution"),
        ({"resolution": "32"}, "smallest resolution is 32"),
        ({"bucket_step": 20}, "multiple of 8"),
        ({"vae": None}, "need a VAE"),
        ({"clip": None}, "need a CLIP"),
        ({"folder": "zorp"}, "There are: zorps"),
        ({"folder": "../input"}, "not below a folder"),
        ({"folder": "/etc"}, "not below a folder"),
        ({"control_folder": "gone"}, "no such folder"),
        ({"control_images": [torch.rand(1, 64, 64, 3)]}, "control_images do not go with folder"),
        ({**IMAGES, "control_images": [torch.rand(1, 64, 64, 3)] * 3}, "1 pictures and 3 control pictures"),
        ({**IMAGES, "captions": ["x"], "control_folder": "zorps"}, "goes with a folder"),
        ({"regularisation": "dogs"}, "no such folder"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_what_to_do(run, loaded, ours, given, words):
    wires = {"vae": loaded.vae, "clip": loaded.clip}
    with pytest.raises(ours("lora_ops.errors").LoraOpsError, match=words):
        run(**wires | given)


def test_the_resolution_that_a_model_was_made_for_is_told_by_its_text_encoder_and_vae(loaded, ours):
    from comfy.text_encoders.sd2_clip import SD2ClipModel

    native = ours("nodes.host.encoding").native
    sd2 = SimpleNamespace(cond_stage_model=SD2ClipModel.__new__(SD2ClipModel))
    sixteen = SimpleNamespace(latent_channels=16)
    assert native(loaded.real, loaded.vae) == 512 and native(sd2, loaded.vae) == 768
    assert native(loaded.real, sixteen) == native(None, loaded.vae) == 1024


def test_a_full_path_is_taken_below_the_hosts_folders_and_datasets_may_be_elsewhere(
    run, loaded, place, ours, tmp_path, monkeypatch
):
    import folder_paths

    folders = ours("nodes.host.folders")
    assert folders.find(str(place.zorps)) == folders.find("zorps") == place.zorps
    elsewhere = tmp_path / "elsewhere" / "cats"
    elsewhere.mkdir(parents=True)
    noise(SQUARE, 1).save(elsewhere / "a.png")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "datasets", ([str(elsewhere.parent)], set()))
    assert folders.listed() == ["none", "zorps", "cats"]
    assert folders.find("cats") == elsewhere
    (place.input / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(place.input)
    assert len(folders.listed()) < 12
    assert run(folder="linked", vae=loaded.vae, clip=loaded.clip).report["pictures"] == 1


def test_buckets_and_resolutions_give_the_model_latents_of_the_hosts_scale(run, loaded, models, ours):
    """The host's own bucket mode leaves its scaling out: there the spread was five times as large."""
    found = run(vae=loaded.vae, clip=loaded.clip, resolution="64,128").dataset
    items, _ = ours("nodes.host.training").Model(models["sd15"]).items(found)
    standard = models["sd15"].model.process_latent_in
    for item, picture in zip(items, found.pictures, strict=True):
        assert torch.equal(item.latents[0], standard(picture.latents[0][None])[0])
    raw, fed = (torch.cat([each.latents[0].flatten() for each in of]).std() for of in (found.pictures, items))
    assert fed / raw == pytest.approx(0.18215, rel=1e-4)
    assert len({item.shape for item in items}) > 1


def prompt_of(server, **given) -> dict:
    required = server.object_info()["LoraOpsDataset"]["input"]["required"]
    inputs = {
        name: options.get("default", options.get("options", [None])[0]) for name, (_, options) in required.items()
    }
    return {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": small.FILES["sd15"][0].split("/")[1]}},
        "2": {"class_type": "LoraOpsDataset", "inputs": inputs | {"vae": ["1", 2], "clip": ["1", 1]} | given},
    }


def told(entry) -> list[dict]:
    return [json.loads(output["lora_ops"][0]) for output in entry["outputs"].values() if "lora_ops" in output]


def test_through_the_server_a_changed_folder_is_read_again_and_an_unchanged_one_is_not(server):
    folder = server.base / "input" / "served"
    folder.mkdir()
    noise(WIDE, 1).save(folder / "a.png")
    prompt = prompt_of(server, folder="served", resolution="128", trigger_word="qx", validation=0.5)
    assert "served" in server.object_info()["LoraOpsDataset"]["input"]["required"]["folder"][1]["options"]
    (first,) = told(server.post(prompt))
    assert (first["pictures"], first["captions"]) == (1, {"written": 0, "without": ["a.png"], "trigger": "qx"})

    def ran(entry) -> bool:
        (cached,) = [data["nodes"] for event, data in entry["status"]["messages"] if event == "execution_cached"]
        return "2" not in cached

    assert not ran(server.post(prompt))
    (folder / "a.txt").write_text("a dog")
    entry = server.post(prompt)
    assert ran(entry) and told(entry)[0]["captions"]["written"] == 1
    noise(TALL, 2).save(folder / "b.png")
    (grown,) = told(server.post(prompt))
    assert (grown["pictures"], grown["held_out"], grown["kept"]["latents"]) == (1, 1, [1, 2])
    before = server.base / "input" / "before"
    before.mkdir()
    noise(WIDE, 3).save(before / "a.png")
    paired = prompt | {"2": {**prompt["2"], "inputs": prompt["2"]["inputs"] | {"control_folder": "before"}}}
    (first,) = told(server.post(paired))
    assert (first["controls"], first["left_out"]) == (1, [["b.png", "no control picture of its name"]])
    assert not ran(server.post(paired))
    noise(TALL, 4).save(before / "b.png")
    entry = server.post(paired)
    assert ran(entry) and told(entry)[0]["controls"] == 2


def test_through_the_server_a_missing_or_empty_folder_says_what_there_is(server):
    empty = server.base / "input" / "empty" / "other"
    empty.mkdir(parents=True)
    with pytest.raises(WorkflowError, match="no such folder of pictures"):
        server.post(prompt_of(server, folder="gone"))
    with pytest.raises(WorkflowError, match="no such folder of pictures"):
        server.post(prompt_of(server, folder="empty", control_folder="gone"))
    with pytest.raises(WorkflowError, match="The folder 'empty' holds no picture. It holds other/"):
        server.post(prompt_of(server, folder="empty"))
