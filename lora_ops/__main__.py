"""`python -m lora_ops`: the pack's operations on files, without ComfyUI."""

from .cli import main

raise SystemExit(main())
