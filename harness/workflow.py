"""Workflows as the front end saves them, and the prompts the server runs."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

Node = Mapping[str, Any]
Prompt = dict[str, dict[str, Any]]

MUTED, BYPASSED = 2, 4
NOTES = frozenset({"Note", "MarkdownNote"})
VIRTUAL = frozenset({"PrimitiveNode", "Reroute"})
DYNAMIC_COMBO = "COMFY_DYNAMICCOMBO_V3"
# The front end's ComfyWidgets (1.49). Inputs of other types are widgets if they say widgetType or socketless.
WIDGETS = frozenset(
    (
        *("INT", "FLOAT", "BOOLEAN", "STRING", "MARKDOWN", "TEXTAREA", "COMBO", DYNAMIC_COMBO, "COLOR", "COLORS"),
        *("CURVE", "RANGE", "BOUNDING_BOX", "BOUNDING_BOXES", "CHART", "GALLERIA", "IMAGECOMPARE"),
        *("PAINTER", "COMPOSITOR", "VIDEO_EDIT"),
    )
)
BLANK = {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False}


class ConversionError(Exception):
    """This workflow cannot be turned into a prompt; the message names the node and the reason."""


class Value(NamedTuple):
    """What arrives at an input that is fed by a widget and not by a node's output."""

    value: Any


def to_prompt(workflow: Mapping[str, Any], object_info: Mapping[str, Any]) -> Prompt:
    """The prompt that the front end's graphToPrompt makes of a saved workflow (LiteGraph 0.4) without subgraphs.

    object_info is the server's: it states the order of each node's widgets, which is all that ties the saved values
    to their names. Texts are passed on as they stand, `{a|b}` choices and `%date%` included.

    Raises ConversionError for subgraphs and for nodes the server does not know.
    """
    return _Graph(workflow, object_info).prompt()


def defaults(kind: str, object_info: Mapping[str, Any]) -> dict[str, Any]:
    """What the widgets of a new node of this kind hold, as a prompt's inputs."""
    graph = _Graph({"nodes": (), "links": ()}, object_info)
    return {name: _literal(value) for name, value in graph.widget_values({"type": kind}).items()}


def without_t5(prompt: Prompt) -> Prompt:
    """The prompt with every DualCLIPLoader replaced by a CLIPLoader of its CLIP-L.

    A T5-XXL cannot be had small: its loader knows one size. The small FLUX of harness/small.py is therefore
    conditioned by CLIP-L alone, and everything after the loader stays as it is.
    """
    result = copy.deepcopy(prompt)
    for node in result.values():
        if node["class_type"] == "DualCLIPLoader":
            names = (node["inputs"]["clip_name1"], node["inputs"]["clip_name2"])
            node["inputs"] = {"clip_name": next(n for n in names if "clip_l" in n), "type": "stable_diffusion"}
            node["class_type"] = "CLIPLoader"
    return result


def with_models(prompt: Prompt, unet: str, clip: str, vae: str) -> Prompt:
    """The prompt with these files loaded in place of whatever its loaders name; checkpoints come in these parts too."""
    result = copy.deepcopy(prompt)
    loaders = {
        "UNETLoader": {"unet_name": unet, "weight_dtype": "default"},
        "CLIPLoader": {"clip_name": clip, "type": "stable_diffusion"},
        "VAELoader": {"vae_name": vae},
    }
    parts: dict[tuple[str, int], str] = {}
    for name, node in prompt.items():
        kind = node["class_type"].replace("DualCLIPLoader", "CLIPLoader")
        if kind in loaders:
            result[name] = {"class_type": kind, "inputs": loaders[kind]}
        elif kind == "CheckpointLoaderSimple":
            del result[name]
            for output, (part, inputs) in enumerate(loaders.items()):
                parts[name, output] = f"{name}.{output}"
                result[f"{name}.{output}"] = {"class_type": part, "inputs": inputs}
    for node in result.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list) and tuple(value) in parts:
                node["inputs"] = node["inputs"] | {name: [parts[tuple(value)], 0]}
    return result


