"""The help pages that the host shows in a node's info tab."""

from __future__ import annotations

from harness.server import MOUNT


def test_every_node_has_a_page_that_names_all_its_inputs_and_outputs(server):
    there = server.object_info().items()
    ours = {name: node for name, node in there if node["python_module"] == f"custom_nodes.{MOUNT}"}
    assert ours
    for name, node in ours.items():
        page = server.get(f"/extensions/{MOUNT}/docs/{name}.md").decode()
        named = [*node["input"].get("required", ()), *node["input"].get("optional", ()), *node["output_name"]]
        assert [each for each in named if f"**{each}**" not in page] == []
