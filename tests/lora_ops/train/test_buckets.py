"""Buckets: laws of the sizes that pictures are cut to."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_ops.train.buckets import LONGEST, Size, box, bucket, lost, sizes

SIDES = st.integers(64, 6000)
PICTURES = st.builds(Size, SIDES, SIDES)
RESOLUTIONS = st.sampled_from([(512, 64), (768, 32), (1024, 64), (64, 64)])


@given(PICTURES, RESOLUTIONS, st.booleans(), st.booleans())
def test_a_bucket_has_sides_of_steps_and_no_more_pixels_than_the_resolution(picture, resolution, aspects, enlarge):
    side, step = resolution
    found = bucket(picture, side, step, aspects=aspects, enlarge=enlarge)
    assert found is not None
    assert found.height % step == found.width % step == 0 < min(found)
    assert found.height * found.width <= side**2 and max(found) <= LONGEST * side
    if not aspects:
        assert found.height == found.width
    if not enlarge:
        assert found.height <= picture.height and found.width <= picture.width


@given(PICTURES, RESOLUTIONS)
def test_what_is_cut_out_is_inside_the_picture_in_its_middle_and_of_the_buckets_shape(picture, resolution):
    found = bucket(picture, *resolution, enlarge=True)
    left, top, right, bottom = box(picture, found)
    assert left >= -1e-6 and top >= -1e-6
    assert left + right == pytest.approx(picture.width) and top + bottom == pytest.approx(picture.height)
    assert (right - left) / (bottom - top) == pytest.approx(found.width / found.height)
    assert min(left, top) == pytest.approx(0, abs=1e-6)  # one of the sides is whole
    assert 0 <= lost(picture, found) + 1e-9 < 1


@given(PICTURES, RESOLUTIONS)
def test_a_turned_picture_has_a_turned_bucket(picture, resolution):
    found = bucket(picture, *resolution, enlarge=True)
    turned = bucket(Size(picture.width, picture.height), *resolution, enlarge=True)
    across = math.log(found.width / found.height)
    assert math.log(turned.height / turned.width) == pytest.approx(across)


def test_the_sizes_of_common_resolutions():
    """As sd-scripts and others list them."""
    assert {Size(1024, 1024), Size(832, 1216), Size(1216, 832), Size(768, 1344)} <= set(sizes(1024, 64))
    assert bucket(Size(3000, 4000), 1024, 64) == Size(896, 1152)
    assert bucket(Size(3000, 4000), 1024, 64, aspects=False) == Size(1024, 1024)


def test_a_small_picture_keeps_its_size_and_one_below_a_step_has_none():
    assert bucket(Size(500, 700), 1024, 64) == Size(448, 640)
    assert bucket(Size(500, 700), 1024, 64, enlarge=True) == Size(832, 1216)
    assert bucket(Size(500, 700), 1024, 64, aspects=False) == Size(448, 448)
    assert bucket(Size(63, 700), 1024, 64) is None
