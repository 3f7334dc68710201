"""The virtual environment that run.py makes once and re-uses, and the cache folder it lies in."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import IO, NamedTuple

from harness.comfy import PACK

# The newest torch matches no torchaudio, and ComfyUI needs both. Pinned here for a machine that has neither, and
# nowhere in pyproject: the pack itself runs on whatever torch its ComfyUI has.
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")


class EnvironmentFailed(Exception):
    """The environment could not be made; the message says what was tried, what was said, and what to do."""


class Layer(NamedTuple):
    """Requirements that are installed together. Complete when a file of their list lies in the environment."""

    name: str
    requirements: tuple[str, ...]

    @property
    def text(self) -> str:
        return "\n".join(self.requirements) + "\n"


def base() -> Layer:
    return Layer("base", (*TORCH, "safetensors", "numpy", *_lines(PACK / "requirements.txt")))


def test() -> Layer:
    tools = ("pytest", "ruff", "pyright", "hypothesis", "selenium")
    return Layer("test", (*tools, "diffusers", "lycoris-lora", "prodigyopt", "schedulefree", "lion-pytorch"))


def host(comfy: Path) -> Layer:
    """What this ComfyUI asks for, held to the same torch."""
    return Layer("host", (*TORCH, *_lines(comfy / "requirements.txt")))


def cache() -> Path:
    """This pack's folder among the user's caches."""
    if sys.platform == "win32":
        caches = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        caches = Path.home() / "Library" / "Caches"
    else:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "lora-ops"


def folder() -> Path:
    """Where the environment is or will be: LORA_OPS_ENV, or one for this version of Python in the cache."""
    asked = os.environ.get("LORA_OPS_ENV")
    version = f"py{sys.version_info.major}.{sys.version_info.minor}"
    return Path(asked).expanduser().absolute() if asked else cache() / version


def python(*layers: Layer) -> str:
    """A Python that has these layers: the running one if it has all their packages, else the environment's.

    Installs what the environment lacks, one run at a time. Raises EnvironmentFailed.
    """
    if all(has(layer.requirements) for layer in layers):
        return sys.executable
    place = folder()
    if not complete(place, layers):
        with lock(place.with_name(f"{place.name}.lock")):
            install(place, layers)
    return str(executable(place))


def has(requirements: Iterable[str]) -> bool:
    """Whether the running Python has a package of every name, of whatever version: it is its owner's."""
    return all(_installed(re.split(r"[^\w.-]", line, maxsplit=1)[0]) for line in requirements)


def complete(place: Path, layers: Iterable[Layer]) -> bool:
    return not _unfinished(place) and all(_stamp(place, layer) == layer.text for layer in layers)


def install(place: Path, layers: Iterable[Layer]) -> None:
    """Bring the environment to hold these layers; only while holding its lock.

    A layer's list is called lora-ops-NAME.part while pip works on it and lora-ops-NAME.txt from then on. So a .part
    that is found here was left by an install that was killed, after which pip may take half a package for a whole
    one: start anew.
    """
    if place.exists() and (_unfinished(place) or not executable(place).exists()):
        _remove(place)
    for layer in layers:
        if _stamp(place, layer) != layer.text:
            _install(place, layer)


def _install(place: Path, layer: Layer) -> None:
    part = place / f"lora-ops-{layer.name}.part"
    place.mkdir(parents=True, exist_ok=True)
    part.write_text(layer.text, encoding="utf-8")
    print(f"Installing {layer.name} ({_few(layer.requirements)}) into {place} ...", flush=True)
    started = time.monotonic()
    if not executable(place).exists():
        made = _run(sys.executable, "-m", "venv", str(place))
        if made.returncode:
            raise _failed("python -m venv", place, made)
    piped = _run(str(executable(place)), "-m", "pip", "install", "--disable-pip-version-check", "-r", str(part))
    if piped.returncode:
        if piped.returncode > 0 and "Installing collected packages" not in piped.stdout:
            part.unlink()  # pip gave up before it changed anything
        raise _failed("pip install", place, piped)
    part.replace(part.with_suffix(".txt"))
    print(f"Installed {layer.name} in {time.monotonic() - started:.0f} s.", flush=True)


def executable(place: Path) -> Path:
    return place / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


@contextlib.contextmanager
def lock(file: Path) -> Iterator[None]:
    """Hold this lock file, waiting for whoever holds it.

    The lock is the system's and goes with its holder, so a killed run leaves none behind. Where locks belong to open
    files (not on Windows) pip inherits it: an install that outlives its killed run is waited for too.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+b") as held:
        if not _try_lock(held):
            print(f"Waiting for another run that is installing ({file}) ...", flush=True)
            while not _try_lock(held):
                time.sleep(0.2)
        os.set_inheritable(held.fileno(), True)
        yield


if sys.platform == "win32":
    import msvcrt

    def _try_lock(held: IO[bytes]) -> bool:
        held.seek(0)
        try:
            msvcrt.locking(held.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
else:
    import fcntl

    def _try_lock(held: IO[bytes]) -> bool:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        close_fds=False,  # the lock stays held for as long as this lives
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


def _failed(what: str, place: Path, done: subprocess.CompletedProcess[str]) -> EnvironmentFailed:
    said = "\n".join(done.stdout.strip().splitlines()[-5:])
    return EnvironmentFailed(
        f"{what} failed for {place} (exit code {done.returncode}):\n{said}\n"
        "It needs network and some gigabytes of disk. Or run this with a Python that has the packages, "
        "such as ComfyUI's own; LORA_OPS_ENV moves the environment elsewhere."
    )


def _remove(place: Path) -> None:
    ours = _unfinished(place) or (place / "pyvenv.cfg").exists() or not any(place.iterdir())
    if not ours:
        raise EnvironmentFailed(
            f"{place} is no virtual environment and not empty, so it is left alone. "
            "Point LORA_OPS_ENV at a new folder, or unset it."
        )
    print(f"Removing {place}: the environment in it is not whole.", flush=True)
    shutil.rmtree(place)


def _unfinished(place: Path) -> bool:
    return any(place.glob("lora-ops-*.part"))


def _stamp(place: Path, layer: Layer) -> str | None:
    """The list that was last installed as this layer."""
    stamp = place / f"lora-ops-{layer.name}.txt"
    return stamp.read_text(encoding="utf-8") if stamp.is_file() else None


def _installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _lines(file: Path) -> tuple[str, ...]:
    lines = (line.split("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
    return tuple(line for line in lines if line)


def _few(requirements: tuple[str, ...]) -> str:
    return ", ".join(requirements) if len(requirements) < 9 else f"{len(requirements)} packages"
