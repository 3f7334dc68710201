"""The environment is made once, by one run at a time, and never taken for whole when it is not."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from harness import environment
from harness.environment import EnvironmentFailed, Layer

BASE, MORE = Layer("base", ("torch==0",)), Layer("more", ("ruff",))
ROOT = Path(environment.__file__).parents[1]


class Installer:
    """Stands in for venv and pip: notes what is asked of it and fails on demand."""

    def __init__(self):
        self.calls: list[str] = []
        self.returncode, self.said = 0, ""

    def __call__(self, *command: str) -> subprocess.CompletedProcess[str]:
        if "venv" in command:
            python = environment.executable(Path(command[-1]))
            python.parent.mkdir(parents=True)
            python.touch()
            (Path(command[-1]) / "pyvenv.cfg").touch()
            self.calls.append("venv")
            return subprocess.CompletedProcess(command, 0, "")
        self.calls.append(Path(command[-1]).read_text(encoding="utf-8"))
        return subprocess.CompletedProcess(command, self.returncode, self.said)


@pytest.fixture
def installer(monkeypatch) -> Installer:
    standing_in = Installer()
    monkeypatch.setattr(environment, "_run", standing_in)
    return standing_in


@pytest.fixture
def place(tmp_path) -> Path:
    return tmp_path / "env"


def test_layers_are_installed_once(installer, place):
    for _ in range(2):
        environment.install(place, [BASE, MORE])
    assert installer.calls == ["venv", "torch==0\n", "ruff\n"]
    assert environment.complete(place, [BASE, MORE])


def test_a_changed_list_is_installed_again_and_only_that(installer, place):
    environment.install(place, [BASE, MORE])
    newer = Layer("more", ("ruff", "pytest"))
    assert not environment.complete(place, [BASE, newer])
    environment.install(place, [BASE, newer])
    assert installer.calls[3:] == ["ruff\npytest\n"]


def test_an_environment_made_by_hand_is_adopted(installer, place):
    installer(sys.executable, "-m", "venv", str(place))
    (place / "kept").touch()
    environment.install(place, [BASE])
    assert installer.calls == ["venv", "torch==0\n"]
    assert (place / "kept").exists()


@pytest.mark.parametrize("returncode", [-9, -2], ids=["killed", "interrupted"])
def test_a_killed_install_is_not_taken_for_whole_and_is_started_anew(installer, place, returncode):
    environment.install(place, [BASE])
    (place / "half a package").touch()
    installer.returncode = returncode
    with pytest.raises(EnvironmentFailed, match=f"exit code {returncode}"):
        environment.install(place, [BASE, MORE])
    assert not environment.complete(place, [BASE])
    installer.returncode = 0
    environment.install(place, [BASE, MORE])
    assert not (place / "half a package").exists()
    assert environment.complete(place, [BASE, MORE])


@pytest.mark.parametrize(("said", "kept"), [("no network", True), ("Installing collected packages: torch", False)])
def test_a_failed_install_costs_the_environment_only_if_pip_had_begun(installer, place, said, kept):
    environment.install(place, [BASE])
    installer.returncode, installer.said = 1, said
    with pytest.raises(EnvironmentFailed, match=said):
        environment.install(place, [BASE, MORE])
    assert environment.complete(place, [BASE]) is kept


def test_a_folder_that_is_no_environment_is_never_removed(installer, place):
    place.mkdir()
    (place / "thesis.part").touch()
    with pytest.raises(EnvironmentFailed, match="left alone"):
        environment.install(place, [BASE])
    assert (place / "thesis.part").exists()


def test_the_running_python_is_used_as_it_is_if_it_has_every_package(monkeypatch, place, installer):
    monkeypatch.setenv("LORA_OPS_ENV", str(place))
    there, missing = Layer("base", ("pytest>=1", "ruff")), Layer("more", ("pytest", "lora-ops-is-on-no-index"))
    assert environment.python(there) == sys.executable
    assert environment.python(there, missing) == str(environment.executable(place))
    assert installer.calls == ["venv", there.text, missing.text]


def test_requirement_files_lose_their_comments(tmp_path):
    (tmp_path / "requirements.txt").write_text("torch\n\n# not essential:\nkornia>=0.7 # why\n", encoding="utf-8")
    assert environment.host(tmp_path).requirements == (*environment.TORCH, "torch", "kornia>=0.7")


HOLDER = """
    import subprocess, sys, time
    from pathlib import Path
    from harness import environment
    with environment.lock(Path(sys.argv[1])):
        if len(sys.argv) > 2:
            environment._run(sys.executable, "-c", f"import time; time.sleep({sys.argv[2]})")
        else:
            print("held", flush=True)
            time.sleep(60)
"""


def holder(file: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(file), *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_one_run_waits_for_another_and_a_killed_one_leaves_no_lock(tmp_path):
    file = tmp_path / "env.lock"
    other = holder(file)
    assert other.stdout.readline() == "held\n"
    with file.open("a+b") as mine:
        assert not environment._try_lock(mine)
    other.kill()
    other.wait()
    with environment.lock(file):
        pass
    other.stdout.close()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows: a lock belongs to the process, not to the open file")
def test_an_install_that_outlives_its_killed_run_is_waited_for(tmp_path):
    file = tmp_path / "env.lock"
    started = time.monotonic()
    other = holder(file, "3")
    while not file.exists():
        time.sleep(0.05)
    time.sleep(1)
    other.kill()
    other.wait()
    other.stdout.close()
    with environment.lock(file):
        assert time.monotonic() - started > 2.9