def brief(prompt: Prompt, steps: int, side: int) -> Prompt:
    """The prompt with every training that short, on pictures of about that many pixels a side."""
    result = copy.deepcopy(prompt)
    for node in result.values():
        if node["class_type"] == "LoraOpsTrain":
            often = max(1, steps // 2)
            node["inputs"] |= {"steps": steps, "sample_every": often, "save_every": often, "sample_steps": 8}
        elif node["class_type"] == "LoraOpsDataset":
            node["inputs"] |= {"resolution": str(side), "bucket_step": 32}
    return result


def smaller(prompt: Prompt, side: int = 256) -> Prompt:
    """The prompt with every width and height at most side: on a CPU a picture's time grows faster than its area."""
    result = copy.deepcopy(prompt)
    for node in result.values():
        inputs = node["inputs"]
        if isinstance(inputs.get("width"), int) and isinstance(inputs.get("height"), int):
            inputs.update(width=min(inputs["width"], side), height=min(inputs["height"], side))
    return result


class _Graph:
    def __init__(self, workflow: Mapping[str, Any], object_info: Mapping[str, Any]):
        subgraphs = {graph["id"]: graph["name"] for graph in workflow.get("definitions", {}).get("subgraphs", ())}
        for node in workflow["nodes"]:
            if node["type"] in subgraphs:
                raise ConversionError(
                    f"Node {node['id']} is the subgraph '{subgraphs[node['type']]}', and subgraphs are not "
                    "converted. Unpack it in the front end (right click, Unpack Subgraph) and save again."
                )
        self.nodes = {node["id"]: node for node in workflow["nodes"]}
        self.links = {link[0]: link for link in workflow["links"]}
        self.object_info = object_info

    def prompt(self) -> Prompt:
        active = (n for n in self.nodes.values() if n.get("mode") not in (MUTED, BYPASSED))
        return {str(n["id"]): self._entry(n) for n in active if n["type"] not in NOTES | VIRTUAL}

    def _entry(self, node: Node) -> dict[str, Any]:
        inputs = {name: _literal(value) for name, value in self.widget_values(node).items()}
        for slot in node.get("inputs", ()):
            arrived = self._arriving(node, slot, slot["type"])
            if isinstance(arrived, Value):
                inputs[slot["name"]] = _literal(arrived.value)
            elif arrived is not None:
                inputs[slot["name"]] = arrived
        title = node.get("title") or self._definition(node)["display_name"]
        return {"inputs": inputs, "class_type": node["type"], "_meta": {"title": title}}

    def _definition(self, node: Node) -> Mapping[str, Any]:
        if node["type"] not in self.object_info:
            raise ConversionError(
                f"This ComfyUI has no node '{node['type']}' (node {node['id']}). Install the pack it comes from."
            )
        return self.object_info[node["type"]]

    def widget_values(self, node: Node) -> dict[str, Any]:
        definition = self._definition(node)
        specs = definition["input"]
        ordered = (
            (name, specs[group][name])
            for group in ("required", "optional")
            for name in definition["input_order"].get(group, ())
        )
        return dict(_widgets(ordered, _Saved(node.get("widgets_values"))))

    def _arriving(self, node: Node, slot: Mapping[str, Any], wanted: str) -> list[Any] | Value | None:
        """What an input receives: [node id, output], a Value, or None. wanted is the type of the input asked first."""
        if slot.get("link") is None:
            values = self.widget_values(node) if slot.get("widget") and node["type"] not in VIRTUAL else {}
            return Value(values[slot["name"]]) if slot["name"] in values else None
        _, origin, output, *_ = self.links[slot["link"]]
        node = self.nodes[origin]
        if node.get("mode") == MUTED:
            return None
        if node.get("mode") == BYPASSED:
            passing = _passing_input(node, output, wanted)
        elif node["type"] == "Reroute":
            passing = 0
        elif node["type"] == "PrimitiveNode":
            return Value(node["widgets_values"][0])
        else:
            return [str(origin), output]
        return None if passing is None else self._arriving(node, node["inputs"][passing], wanted)


class _Saved:
    """A node's widgets_values, taken one by one: by position, or by name where a node saves a mapping."""

    def __init__(self, values: list[Any] | Mapping[str, Any] | None):
        self._named = values if isinstance(values, Mapping) else None
        self._left = iter(() if values is None or self._named is not None else values)

    def take(self, name: str, default: Any) -> Any:
        return next(self._left, default) if self._named is None else self._named.get(name, default)

    def skip(self, count: int) -> None:
        for _ in range(count):
            next(self._left, None)


def _widgets(specs: Iterator[tuple[str, Any]], saved: _Saved, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Name and value of every widget, in the order in which the front end makes and saves them."""
    for name, spec in specs:
        name = prefix + name
        options = spec[1] if len(spec) > 1 else {}
        kind = "COMBO" if isinstance(spec[0], list) else spec[0]
        if options.get("forceInput") or not (kind in WIDGETS or options.get("widgetType") or options.get("socketless")):
            continue
        choices = spec[0] if isinstance(spec[0], list) else options.get("options", ())
        if kind == DYNAMIC_COMBO:
            choice = saved.take(name, choices[0]["key"])
            yield name, choice
            chosen = next((each["inputs"] for each in choices if each["key"] == choice), {})
            children = (pair for group in ("required", "optional") for pair in chosen.get(group, {}).items())
            yield from _widgets(children, saved, f"{name}.")
            continue
        yield name, saved.take(name, options.get("default", BLANK.get(kind, choices[0] if choices else None)))
        if kind == "INT" and options.get("control_after_generate", name in ("seed", "noise_seed")):
            saved.skip(1)  # "randomize", "fixed", …
        elif kind == "COMBO" and options.get("control_after_generate"):
            saved.skip(2)  # the same, and its filter


def _passing_input(node: Node, output: int, wanted: str) -> int | None:
    """The input that a bypassed node hands on as this output: in the same place, else of the same type, else any."""
    inputs = node.get("inputs", ())
    if wanted in ("*", ""):
        return output if len(inputs) > output else 0
    given = node["outputs"][output]["type"]

    def passes(slot: Mapping[str, Any]) -> bool:
        return _fits(slot["type"], given) and _fits(slot["type"], wanted)

    if len(inputs) > output and passes(inputs[output]):
        return output
    same = (i for i, slot in enumerate(inputs) if slot["type"] == wanted)
    fitting = (i for i, slot in enumerate(inputs) if passes(slot))
    return next(same, next(fitting, None))


def _fits(one: str, other: str) -> bool:
    """LiteGraph's isValidConnection: types are comma separated alternatives, and * is any."""
    kinds, others = (set(kind.lower().split(",")) for kind in (one, other))
    return bool(kinds & others or {"*", ""} & (kinds | others))


def _literal(value: Any) -> Any:
    """A bare list would be read as a link by the server."""
    return {"__value__": value} if isinstance(value, list) else value
