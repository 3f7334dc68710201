"""What the pack's web page asks the server: what a LoRA is, how training goes. Names and ids only, no paths.

What changes something takes a POST of JSON, which no other site's page can send without asking the browser first.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from io import BytesIO
from pathlib import Path
from typing import Any

from aiohttp import web
from PIL import Image
from server import PromptServer

from ...lora_ops.errors import FileError, LoraOpsError
from . import caches, names, runs

RUN = "/lora_ops/train/{run:[0-9a-f]{16}}"
THUMBNAIL = 256  # px of a small sample's longer side
LONGEST = 1024  # bytes of a POST
FOREVER = {"Cache-Control": "private, max-age=31536000, immutable"}

_reading = asyncio.Lock()  # one file at a time: a page with many rows asks for all at once


def register() -> None:
    """Adds the routes to the host's server, if it has one: tools import nodes without."""
    server = getattr(PromptServer, "instance", None)
    if server is None:
        return
    server.routes.get("/lora_ops/lora")(_lora)
    server.routes.get("/lora_ops/train")(_runs)
    server.routes.get(RUN)(_run)
    server.routes.get(RUN + "/sample/{step:[0-9]{1,9}}/{number:[0-9]{1,3}}")(_sample)
    for want in runs.WANTS:
        server.routes.post(f"{RUN}/{want}")(_ask(want))


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


async def _runs(request: web.Request) -> web.Response:
    """The runs, the newest first, of a node or a workflow if the query names one."""
    there = await asyncio.to_thread(lambda: [run.summary() for run in runs.known()])
    asked = {name: request.query[name] for name in ("node", "workflow") if name in request.query}
    found = [run for run in there if all(run[name] == value for name, value in asked.items())]
    return web.json_response({"runs": found})


async def _run(request: web.Request) -> web.Response:
    since = request.query.get("since", "0")
    if not re.fullmatch("[0-9]{1,9}", since):
        return _refused(400, "since is a step.")
    run = await asyncio.to_thread(runs.find, request.match_info["run"])
    return _refused(404, "There is no such run.") if run is None else web.json_response(run.told(int(since)))


async def _sample(request: web.Request) -> web.StreamResponse:
    """A picture, small if the query says so. The page asks for another address when it is drawn anew."""
    run = await asyncio.to_thread(runs.find, request.match_info["run"])
    step, number = int(request.match_info["step"]), int(request.match_info["number"])
    path = None if run is None else run.sample(step, number)
    try:
        if path is not None and "small" in request.query:
            return web.Response(body=await asyncio.to_thread(_small, path), content_type="image/webp", headers=FOREVER)
        if path is not None and path.is_file():
            return web.FileResponse(path, headers={**FOREVER, "Content-Type": "image/png"})
    except OSError:  # it was deleted, or is no picture
        pass
    return _refused(404, "There is no such sample.")


def _small(path: Path) -> bytes:
    with Image.open(path, formats=["PNG"]) as image:
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        found = BytesIO()
        image.convert("RGB").save(found, "WEBP", quality=85)
        return found.getvalue()


def _ask(want: str) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def asked(request: web.Request) -> web.Response:
        if request.content_type != "application/json":
            return _refused(415, "Only JSON is taken.")
        if (request.content_length or 0) > LONGEST or await _body(request) != {}:
            return _refused(400, "Send an empty JSON object.")
        run = await asyncio.to_thread(runs.find, request.match_info["run"])
        if run is None:
            return _refused(404, "There is no such run.")
        if not run.ask(want):
            return _refused(409, "The run has ended.")
        return web.json_response(run.summary())

    return asked


async def _body(request: web.Request) -> Any:
    try:
        return json.loads(await request.content.read(LONGEST))
    except (ValueError, RecursionError):
        return None


def _refused(status: int, error: str) -> web.Response:
    return web.json_response({"error": error}, status=status)
