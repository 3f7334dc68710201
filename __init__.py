"""LoRA Ops, a ComfyUI custom node pack: load, stack, apply and inspect LoRAs, never silently wrong.

The nodes are imported when the host asks for them, so that importing this file costs and breaks nothing.
"""

import logging

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """The host's door to the nodes. The host logs a failed import without its traceback, so that is done here."""
    try:
        from .nodes import extension
    except Exception:
        logging.getLogger(__name__).exception("LoRA Ops could not be loaded")
        raise
    return extension()
