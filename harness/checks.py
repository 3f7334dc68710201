"""What `python run.py test` does: ruff, pyright and pytest, and an account of what ran."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from harness import comfy
from harness.comfy import PACK

PYRIGHT_TIMEOUT = 300  # seconds; its first run fetches its program
# All tests in two processes that take about as long: those that have the host in theirs, and all others.
HALVES = (("tests/host",), ("tests", "--ignore=tests/host"))
ON_HOST = ("tests/host/", "tests/server/", "tests/web/")  # those that need a real ComfyUI


class Outcome(NamedTuple):
    """How one check or test ended; reason is why it was skipped, or why a check could not run."""

    name: str
    result: str  # passed, failed, skipped
    on_host: bool = False
    reason: str = ""


def main(arguments: Sequence[str]) -> int:
    """Run everything, arguments going to pytest; returns the exit status."""
    try:
        found = comfy.find()
    except comfy.ComfyError as error:
        print(f"{type(error).__name__}: {error}")
        return 1
    outcomes = [ruff(), pyright(), *pytest(arguments)]
    print("\n".join(["", *account(outcomes, found), last_line(outcomes)]), flush=True)
    return 0 if succeeded(outcomes) else 1


def ruff() -> Outcome:
    _heading("ruff check")
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=PACK)
    return Outcome("ruff", "failed" if done.returncode else "passed")


def pyright() -> Outcome:
    """Skipped, with the reason, where it cannot start: it is a Node.js program and may need network to fetch it."""
    _heading("pyright")
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    try:
        done = subprocess.run(command, cwd=PACK, capture_output=True, text=True, timeout=PYRIGHT_TIMEOUT)
    except subprocess.TimeoutExpired:
        return _no_pyright(f"no answer within {PYRIGHT_TIMEOUT} s")
    try:
        report = json.loads(done.stdout)
        errors = [found for found in report["generalDiagnostics"] if found["severity"] == "error"]
    except (ValueError, KeyError):
        said = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        return _no_pyright(said[-1])
    for error in errors:
        start = error["range"]["start"]
        print(f"{error['file']}:{start['line'] + 1}:{start['character'] + 1}: {error['message']}")
    print(f"{len(errors)} errors in {report['summary']['filesAnalyzed']} files")
    return Outcome("pyright", "failed" if errors else "passed")


def pytest(arguments: Sequence[str]) -> list[Outcome]:
    """All tests side by side, or in one process those that the arguments ask for."""
    _heading("pytest")
    groups = [arguments] if arguments or os.cpu_count() == 1 else HALVES
    with tempfile.TemporaryDirectory() as folder:
        runs = [_Run(Path(folder) / f"{number}", group) for number, group in enumerate(groups)]
        try:
            return [outcome for run in runs for outcome in run.outcomes()]
        finally:
            for run in runs:
                run.process.kill()


class _Run:
    """A pytest at work. What the first one says is shown at once, what others say when they are done."""

    def __init__(self, place: Path, arguments: Sequence[str]) -> None:
        self._report, self._said = place.with_suffix(".xml"), place.with_suffix(".txt")
        command = [sys.executable, "-m", "pytest", f"--junitxml={self._report}", *arguments]
        # Servers and tests share the cores: threads that wait without sleeping make both many times slower.
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
        with self._said.open("wb") as said:
            shown = None if place.name == "0" else said
            self.process = subprocess.Popen(command, cwd=PACK, env=environment, stdout=shown, stderr=shown)

    def outcomes(self) -> list[Outcome]:
        status = self.process.wait()
        print(self._said.read_text(encoding="utf-8", errors="replace"), end="", flush=True)
        outcomes = read_junit(self._report.read_text(encoding="utf-8")) if self._report.exists() else []
        if status and not any(outcome.result == "failed" for outcome in outcomes):
            outcomes.append(Outcome(f"pytest (exit status {status})", "failed"))
        return outcomes


def read_junit(text: str) -> list[Outcome]:
    """Every test of a pytest --junitxml report."""
    outcomes = []
    for case in ElementTree.fromstring(text).iter("testcase"):
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            result = "failed"
        else:
            result = "passed" if skipped is None else "skipped"
        place = case.get("classname", "")
        outcomes.append(
            Outcome(
                name=f"{place}.{case.get('name')}",
                result=result,
                on_host=f"{place}.".replace(".", "/").startswith(ON_HOST),
                reason="" if skipped is None else skipped.get("message", ""),
            )
        )
    return outcomes


def account(outcomes: Sequence[Outcome], found: Path | None) -> list[str]:
    """The summary for a person: what ran on the real host, what did not run and why, what failed."""
    on_host = sum(outcome.on_host and outcome.result != "skipped" for outcome in outcomes)
    if found:
        lines = [f"{on_host} tests ran on the real host, ComfyUI {comfy.version(found)}"]
    else:
        lines = ["ComfyUI not found: the host tests did not run; set COMFYUI_PATH"]
    reasons = Counter(outcome.reason for outcome in outcomes if outcome.result == "skipped")
    lines += [f"not run: {count} × {reason}" for reason, count in reasons.items()]
    lines += [f"FAILED {outcome.name}" for outcome in outcomes if outcome.result == "failed"]
    return lines


def last_line(outcomes: Sequence[Outcome]) -> str:
    count = Counter(outcome.result for outcome in outcomes)
    return f"{count['passed']} passed, {count['failed']} failed, {count['skipped']} skipped"


def succeeded(outcomes: Sequence[Outcome]) -> bool:
    """Nothing failed, and tests ran: ruff and pyright alone prove nothing."""
    tests = [o for o in outcomes if o.name not in ("ruff", "pyright")]
    return all(o.result != "failed" for o in outcomes) and any(o.result == "passed" for o in tests)


def _no_pyright(reason: str) -> Outcome:
    print(f"PYRIGHT COULD NOT RUN: {reason}. Types were not checked. It needs Node.js and, the first time, network.")
    return Outcome("pyright", "skipped", reason=f"pyright could not run: {reason}")


def _heading(what: str) -> None:
    print(f"\n── {what}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
