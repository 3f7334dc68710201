"""Where ComfyUI is on this machine, and which one it is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

PACK = Path(__file__).absolute().parents[1]  # not resolve(): a pack linked into custom_nodes lies there too
HOME = Path.home() / "comfy" / "ComfyUI"
SOURCE = "https://github.com/comfyanonymous/ComfyUI"


class ComfyError(Exception):
    """ComfyUI is not where the user says it is."""


class NoComfy(ComfyError):
    """There is no ComfyUI and none could be fetched; the message is the reason, to go on without one."""


def find() -> Path | None:
    """The ComfyUI to run on, or None.

    COMFYUI_PATH decides alone when it is set; its value `none` stands for "act as if there is none". Otherwise
    the ComfyUI this pack is installed in, then ~/comfy/ComfyUI.

    Raises ComfyError if COMFYUI_PATH names a folder that is no ComfyUI.
    """
    asked = os.environ.get("COMFYUI_PATH", "").strip()
    if asked.lower() == "none":
        return None
    if asked:
        path = Path(asked).expanduser().absolute()
        if not is_comfy(path):
            raise ComfyError(
                f"COMFYUI_PATH is '{asked}', and that is no ComfyUI: it lacks main.py, comfy/ or "
                "comfyui_version.py. Point it at the folder that holds main.py, unset it to search the usual "
                "places, or set it to 'none' to run without ComfyUI."
            )
        return path
    around = PACK.parents[1] if PACK.parent.name == "custom_nodes" else None
    return next((path for path in (around, HOME) if path and is_comfy(path)), None)


def find_or_clone() -> Path:
    """The ComfyUI that find() knows, or a new clone in ~/comfy/ComfyUI. Raises NoComfy, without network in seconds."""
    if found := find():
        return found
    if os.environ.get("COMFYUI_PATH"):
        raise NoComfy("COMFYUI_PATH is 'none'")
    return clone()


def is_comfy(path: Path) -> bool:
    return all((path / part).exists() for part in ("main.py", "comfy", "comfyui_version.py"))


def version(path: Path) -> str:
    """What comfyui_version.py says, such as '0.33.0'; read as text, so nothing of ComfyUI is imported."""
    text = (path / "comfyui_version.py").read_text(encoding="utf-8")
    found = re.search(r"__version__\s*=\s*[\"']([^\"']+)", text)
    if not found:
        raise ComfyError(f"{path / 'comfyui_version.py'} states no __version__. Is this ComfyUI's own file?")
    return found[1]


def clone() -> Path:
    """Fetch ComfyUI into ~/comfy/ComfyUI, which appears only when it is complete. Raises NoComfy."""
    if HOME.exists():
        raise NoComfy(f"{HOME} exists and is no ComfyUI")
    if not shutil.which("git"):
        raise NoComfy("git is not installed, so ComfyUI could not be fetched")
    part = HOME.with_name(f"ComfyUI.{os.getpid()}.part")
    try:
        _git("ls-remote", SOURCE, "HEAD", timeout=10)
        HOME.parent.mkdir(parents=True, exist_ok=True)
        print(f"Fetching ComfyUI into {HOME} ...", flush=True)
        slow = ("-c", "http.lowSpeedLimit=10000", "-c", "http.lowSpeedTime=15")
        _git(*slow, "clone", "--quiet", "--depth", "1", SOURCE, str(part), timeout=900)
        part.rename(HOME)
    except OSError as error:
        raise NoComfy(f"{HOME} could not be written: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return HOME


def _git(*arguments: str, timeout: float) -> None:
    quiet = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    try:
        subprocess.run(["git", *arguments], env=quiet, timeout=timeout, check=True, capture_output=True, text=True)
    except subprocess.TimeoutExpired as error:
        raise NoComfy(f"no answer from {SOURCE} within {timeout:.0f} s") from error
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().splitlines() or ["git failed"]
        raise NoComfy(f"{SOURCE} could not be fetched: {said[-1]}") from error
