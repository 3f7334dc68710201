"""The ComfyUI that is meant is the one that is found."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from harness import comfy


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """A machine on which nothing is in its usual place."""
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(comfy, "HOME", tmp_path / "home" / "ComfyUI")
    monkeypatch.setattr(comfy, "PACK", tmp_path / "lora-ops")
    return tmp_path


def install(path: Path) -> Path:
    (path / "comfy").mkdir(parents=True)
    (path / "main.py").touch()
    (path / "comfyui_version.py").write_text('# generated\n__version__ = "0.33.0"\n', encoding="utf-8")
    return path


def test_nothing_is_found_where_nothing_is(elsewhere):
    assert comfy.find() is None


def test_the_path_of_the_user_wins_over_the_pack_s_own_host_and_that_over_home(elsewhere, monkeypatch):
    home = install(comfy.HOME)
    assert comfy.find() == home
    around = install(elsewhere / "around")
    monkeypatch.setattr(comfy, "PACK", around / "custom_nodes" / "lora-ops")
    assert comfy.find() == around
    asked = install(elsewhere / "asked")
    monkeypatch.setenv("COMFYUI_PATH", str(asked))
    assert comfy.find() == asked
    assert comfy.version(asked) == "0.33.0"


def test_a_wrong_path_is_an_error_and_not_a_search(elsewhere, monkeypatch):
    install(comfy.HOME)
    monkeypatch.setenv("COMFYUI_PATH", str(elsewhere))
    with pytest.raises(comfy.ComfyError, match="is no ComfyUI") as raised:
        comfy.find_or_clone()
    assert not isinstance(raised.value, comfy.NoComfy)


def test_none_means_none_and_fetches_nothing(elsewhere, monkeypatch):
    install(comfy.HOME)
    monkeypatch.setenv("COMFYUI_PATH", "none")
    monkeypatch.setattr(comfy, "clone", lambda: pytest.fail("cloned"))
    assert comfy.find() is None
    with pytest.raises(comfy.NoComfy):
        comfy.find_or_clone()


def test_a_clone_appears_only_when_it_is_complete(elsewhere, monkeypatch):
    def git(*arguments, timeout):
        if "clone" in arguments:
            install(Path(arguments[-1]))
            assert not comfy.HOME.exists()

    monkeypatch.setattr(comfy, "_git", git)
    assert comfy.find_or_clone() == comfy.HOME
    assert comfy.is_comfy(comfy.HOME)


@pytest.mark.parametrize("fails_at", ["ls-remote", "clone"])
def test_a_clone_that_fails_gives_the_reason_and_leaves_nothing(elsewhere, monkeypatch, fails_at):
    def run(command, **_):
        if fails_at in command:
            if fails_at == "clone":
                install(Path(command[-1]))
            raise subprocess.CalledProcessError(128, command, stderr="…\nfatal: Could not resolve host\n")

    monkeypatch.setattr(comfy.subprocess, "run", run)
    with pytest.raises(comfy.NoComfy, match="fatal: Could not resolve host"):
        comfy.find_or_clone()
    assert list(comfy.HOME.parent.glob("*")) == []
