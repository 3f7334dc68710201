"""Saved workflows become the prompts that the front end would send."""

from __future__ import annotations

import pytest

from harness.workflow import ConversionError, smaller, to_prompt, without_t5

SEED = ["INT", {"default": 0}]
OBJECT_INFO = {
    "Loader": {
        "display_name": "Load Model",
        "input": {"required": {"name": [["a.safetensors", "b.safetensors"]]}},
        "input_order": {"required": ["name"]},
    },
    "Sampler": {
        "display_name": "Sample",
        # The server lists optional inputs first here: only input_order counts.
        "input": {
            "optional": {"text": ["STRING", {"default": "nothing"}]},
            "required": {"cfg": ["FLOAT", {}], "seed": SEED, "model": ["MODEL"], "steps": ["INT", {"default": 20}]},
        },
        "input_order": {"required": ["model", "seed", "steps", "cfg"], "optional": ["text"]},
    },
    "Rows": {
        "display_name": "Rows",
        "input": {
            "required": {
                "fed": ["INT", {"forceInput": True}],
                "rows": ["LORA_ROWS", {"widgetType": "LORA_ROWS"}],
                "mode": [
                    "COMFY_DYNAMICCOMBO_V3",
                    {
                        "options": [
                            {"key": "off", "inputs": {}},
                            {"key": "on", "inputs": {"required": {"rank": ["INT", {}], "mask": ["MASK"]}}},
                        ]
                    },
                ],
                "pick": ["COMBO", {"options": ["x", "y"], "control_after_generate": True}],
                "flag": ["BOOLEAN", {}],
            }
        },
        "input_order": {"required": ["fed", "rows", "mode", "pick", "flag"]},
    },
    "Blend": {
        "display_name": "Blend",
        "input": {"required": {"amount": ["FLOAT", {}], "one": ["IMAGE"], "two": ["MODEL"], "three": ["MODEL"]}},
        "input_order": {"required": ["amount", "one", "two", "three"]},
    },
}


def node(id, type, values=(), inputs=(), outputs=(), **more):
    slots = [{"name": name, "type": kind, "link": link, **rest} for name, kind, link, *(rest,) in map(_padded, inputs)]
    return {
        "id": id,
        "type": type,
        "mode": 0,
        "widgets_values": values if isinstance(values, dict) else list(values),
        "inputs": slots,
        "outputs": [{"type": kind} for kind in outputs],
        **more,
    }


def _padded(slot):
    return slot if len(slot) == 4 else (*slot, {})


def workflow(*nodes, links=()):
    return {"version": 0.4, "nodes": list(nodes), "links": [list(link) for link in links]}


LOADER = node(1, "Loader", ["b.safetensors"], outputs=["MODEL"])


def sampler(values=(7, "randomize", 8, 2.5, "ink"), link=1, **more):
    return node(2, "Sampler", values, [("model", "MODEL", link)], **more)


def sampled(*nodes, links):
    return to_prompt(workflow(*nodes, links=links), OBJECT_INFO)["2"]["inputs"]


def test_widgets_take_their_names_from_input_order_and_seeds_have_a_value_more():
    prompt = to_prompt(workflow(LOADER, sampler(), links=[(1, 1, 0, 2, 0, "MODEL")]), OBJECT_INFO)
    assert prompt == {
        "1": {"inputs": {"name": "b.safetensors"}, "class_type": "Loader", "_meta": {"title": "Load Model"}},
        "2": {
            "inputs": {"model": ["1", 0], "seed": 7, "steps": 8, "cfg": 2.5, "text": "ink"},
            "class_type": "Sampler",
            "_meta": {"title": "Sample"},
        },
    }


def test_a_title_given_by_the_user_is_kept():
    assert to_prompt(workflow(node(1, "Loader", title="mine")), OBJECT_INFO)["1"]["_meta"] == {"title": "mine"}


def test_values_an_older_file_lacks_get_their_defaults():
    inputs = sampled(sampler([7, "fixed"], link=None), links=[])
    assert inputs == {"seed": 7, "steps": 20, "cfg": 0.0, "text": "nothing"}
    assert to_prompt(workflow(node(1, "Loader")), OBJECT_INFO)["1"]["inputs"] == {"name": "a.safetensors"}


def test_values_saved_by_name_need_no_order():
    assert sampled(sampler({"cfg": 1.5, "seed": 3}, link=None), links=[]) == {
        **{"seed": 3, "steps": 20, "cfg": 1.5, "text": "nothing"}
    }


def test_a_wire_wins_over_the_widget_it_was_converted_from():
    wired = node(2, "Sampler", [7, "fixed", 8, 2.5, "ink"], [("steps", "INT", 1, {"widget": {"name": "steps"}})])
    source = node(3, "Loader", ["a.safetensors"])
    assert sampled(wired, source, links=[(1, 3, 0, 2, 0, "INT")])["steps"] == ["3", 0]


def test_dynamic_combos_widget_types_filters_and_lists():
    rows = node(1, "Rows", [[{"lora": "ink"}], "on", 4, "y", "randomize", "filter", True])
    assert to_prompt(workflow(rows), OBJECT_INFO)["1"]["inputs"] == {
        "rows": {"__value__": [{"lora": "ink"}]},
        "mode": "on",
        "mode.rank": 4,
        "pick": "y",
        "flag": True,
    }
    off = node(1, "Rows", ["", "off", "x", "fixed", "", False])
    inputs = to_prompt(workflow(off), OBJECT_INFO)["1"]["inputs"]
    assert inputs == {"rows": "", "mode": "off", "pick": "x", "flag": False}


