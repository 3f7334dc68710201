"""`python -m lora_ops`: the pack's operations on files, without ComfyUI."""

from .cli import leave_threads, main

leave_threads()
raise SystemExit(main())
