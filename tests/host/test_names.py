"""Which file a name means: from another system, after a move, after a rename."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
import time
import unicodedata

import pytest

from lora_ops.files import tensor_hash

INK = os.path.join("style", "ink.safetensors")


@pytest.fixture
def names(ours, loras, monkeypatch):
    """The pack's names, with nothing remembered."""
    monkeypatch.setattr(ours("nodes.host.caches"), "_hashes", {})
    monkeypatch.setattr(ours("nodes.host.caches"), "_stated", {})
    return ours("nodes.host.names")


@pytest.fixture
def hashed(ours, monkeypatch):
    """The names of the files whose tensors are hashed, as it happens."""
    files, done = ours("lora_ops.files"), []
    whole = files.tensor_hash
    monkeypatch.setattr(files, "tensor_hash", lambda path: (done.append(os.path.basename(path)), whole(path))[1])
    return done


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("style/ink.safetensors", ""),
        (r"style\ink.safetensors", ""),
        ("style/ink", ""),
        (r"Style\INK.SafeTensors", r"Style\INK.SafeTensors"),
        ("ink", "ink"),
        ("ink.safetensors", "ink.safetensors"),
        ("old/place/ink", "old/place/ink"),
        (r"C:\loras\Ink.safetensors", r"C:\loras\Ink.safetensors"),
    ],
)
def test_a_lora_is_found_under_every_name_that_means_it(names, loras, name, asked):
    assert names.find(name) == names.Found(INK, str(loras / "style" / "ink.safetensors"), asked)


def test_of_two_files_the_better_meant_one_is_found(names, loras):
    for name in ("style/Ink.safetensors", "ink.safetensors", "ink.safetensors.safetensors"):
        shutil.copy(loras / "a" / "twin.safetensors", loras / name)
    for name in ("style/Ink.safetensors", "style/ink.safetensors", "ink.safetensors"):
        assert names.find(name).name == os.path.join(*name.split("/"))


def test_a_name_with_accents_from_a_mac_is_found(names, loras):
    shutil.copy(loras / "a" / "twin.safetensors", loras / unicodedata.normalize("NFC", "été.safetensors"))
    assert names.find(unicodedata.normalize("NFD", "été.safetensors")).name == unicodedata.normalize(
        "NFC", "été.safetensors"
    )


@pytest.mark.parametrize(
    ("name", "words", "candidates"),
    [
        ("twin", "means 2 files", ["a/twin.safetensors", "b/twin.safetensors"]),
        ("style/inc", "Did you mean style/ink.safetensors", ["style/ink.safetensors"]),
        ("nowhere", "is not in models/loras", []),
        ("../../etc/passwd", "is not in models/loras", []),
        ("/etc/passwd", "is not in models/loras", []),
        ("x\0y", "is not in models/loras", []),
        ("", "is not in models/loras", []),
    ],
)
def test_a_name_that_means_no_lora_or_several_is_an_error_that_lists_them(ours, names, name, words, candidates):
    with pytest.raises(ours("lora_ops.errors").FileError, match=words) as caught:
        names.find(name)
    assert caught.value.facts["candidates"] == candidates
    assert words in ours("nodes.loading").LoraOpsLoad.validate_inputs(lora_name=name)


@pytest.mark.parametrize("node", ["nodes.stacking.LoraOpsStack", "nodes.saving.LoraOpsMergeFiles"])
def test_a_row_is_searched_for_beside_the_servers_loop(node, ours, names, monkeypatch, loras):
    """A search by content reads files for seconds; the server answers meanwhile."""
    module, _, name = node.rpartition(".")
    validate, found, answered = getattr(ours(module), name).validate_inputs, names.find, []

    async def loop():
        going_on = threading.Event()

        def find(*asked):
            assert going_on.wait(60)  # which only the loop sets
            return found(*asked)

        monkeypatch.setattr(names, "find", find)
        asyncio.get_running_loop().call_soon(going_on.set)
        answered.append(await validate(stack="<lora:ink:1>"))
        answered.append(await validate(stack="<lora:nowhere:1>"))

    asyncio.run(loop())
    assert answered[0] is True and "is not in models/loras" in answered[1]


