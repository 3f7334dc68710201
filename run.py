"""Set up and run everything. Needs nothing but Python 3.10 or newer.

    python run.py demo              the example workflows through a real ComfyUI, into out/; on files if there is none
    python run.py test [ARGUMENTS]  ruff, pyright and pytest, which gets the arguments
    python run.py train RECIPE [INPUT=VALUE ...] [OPTIONS]
                                    a run of Train LoRA again, without a page, on your ComfyUI and its models; RECIPE is
                                    a run's recipe.json or its LoRA, OPTIONS are ComfyUI's own (--lowvram, ...)

Environment variables: COMFYUI_PATH, the ComfyUI to run on, or `none`; LORA_OPS_ENV, where the virtual environment
goes instead of the user's cache folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from harness import comfy, environment

PACK = Path(__file__).absolute().parent
OUT = PACK / "out"


def main(arguments: list[str]) -> int:
    command, *rest = arguments or ["--help"]
    try:
        if command == "demo" and not rest:
            return demo()
        if command == "test":
            return test(rest)
        if command == "train" and rest:
            return train(rest)
    except (comfy.ComfyError, environment.EnvironmentFailed) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(__doc__)
    return 0 if command in ("-h", "--help") else 2


def demo() -> int:
    try:
        host = comfy.find_or_clone()
    except comfy.NoComfy as reason:
        print(f"Without ComfyUI ({reason}): the demo runs on files. Set COMFYUI_PATH to run the workflows.", flush=True)
        return _run(environment.python(environment.base()), "-m", "lora_ops", "demo", "--out", str(OUT))
    python = environment.python(environment.base(), environment.host(host))
    return _run(python, "-m", "harness.demo", str(host), str(OUT))


def test(arguments: list[str]) -> int:
    host = comfy.find()
    layers = [environment.base(), environment.test(), *([environment.host(host)] if host else [])]
    return _run(environment.python(*layers), "-m", "harness.checks", *arguments)


def train(arguments: list[str]) -> int:
    host = comfy.find()
    if host is None:
        raise comfy.ComfyError("No ComfyUI to train on: set COMFYUI_PATH to the folder that holds its main.py.")
    python = environment.python(environment.base(), environment.host(host))
    return _run(python, "-m", "harness.headless", "--comfy", str(host), *arguments)


def _run(*command: str) -> int:
    child = subprocess.Popen(command, cwd=PACK, env={**os.environ, "PYTHONUTF8": "1"})
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:
            pass  # the child hears it too, and may have something to keep


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
