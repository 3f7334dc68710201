"""The host's node API, imported in this one place."""

from comfy_api.latest import ComfyExtension, io

__all__ = ["ComfyExtension", "io"]
