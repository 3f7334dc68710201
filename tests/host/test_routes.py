"""What the web page asks a real server about LoRA files."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.parse

import pytest

from lora_ops.files import tensor_hash

REPORT = {"family", "dialect", "rank", "trigger_words", "trigger_words_from"}


def asked(server, **query):
    """The status and the JSON of /lora_ops/lora."""
    try:
        return 200, server.json(f"/lora_ops/lora?{urllib.parse.urlencode(query)}")
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_without_a_server_the_nodes_load_all_the_same(pack):
    """Tools import the nodes of a host that serves nobody."""
    asyncio.run(asyncio.run(pack.comfy_entrypoint()).on_load())


def test_a_file_is_told_under_a_name_from_elsewhere(server):
    status, told = asked(server, name=r"FLUX\Ink_Kohya")
    assert status == 200 and told.keys() >= REPORT
    assert (told["resolved"], told["family"]) == ("flux/ink_kohya.safetensors", "flux")
    assert (told["trigger_words"], told["trigger_words_from"]) == (["ink wash"], "modelspec.trigger_phrase")
    assert told["sha256"] == tensor_hash(server.base / "models" / "loras" / "flux" / "ink_kohya.safetensors")
    assert asked(server, name="renamed.safetensors", sha256=told["sha256"].upper()) == (200, told)


@pytest.mark.parametrize("sha256", ["abc", "0" * 63 + "x", "0" * 64 + "\n", "٠" * 64])
def test_what_is_no_hash_is_searched_for_nowhere(ours, loras, monkeypatch, sha256):
    searched = []
    monkeypatch.setattr(ours("nodes.host.names"), "_holding", lambda *asked: searched.append(asked))
    route = ours("nodes.host.routes").lora
    assert route("nowhere", sha256)[0] == 404 and not searched
    assert route("nowhere", "0" * 64)[0] == 404 and searched


def test_a_name_that_means_no_file_names_the_likely_ones(server):
    status, told = asked(server, name="flux/ink_kohia")
    assert status == 404 and "is not in models/loras" in told["error"]
    assert "flux/ink_kohya.safetensors" in told["candidates"]


@pytest.mark.parametrize("name", ["", "..", "../../../../etc/passwd", "/etc/passwd", "flux/../../secret", "\0"])
def test_no_name_leads_out_of_the_folder(server, name):
    (server.base / "models" / "secret.safetensors").write_bytes(b"{}")
    status, told = asked(server, name=name)
    assert status == 404 and str(server.base) not in json.dumps(told)


def test_a_file_that_cannot_be_read_is_told_without_its_path(server):
    bad = server.base / "models" / "loras" / "pickled.safetensors"
    bad.write_bytes(b"\x80\x04 not a LoRA")
    status, told = asked(server, name="pickled")
    bad.unlink()
    assert status == 422 and "'pickled.safetensors'" in told["error"] and "pickle" in told["error"]
    assert told["candidates"] == [] and str(server.base) not in json.dumps(told)
