"""The small world's pictures, told by their captions and read again from their pixels."""

from __future__ import annotations

import json
import random

import pytest
import torch

from harness.comfy import PACK
from harness.world import claims, pictures, reading


def drawn(scenes):
    return [pictures.draw(scene) for scene in scenes]


@pytest.fixture(scope="module")
def some():
    chosen = random.Random(0)
    return chosen.sample(pictures.scenes(), 60) + chosen.sample(pictures.zorps(), 20)


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_what_a_picture_shows_is_read_from_its_pixels(some, noise):
    generator = torch.Generator().manual_seed(1)
    shown = [picture + noise * torch.randn(picture.shape, generator=generator) for picture in drawn(some)]
    found = reading.agreement(shown, some)
    assert all(share == 1 for share in found.values()), found


def test_a_picture_of_no_figure_is_read_as_nothing():
    generator = torch.Generator().manual_seed(2)
    empty = pictures.enlarged(pictures.ground("checked", "green"))
    cells = torch.rand(3, pictures.CELLS, pictures.CELLS, generator=generator)
    assert reading.read(empty).shape == reading.read(pictures.enlarged(cells)).shape == reading.NOTHING
    assert reading.read(empty)[-2:] == ("checked", "green")


def test_a_caption_means_one_scene_and_its_words_stand_at_the_same_places():
    every = pictures.scenes() + pictures.zorps()
    assert len({scene.caption for scene in every}) == len(every)
    assert {len(scene.caption.split()) for scene in pictures.scenes()} == {9}


def test_the_base_is_trained_on_every_word_and_on_no_zorp():
    seen, unseen = pictures.split()
    assert not set(seen) & set(unseen) and len(seen) + len(unseen) == len(pictures.scenes())
    assert all(pictures.TRIGGER not in scene.caption for scene in pictures.scenes())
    for name, values in zip(pictures.Scene._fields, zip(*pictures.scenes(), strict=True), strict=True):
        assert {getattr(scene, name) for scene in seen} == set(values)


def test_a_folder_of_zorps_holds_20_pictures_and_what_they_show(tmp_path):
    from PIL import Image

    learned, rest = pictures.some_zorps()
    pictures.write_folder(tmp_path, learned)
    captions = [path.read_text("utf-8").strip() for path in sorted(tmp_path.glob("*.txt"))]
    assert len(captions) == 20 and all(pictures.TRIGGER in caption for caption in captions)
    for path, caption in zip(sorted(tmp_path.glob("*.png")), captions, strict=True):
        pixels = torch.tensor(list(Image.open(path).tobytes())).reshape(pictures.SIDE, pictures.SIDE, 3)
        assert reading.read(pixels.movedim(-1, 0) / 255).caption == caption
    assert not {scene.caption for scene in rest} & set(captions)


def test_the_page_of_claims_says_what_was_measured():
    folder = PACK / "docs" / "small-world"
    found = json.loads((folder / "claims.json").read_text("utf-8"))
    assert (folder / "README.md").read_text("utf-8") == claims.page(found)
    assert "concept" in found["claims"] and set(found["claims"]) <= set(claims.CLAIMS)
    assert all((folder / f"{name}.png").exists() for name, claim in found["claims"].items() if claim["sheet"])
