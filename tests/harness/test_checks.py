"""`python run.py test` counts what ran, and says so truthfully."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness import checks
from harness.checks import Outcome, account, last_line, read_junit, succeeded

REPORT = """<?xml version="1.0" encoding="utf-8"?>
<testsuites name="pytest tests"><testsuite name="pytest" errors="1" failures="1" skipped="2" tests="9">
<testcase classname="tests.test_lora" name="test_reads"/>
<testcase classname="tests.test_lora" name="test_lands"><failure message="no">assert 0</failure></testcase>
<testcase classname="tests.test_lora" name="test_setup"><error message="broken fixture">…</error></testcase>
<testcase classname="tests.test_lora" name="test_peers"><skipped message="no peft">…</skipped></testcase>
<testcase classname="tests.host.test_patch" name="test_patches"/>
<testcase classname="tests.host.test_gpu.TestCuda" name="test_streams"><skipped message="no CUDA">…</skipped></testcase>
<testcase classname="tests.hosted" name="test_other"/>
<testcase classname="tests.server.test_nodes" name="test_draws"/>
<testcase classname="tests.web.test_rows" name="test_drags"/>
</testsuite></testsuites>"""


def test_every_test_is_counted_once():
    outcomes = read_junit(REPORT)
    assert [outcome.result for outcome in outcomes] == [
        *("passed", "failed", "failed", "skipped", "passed", "skipped", "passed", "passed", "passed"),
    ]
    assert [outcome.on_host for outcome in outcomes] == [*[False] * 4, True, True, False, True, True]
    assert last_line(outcomes) == "5 passed, 2 failed, 2 skipped"


def test_the_account_says_what_ran_on_the_host_what_did_not_and_why(monkeypatch):
    monkeypatch.setattr(checks.comfy, "version", lambda path: "0.33.0")
    assert account(read_junit(REPORT), Path("ComfyUI")) == [
        "3 tests ran on the real host, ComfyUI 0.33.0",
        "not run: 1 × no peft",
        "not run: 1 × no CUDA",
        "FAILED tests.test_lora.test_lands",
        "FAILED tests.test_lora.test_setup",
    ]
    assert "ComfyUI not found: the host tests did not run; set COMFYUI_PATH" in account([], None)


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        ([Outcome("ruff", "passed"), Outcome("tests.a", "passed")], True),
        ([Outcome("pyright", "skipped"), Outcome("tests.a", "passed"), Outcome("tests.b", "skipped")], True),
        ([Outcome("ruff", "failed"), Outcome("tests.a", "passed")], False),
        ([Outcome("ruff", "passed"), Outcome("pyright", "passed")], False),
        ([Outcome("ruff", "passed"), Outcome("tests.b", "skipped")], False),
        ([], False),
    ],
    ids=["all passed", "pyright could not run", "ruff failed", "no tests", "all tests skipped", "nothing"],
)
def test_success_needs_tests_that_ran_and_nothing_that_failed(outcomes, expected):
    assert succeeded(outcomes) is expected


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--collect-only", []),
        ("--no-such-option", [("pytest (exit status 4)", "failed")]),
    ],
)
def test_a_pytest_that_fails_without_a_failed_test_is_a_failure(tmp_path, monkeypatch, argument, expected):
    monkeypatch.setattr(checks, "PACK", tmp_path)
    (tmp_path / "test_one.py").write_text("def test_one(): pass", encoding="utf-8")
    assert [outcome[:2] for outcome in checks.pytest([argument])] == expected


def test_all_tests_run_once_in_processes_side_by_side(tmp_path, monkeypatch, capfd):
    """Each waits for the other, which would not come if it were next."""
    monkeypatch.setattr(checks, "PACK", tmp_path)
    monkeypatch.setattr(checks.os, "cpu_count", lambda: 2)
    for folder, mine, other in (("host", "a", "b"), ("laws", "b", "a")):
        (tmp_path / "tests" / folder).mkdir(parents=True)
        (tmp_path / "tests" / folder / f"test_{folder}.py").write_text(
            "import pathlib, time\n"
            f"def test_{folder}():\n"
            f"    pathlib.Path('{mine}').touch()\n"
            f"    other, end = pathlib.Path('{other}'), time.monotonic() + 60\n"
            f"    while not other.exists() and time.monotonic() < end: time.sleep(0.01)\n"
            f"    assert other.exists()\n"
            f"    assert {folder == 'host'}\n",
            encoding="utf-8",
        )
    found = [(outcome.name.rpartition(".")[2], outcome.result) for outcome in checks.pytest([])]
    assert found == [("test_host", "passed"), ("test_laws", "failed")]
    assert "assert False" in capfd.readouterr().out


def test_pyright_that_cannot_start_is_reported_and_not_failed(monkeypatch, capsys):
    def offline(command, **_):
        return checks.subprocess.CompletedProcess(command, 1, stdout="", stderr="npm error network\nENOTFOUND")

    monkeypatch.setattr(checks.subprocess, "run", offline)
    outcome = checks.pyright()
    assert (outcome.result, outcome.reason) == ("skipped", "pyright could not run: ENOTFOUND")
    assert "PYRIGHT COULD NOT RUN: ENOTFOUND" in capsys.readouterr().out
