"""Patch, live and schedules through a real server: the pictures and what the receipts say of them."""

from __future__ import annotations

import copy
import io
import json

import numpy as np
import pytest
from PIL import Image

from harness import demo
from harness.server import Server, WorkflowError
from tests.server.test_nodes import FLUX, STACK, node_of, picture, receipts, stacked, without_loras


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png))).astype(int)


def scheduled(prompt: dict, mode: str = "auto", **row) -> dict:
    text = json.dumps({"version": 1, "rows": [{"lora": "ink_kohya", "strength": 1.0, "clip": 0.0, **row}]})
    changed = stacked(prompt, text)
    node_of(changed, "LoraOpsStack")["inputs"]["mode"] = mode
    return changed


@pytest.fixture(scope="module")
def sd15(example):
    found = example(STACK)
    node_of(found, "KSampler")["inputs"]["steps"] = 4
    return found


@pytest.fixture(scope="module")
def flux(example):
    return example(FLUX)


def in_mode(prompt: dict, mode: str, kind: str) -> dict:
    changed = copy.deepcopy(prompt)
    node_of(changed, kind)["inputs"]["mode"] = mode
    return changed


def test_patch_and_live_make_the_same_picture(server, sd15, flux):
    for prompt, kind in ((sd15, "LoraOpsStack"), (flux, "LoraOpsApply")):
        patch, live = (pixels(picture(server, in_mode(prompt, mode, kind))) for mode in ("patch", "live"))
        plain = pixels(picture(server, without_loras(prompt, kind)))
        # float32 in another order, rounded to 256 levels: an entry on the edge may fall to the other side
        assert abs(patch - live).max() <= 1 < abs(patch - plain).max()


def test_a_text_encoder_alone_runs_live_as_it_patches(server, sd15):
    prompt = stacked(sd15, "<lora:ink_kohya:0:3>")
    patch, live = (pixels(picture(server, in_mode(prompt, mode, "LoraOpsStack"))) for mode in ("patch", "live"))
    plain = pixels(picture(server, without_loras(sd15, "LoraOpsStack")))
    assert abs(patch - live).max() <= 1 < abs(patch - plain).max()


def test_the_receipt_says_which_mode_and_why(server, sd15):
    def modes(prompt):
        return [found["mode"] for found in receipts(server.post(prompt)) if "rows" in found][-1]

    assert modes(scheduled(sd15, clip=1.0)) == {"model": "patch", "clip": "patch"}
    assert modes(scheduled(sd15, "live", clip=1.0)) == {"model": "live", "clip": "live"}
    for mode in ("auto", "patch"):
        assert modes(scheduled(sd15, mode, start=0.5)) == {"model": "live, for the schedule"}


def test_a_schedule_switches_the_lora_on_and_off_while_sampling(server, sd15):
    whole = picture(server, scheduled(sd15, "live"))
    none = picture(server, without_loras(sd15, "LoraOpsStack"))
    assert picture(server, scheduled(sd15, schedule=[[0, 1], [1, 1]])) == whole
    assert picture(server, scheduled(sd15, schedule=[[0.3, 0.0]])) == none
    late, early = picture(server, scheduled(sd15, start=0.5)), picture(server, scheduled(sd15, end=0.5))
    assert len({whole, none, late, early}) == 4
    assert picture(server, scheduled(sd15, strength=2.0, schedule=[[0, 0.5]])) == whole
    # the schedule of one prompt must not stay for the next
    assert picture(server, scheduled(sd15, "live")) == whole and picture(server, scheduled(sd15, end=0.5)) == early


def test_a_scheduled_row_is_not_lost_on_a_lora_stack_wire(server, sd15):
    prompt = scheduled(sd15, start=0.5)
    name = next(name for name, node in prompt.items() if node["class_type"] == "LoraOpsStack")
    prompt["91"] = {"class_type": "LoraOpsTriggerWords", "inputs": {"lora_stack": [name, 2]}}
    prompt["92"] = {"class_type": "PreviewAny", "inputs": {"source": ["91", 0]}}
    with pytest.raises(WorkflowError, match="LORA_STACK cannot carry"):
        server.post(prompt)


@pytest.mark.parametrize(("stored", "why"), [("fp8_e4m3fn", "float8_e4m3fn"), ("fp8_e5m2", "float8_e5m2")])
def test_on_an_fp8_base_auto_runs_live(server, flux, stored, why):
    coarse = copy.deepcopy(flux)
    node_of(coarse, "UNETLoader")["inputs"]["weight_dtype"] = stored
    entry = server.post(in_mode(coarse, "auto", "LoraOpsApply"))
    (told,) = [found for found in receipts(entry) if "rows" in found]
    assert told["mode"] == {"model": f"live, its weights are {why}"}
    auto, live, patch = (picture(server, in_mode(coarse, mode, "LoraOpsApply")) for mode in ("auto", "live", "patch"))
    plain = picture(server, without_loras(coarse, "LoraOpsApply"))
    assert server.images(entry) == [auto] and auto == live and len({live, patch, plain}) == 3


def test_on_a_bf16_base_every_mode_makes_a_picture(comfy_path, small_files, tmp_path, sd15):
    demo.write_samples(small_files, tmp_path / "models" / "loras")
    with Server(comfy_path, tmp_path, models=small_files, arguments=("--bf16-unet", "--disable-metadata")) as half:
        pictures = {mode: picture(half, in_mode(sd15, mode, "LoraOpsStack")) for mode in ("auto", "patch", "live")}
        plain = picture(half, without_loras(sd15, "LoraOpsStack"))
    assert pictures["auto"] == pictures["patch"] and len({*pictures.values(), plain}) == 3
