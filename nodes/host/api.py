"""The host's node API, imported in this one place."""

from comfy_api.latest import ComfyExtension, io
from comfy_execution.graph_utils import ExecutionBlocker

__all__ = ["ComfyExtension", "ExecutionBlocker", "io"]
