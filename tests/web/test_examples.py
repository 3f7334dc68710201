"""The example workflows open in the front end, and mean there what the demo posts."""

from __future__ import annotations

import json

import pytest

from harness.comfy import PACK
from harness.workflow import to_prompt

EXAMPLES = sorted((PACK / "example_workflows").glob("*.json"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_opens_and_posts_what_the_demo_posts(page, server, path):
    workflow = json.loads(path.read_text("utf-8"))
    posted = page.run("await app.loadGraphData(given[0], true); return (await app.graphToPrompt()).output;", workflow)
    mine = to_prompt(workflow, server.object_info())
    assert {name: (node["class_type"], node["inputs"]) for name, node in posted.items()} == {
        name: (node["class_type"], node["inputs"]) for name, node in mine.items()
    }
    assert not [line for line in page.console() if "lora_ops" in line.lower()]