def test_a_renamed_file_is_found_by_its_tensors(names, loras):
    sha256 = tensor_hash(loras / "b" / "twin.safetensors")
    (loras / "b" / "twin.safetensors").rename(loras / "style" / "unlike.safetensors")
    assert names.find("c/twin", sha256).name == os.path.join("a", "twin.safetensors")  # a name that means one file
    (loras / "a" / "twin.safetensors").rename(loras / "a" / "other.safetensors")
    found = names.find("b/twin", sha256)
    assert (found.name, found.asked) == (os.path.join("style", "unlike.safetensors"), "b/twin")


def test_of_two_files_of_one_name_the_tensors_decide(ours, names, loras):
    for folder in ("a", "b"):
        assert names.find("twin", tensor_hash(loras / folder / "twin.safetensors")).name.startswith(folder)
    with pytest.raises(
        ours("lora_ops.errors").FileError, match="means 2 files.*No file there has the tensors"
    ) as caught:
        names.find("twin", "0" * 64)
    assert caught.value.facts["candidates"] == ["a/twin.safetensors", "b/twin.safetensors"]


def test_a_header_that_states_the_hash_saves_the_others_from_being_hashed(ours, names, loras, hashed):
    files = ours("lora_ops.files")
    ink = files.read(loras / "style" / "ink.safetensors").tensors
    sha256 = tensor_hash(loras / "style" / "ink.safetensors")
    (loras / "style" / "ink.safetensors").unlink()
    files.write(loras / "a" / "zzz.safetensors", ink, {"sshs_model_hash": sha256}, overwrite=False)
    twin = files.read(loras / "a" / "twin.safetensors").tensors
    files.write(loras / "ink_stale.safetensors", twin, {"sshs_model_hash": sha256}, overwrite=False)
    assert names.find("ink", sha256).name == os.path.join("a", "zzz.safetensors")
    assert hashed == ["ink_stale.safetensors", "zzz.safetensors"]  # a header is not believed
    assert names.find("ink", sha256) and len(hashed) == 2


def test_a_search_ends_in_time_and_the_next_one_goes_on(ours, names, loras, hashed, monkeypatch):
    sha256 = tensor_hash(loras / "style" / "ink.safetensors")
    (loras / "style" / "ink.safetensors").rename(loras / "unlike.safetensors")
    files, hash_now = ours("lora_ops.files"), ours("lora_ops.files").tensor_hash
    monkeypatch.setattr(files, "tensor_hash", lambda path: (time.sleep(0.3), hash_now(path))[1])
    monkeypatch.setattr(names, "SEARCH_SECONDS", 0.2)
    for number in (1, 2):
        with pytest.raises(ours("lora_ops.errors").FileError, match="run again to go on"):
            names.find("twins", sha256)
        assert len(hashed) == number
    assert names.find("twins", sha256).name == "unlike.safetensors"


def test_in_an_empty_folder_nothing_is_found(ours, names, loras):
    shutil.rmtree(loras)
    loras.mkdir()
    with pytest.raises(ours("lora_ops.errors").FileError, match="is not in models/loras"):
        names.find("ink", "0" * 64)


def test_what_is_no_lora_does_not_stop_a_search(names, loras):
    (loras / "aaa.safetensors").write_bytes(b"\x80\x04 a pickle")
    sha256 = tensor_hash(loras / "style" / "ink.safetensors")
    (loras / "style" / "ink.safetensors").rename(loras / "unlike.safetensors")
    assert names.find("aab", sha256).name == "unlike.safetensors"


def test_a_changed_sidecar_runs_a_node_again(ours, names, loras):
    load, stack = ours("nodes.loading").LoraOpsLoad, ours("nodes.stacking").LoraOpsStack
    before = load.fingerprint_inputs(lora_name="ink"), stack.fingerprint_inputs(stack="<lora:ink:1>")
    wired = names.fingerprint_of_all()
    assert before == (load.fingerprint_inputs(lora_name="ink"), stack.fingerprint_inputs(stack="<lora:ink:1>"))
    (loras / "style" / "ink.txt").write_text("sumi-e")
    after = load.fingerprint_inputs(lora_name="ink"), stack.fingerprint_inputs(stack="<lora:ink:1>")
    assert before[0] != after[0] and before[1] != after[1] and wired != names.fingerprint_of_all()
