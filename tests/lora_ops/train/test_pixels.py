"""Pixels: pictures of every kind, upright and cut; damaged ones are named."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from lora_ops.errors import FileError
from lora_ops.train import pixels
from lora_ops.train.buckets import Size
from lora_ops.train.pixels import cut, cut_mask, of_mask, of_tensor, opacity, read_pixels, sheet, thumb

RED, BLUE = (255, 0, 0), (0, 0, 255)


def halves(mode: str = "RGB") -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", (128, 64), RED)
    image.paste(BLUE, (64, 0, 128, 64))
    return image.convert(mode)


def saved(image: Image.Image, path, **more):
    image.save(path, **more)
    return read_pixels(path)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK"])
def test_a_picture_of_any_mode_is_the_same_picture(tmp_path, mode):
    found = cut(saved(halves(mode), tmp_path / ("a.tif" if mode == "CMYK" else "a.png")), Size(64, 128))
    wanted = cut(saved(halves(), tmp_path / "b.png"), Size(64, 128))
    assert found.shape == (1, 64, 128, 3)
    assert torch.equal(found, wanted)


def test_sixteen_bits_are_not_cut_off_at_eight(tmp_path):
    wide = Image.new("I;16", (64, 64), 32896)  # 128 of 255
    assert cut(saved(wide, tmp_path / "a.png"), Size(64, 64)).unique().tolist() == [pytest.approx(128 / 255)]


def test_a_picture_that_the_camera_took_on_its_side_stands_up(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    found = saved(halves(), tmp_path / "a.jpg", exif=exif, quality=100, subsampling=0)
    assert found.size == Size(128, 64) == Size(found.image.height, found.image.width)
    above, below = cut(found, Size(128, 64))[0, [8, 120], 32]
    assert above[0] > 0.9 > 0.1 > above[2] and below[2] > 0.9


def test_what_is_transparent_is_white_and_a_mask_on_request(tmp_path):
    image = halves("RGBA")
    image.putalpha(Image.new("L", image.size, 255))
    assert opacity(saved(image, tmp_path / "opaque.png")) is None
    alpha = Image.new("L", image.size, 255)
    alpha.paste(0, (0, 0, 64, 64))
    image.putalpha(alpha)
    found = saved(image, tmp_path / "clear.png")
    assert cut(found, Size(64, 128))[0, 32, [10, 120]].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert cut_mask(opacity(found), found.size, Size(64, 128))[0, 0, 32, [10, 120]].tolist() == [0, 1]


def test_a_mask_is_cut_like_its_picture_whatever_its_size_and_refused_in_another_shape():
    mask = of_mask(torch.cat([torch.zeros(32, 32), torch.ones(32, 32)], 1))
    found = cut_mask(mask, Size(64, 128), Size(64, 64))
    assert found.shape == (1, 1, 64, 64) and found[0, 0, 32, [8, 56]].tolist() == [0, 1]
    with pytest.raises(FileError, match="the mask is 64×32, the picture 64×64"):
        cut_mask(mask, Size(64, 64), Size(64, 64))


def test_the_middle_of_a_picture_is_kept():
    picture = torch.zeros(64, 192, 3)
    picture[:, 64:128] = 1
    assert cut(of_tensor(picture), Size(64, 64)).min() == 1


def test_damaged_files_are_named(tmp_path):
    whole = tmp_path / "whole.png"
    Image.effect_noise((64, 64), 50).save(whole)
    torn = tmp_path / "torn.png"
    torn.write_bytes(whole.read_bytes()[:500])
    with pytest.raises(FileError, match=r"torn\.png.*truncated"):
        read_pixels(torn).image  # noqa: B018
    other = tmp_path / "other.png"
    other.write_text("<html>")
    with pytest.raises(FileError, match=r"other\.png.*is no picture"):
        read_pixels(other)
    with pytest.raises(FileError, match="No such file"):
        read_pixels(tmp_path / "gone.png")


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(pixels, "LARGEST", 1000)
    with pytest.raises(FileError, match="million pixels"):
        saved(halves(), tmp_path / "a.png")


def test_a_sheet_shows_every_picture_and_dims_what_a_mask_leaves_out():
    white, mask = torch.ones(1, 64, 64, 3), torch.zeros(1, 8, 8)
    mask[:, :, 4:] = 1
    one = thumb(white, mask, "a caption that is a good deal longer than a thumbnail is wide " * 9)
    assert one.image.getpixel((10, 50))[0] < 100 < 250 < one.image.getpixel((180, 50))[0]
    black = torch.zeros(1, 32, 32, 3)
    pair = thumb(white, None, "", [black, black])  # of the picture's height, in their order
    assert pair.image.width == 3 * pair.image.height
    assert pair.image.getpixel((120, 20))[0] < 9 and pair.image.getpixel((140, 20))[0] > 250
    whole = sheet([one] * 7)
    assert whole.shape[0] == 1 and whole.shape[3] == 3 and whole.shape[2] > 3 * pixels.THUMB
    assert sheet([]).shape[3] == 3