def test_notes_are_left_out():
    assert to_prompt(workflow(node(1, "Note", ["hello"]), node(2, "MarkdownNote", ["# hello"])), OBJECT_INFO) == {}


def test_a_muted_node_goes_and_so_does_what_it_fed():
    prompt = to_prompt(
        workflow({**LOADER, "mode": 2}, sampler(), links=[(1, 1, 0, 2, 0, "MODEL")]),
        OBJECT_INFO,
    )
    assert list(prompt) == ["2"]
    assert "model" not in prompt["2"]["inputs"]


def bypassed(*inputs, outputs=("MODEL",), values=(0.5,)):
    return node(3, "Blend", values, inputs, outputs, mode=4)


@pytest.mark.parametrize(
    ("inputs", "outputs", "slot", "expected"),
    [
        pytest.param([("two", "MODEL", 2), ("three", "MODEL", None)], ["MODEL"], 0, ["1", 0], id="same place"),
        pytest.param([("one", "IMAGE", None), ("two", "MODEL", 2)], ["MODEL"], 0, ["1", 0], id="same type"),
        pytest.param([("one", "IMAGE", None), ("two", "model,CLIP", 2)], ["MODEL"], 0, ["1", 0], id="one that fits"),
        pytest.param(
            [("one", "IMAGE", None), ("two", "MODEL,CLIP", None), ("three", "MODEL", 2)],
            *(["MODEL"], 0, ["1", 0]),
            id="same type before one that fits",
        ),
        pytest.param([("one", "IMAGE", 2)], ["MODEL"], 0, None, id="none"),
        pytest.param([("two", "MODEL", 2), ("three", "MODEL", None)], ["IMAGE", "MODEL"], 1, None, id="second"),
    ],
)
def test_a_bypassed_node_hands_on_its_input(inputs, outputs, slot, expected):
    links = [(1, 3, slot, 2, 0, "MODEL"), (2, 1, 0, 3, 0, "MODEL")]
    prompt = to_prompt(workflow(LOADER, bypassed(*inputs, outputs=outputs), sampler(), links=links), OBJECT_INFO)
    assert list(prompt) == ["1", "2"]
    assert prompt["2"]["inputs"].get("model") == expected


def test_a_bypassed_node_hands_on_the_value_of_an_unwired_widget():
    blend = bypassed(("amount", "FLOAT", None, {"widget": {"name": "amount"}}), outputs=["FLOAT"])
    wired = node(2, "Sampler", [7, "fixed", 8, 2.5, "ink"], [("cfg", "FLOAT", 1, {"widget": {"name": "cfg"}})])
    assert sampled(wired, blend, links=[(1, 3, 0, 2, 0, "FLOAT")])["cfg"] == 0.5


def test_reroutes_are_followed_to_the_real_node():
    dots = [node(i, "Reroute", inputs=[("", "*", link)], outputs=["MODEL"]) for i, link in ((3, 2), (4, 3))]
    links = [(1, 3, 0, 2, 0, "MODEL"), (2, 4, 0, 3, 0, "*"), (3, 1, 0, 4, 0, "*")]
    assert sampled(LOADER, *dots, sampler(), links=links)["model"] == ["1", 0]


def test_a_reroute_with_nothing_before_it_is_no_input():
    dot = node(3, "Reroute", inputs=[("", "*", None)], outputs=["*"])
    assert "model" not in sampled(dot, sampler(), links=[(1, 3, 0, 2, 0, "MODEL")])


def test_a_primitive_is_a_value():
    wired = node(2, "Sampler", [7, "fixed", 8, 2.5, "ink"], [("steps", "INT", 1, {"widget": {"name": "steps"}})])
    primitive = node(3, "PrimitiveNode", [30, "fixed"], outputs=["INT"])
    assert sampled(wired, primitive, links=[(1, 3, 0, 2, 0, "INT")])["steps"] == 30


def test_subgraphs_and_unknown_nodes_are_named():
    with pytest.raises(ConversionError, match="Node 5 is the subgraph 'Portrait'"):
        graph = workflow(node(5, "b0c1"))
        to_prompt({**graph, "definitions": {"subgraphs": [{"id": "b0c1", "name": "Portrait"}]}}, OBJECT_INFO)
    with pytest.raises(ConversionError, match=r"no node 'Foreign' \(node 6\)"):
        to_prompt(workflow(node(6, "Foreign")), OBJECT_INFO)


def test_without_t5_keeps_clip_l_wherever_it_stands_and_changes_no_input():
    dual = {"clip_name1": "t5xxl.safetensors", "clip_name2": "clip_l.safetensors", "type": "flux"}
    prompt = {
        "1": {"class_type": "DualCLIPLoader", "inputs": dual},
        "2": {"class_type": "X", "inputs": {"clip": ["1", 0]}},
    }
    changed = without_t5(prompt)
    clip = {"clip_name": "clip_l.safetensors", "type": "stable_diffusion"}
    assert changed == {"1": {"class_type": "CLIPLoader", "inputs": clip}, "2": prompt["2"]}
    assert prompt["1"]["inputs"] == dual


def test_smaller_shrinks_sizes_and_leaves_wires_alone():
    prompt = {
        "1": {"class_type": "EmptyLatentImage", "inputs": {"width": 768, "height": 128, "batch_size": 1}},
        "2": {"class_type": "EmptyLatentImage", "inputs": {"width": ["1", 0], "height": 512}},
    }
    changed = smaller(prompt, 256)
    assert changed["1"]["inputs"] == {"width": 256, "height": 128, "batch_size": 1}
    assert changed["2"] == prompt["2"]
    assert prompt["1"]["inputs"]["width"] == 768
