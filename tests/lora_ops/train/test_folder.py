"""Folders of pictures as people keep them: what is found, and what is left out and why."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from lora_ops.errors import FileError, TrainingError
from lora_ops.train.folder import fingerprint, read_folder


@pytest.fixture
def put(tmp_path):
    """put("a.png", "b.txt", …): files in a folder; a text's content is its caption."""

    def write(*names: str, **texts: str):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".png":
                Image.new("RGB", (64, 64)).save(path)
            else:
                path.write_text(f"the caption of {path.stem}", encoding="utf-8")
        return tmp_path

    return write


def captions(folder) -> dict[str, str | None]:
    return {each.name: each.caption for each in read_folder(folder).sources}


def test_captions_are_beside_pictures_or_in_a_table_or_in_the_folders_name(put):
    folder = put("a.png", "a.txt", "b.png", "b.caption", "c.png", "c.png.txt", "d.png", "e.png", "10_a dog/f.png")
    (folder / "metadata.jsonl").write_text(
        "\n".join(
            json.dumps({"file_name": name, "text": f"{name} told"}) for name in ("a.png", "d.png", "sub/g.png", "h.png")
        )
    )
    put("sub/g.png")
    assert captions(folder) == {
        "a.png": "the caption of a",
        "b.png": "the caption of b",
        "c.png": "the caption of c.png",
        "d.png": "d.png told",
        "e.png": None,
        "10_a dog/f.png": "a dog",
        "sub/g.png": "sub/g.png told",
    }
    assert [each.repeats for each in read_folder(folder).sources] == [1] * 5 + [10, 1]
    assert read_folder(folder).left_out == (("h.png", "metadata.jsonl names it, but it is not there"),)


def test_masks_belong_to_pictures_and_a_picture_may_be_called_mask(put):
    folder = put("a.png", "a_mask.png", "b.png", "masks/b.png", "gas_mask.png", "5_x/c.png", "masks/5_x/c.png")
    found = {each.name: each.mask and each.mask.relative_to(folder).as_posix() for each in read_folder(folder).sources}
    assert found == {
        "a.png": "a_mask.png",
        "b.png": "masks/b.png",
        "gas_mask.png": None,
        "5_x/c.png": "masks/5_x/c.png",
    }
    assert read_folder(folder).left_out == ()


def test_whatever_is_not_used_is_named_with_the_reason(put):
    folder = put("a.png", "b.txt", "film.mp4", "other/c.png", "5_x/deep/d.png", "5_x/e.png", "masks/z.png", ".hidden")
    put("0_never/f.png")
    assert dict(read_folder(folder).left_out) == {
        "b.txt": "no picture of this name",
        "film.mp4": "no picture, or of a kind that is not read",
        "other/": "a folder that is not named like 10_name, times and caption",
        "5_x/deep/": "a folder in a folder",
        "masks/z.png": "a mask of no picture",
        "0_never/": "its name says 0 times",
    }


def controls(folder, chosen=None) -> dict[str, list[str]]:
    found = read_folder(folder, chosen).sources
    return {each.name: [path.relative_to(folder.parent).as_posix() for path in each.controls] for each in found}


def test_control_pictures_are_beside_or_in_folders_in_the_order_of_their_numbers(put):
    folder = put("in/a_1.png", "in/a_1_control.png", "in/control/a_1.png", "in/a_1.txt", "in/control/a.jpg") / "in"
    assert controls(folder) == {"a_1.png": ["in/a_1_control.png", "in/control/a_1.png"]}
    put("in/b.png", "in/control_2/b.png", "in/control_10/b.png", "in/b_control_2.png", "in/b_control_1.png")
    put("in/2_x/c.png", "in/control/2_x/c.png", "in/2_x/control/c.png", "in/2_x/d.png", "in/2_x/d_control.png")
    assert controls(folder) == {
        "a_1.png": ["in/a_1_control.png", "in/control/a_1.png"],
        "b.png": ["in/b_control_1.png", "in/b_control_2.png", "in/control_2/b.png", "in/control_10/b.png"],
        "2_x/c.png": ["in/2_x/control/c.png", "in/control/2_x/c.png"],
        "2_x/d.png": ["in/2_x/d_control.png"],
    }
    assert dict(read_folder(folder).left_out) == {"control/a.jpg": "a control picture of no picture"}


def test_a_chosen_folder_holds_one_control_picture_of_each_or_several_by_number(put):
    folder = put("in/a.png", "in/b.png", "in/b_1.png", "was/a_2.png", "was/a_1.png", "was/b.png", "was/b_1.png") / "in"
    chosen = folder.parent / "was"
    assert controls(folder, chosen) == {
        "a.png": ["was/a_1.png", "was/a_2.png"],
        "b.png": ["was/b.png"],
        "b_1.png": ["was/b_1.png"],
    }
    put("in/2_x/a.png", "was/2_x/a.png")
    assert controls(folder, chosen)["2_x/a.png"] == ["was/2_x/a.png"]
    assert not read_folder(folder, chosen).left_out and set(captions(folder)) == {
        "a.png",
        "b.png",
        "b_1.png",
        "2_x/a.png",
    }
    with pytest.raises(TrainingError, match="no control picture for 'in'.*such as a.png in it"):
        read_folder(folder, put("other/z.png") / "other")


def test_of_pairs_whose_other_half_is_missing_each_is_left_out_by_name(put):
    folder = put("a.png", "b.png", "control/a.png", "control/z.png", "z_control.png", "5_x/c.png", "5_x/control/y.png")
    assert [each.name for each in read_folder(folder).sources] == ["a.png"]
    assert dict(read_folder(folder).left_out) == {
        "b.png": "no control picture of its name",
        "z_control.png": "no control picture of its name",
        "control/z.png": "a control picture of no picture",
        "5_x/c.png": "no control picture of its name",
        "5_x/control/y.png": "a control picture of no picture",
    }


def test_a_table_leads_nowhere_outside_of_its_folder(put, tmp_path):
    folder = put("in/a.png", "b.png") / "in"
    (folder / "metadata.jsonl").write_text('{"file_name": "../b.png", "text": "x"}')
    assert captions(folder) == {"a.png": None}
    assert read_folder(folder).left_out == (("../b.png", "metadata.jsonl names it, but it is outside of the folder"),)


def test_a_caption_that_is_no_text_is_an_error_that_names_it(put):
    folder = put("a.png")
    (folder / "a.txt").write_bytes(b"\xff\x00\xfe")
    with pytest.raises(FileError, match=r"a\.txt.*no UTF-8"):
        read_folder(folder)


def test_any_change_of_a_folder_changes_its_fingerprint(put):
    folder = put("a.png", "5_x/b.png")
    seen = [fingerprint(folder)]
    assert fingerprint(folder) == seen[0]
    for change in (
        lambda: put("5_x/c.txt"),
        lambda: (folder / "a.png").write_bytes(b"other"),
        lambda: (folder / "5_x" / "b.png").unlink(),
        lambda: put("masks/5_x/b.png"),
        lambda: (folder / "masks" / "5_x" / "b.png").write_bytes(b"another"),
    ):
        change()
        seen.append(fingerprint(folder))
    assert len({str(each) for each in seen}) == len(seen)
