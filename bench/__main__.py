"""`python -m bench {apply,merge,train} [ARGUMENTS]`: finds ComfyUI and measures in a child process."""

from __future__ import annotations

import os
import subprocess
import sys

from harness import comfy
from harness.comfy import PACK

BENCHES = ("apply", "merge", "train")


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in BENCHES:
        print(f"python -m bench {{{','.join(BENCHES)}}} [--help]")
        return 2
    host = comfy.find()
    if host is None:
        print("ComfyUI not found: set COMFYUI_PATH.")
        return 1
    name, *rest = arguments
    command = [sys.executable, "-m", f"bench.{name}", "--comfy", str(host), *rest]
    return subprocess.run(command, cwd=PACK, env={**os.environ, "OMP_WAIT_POLICY": "passive"}).returncode


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
