"""What the pack's web page asks the server: what a LoRA is. Names only, no paths."""

from __future__ import annotations

import asyncio
import re
from typing import Any

from aiohttp import web
from server import PromptServer

from ...lora_ops.errors import FileError, LoraOpsError
from . import caches, names

_reading = asyncio.Lock()  # one file at a time: a page with many rows asks for all at once


def register() -> None:
    """Adds the route to the host's server, if it has one: tools import nodes without."""
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.routes.get("/lora_ops/lora")(_lora)


async def _lora(request: web.Request) -> web.Response:
    name, sha256 = request.query.get("name", ""), request.query.get("sha256", "").lower()
    async with _reading:
        status, answer = await asyncio.to_thread(lora, name, sha256)
    return web.json_response(answer, status=status)


def lora(name: str, sha256: str) -> tuple[int, dict[str, Any]]:
    """The HTTP status and the report of the file that a name means, or what is wrong with it. What is no SHA-256 is
    searched for nowhere."""
    try:
        found = names.find(name, sha256 if re.fullmatch("[0-9a-f]{64}", sha256) else "")
    except FileError as error:
        return 404, {"error": str(error), "candidates": error.facts.get("candidates", [])}
    resolved = names.portable(found.name)
    try:
        report = caches.report_of(found.name, found.path, names.state(found.path))
        return 200, {**report.data, "resolved": resolved, "sha256": caches.tensor_hash(found.path)}
    except LoraOpsError as error:
        error.file = resolved  # it knows the path
        return 422, {"error": str(error), "candidates": []}
