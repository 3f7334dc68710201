"""LoRA Ops: load, stack, land, apply and inspect LoRAs on files and tensors, without a host.

Pure torch: takes values, returns values. `python -m lora_ops` is its command line; the ComfyUI nodes stand on the
same functions.
"""
