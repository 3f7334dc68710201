"""The example workflows open in the front end, and mean there what the demo posts."""

from __future__ import annotations

import json

import pytest

from harness.comfy import PACK
from harness.workflow import to_prompt

EXAMPLES = sorted((PACK / "example_workflows").glob("*.json"))
OPEN = "await app.loadGraphData(given[0], true); return (await app.graphToPrompt()).output;"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_opens_and_posts_what_the_demo_posts(page, server, path):
    """A dialog about models that are not here stays open: no test of anything else belongs in this file."""
    told = len(page.console())
    workflow = json.loads(path.read_text("utf-8"))
    posted = page.run(OPEN, workflow)
    mine = to_prompt(workflow, server.object_info())
    assert {name: (node["class_type"], node["inputs"]) for name, node in posted.items()} == {
        name: (node["class_type"], node["inputs"]) for name, node in mine.items()
    }
    assert [line for line in page.console()[told:] if "lora" in line.lower()] == []
