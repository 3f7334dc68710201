"""The graph around a node, as far as a node must know it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_execution.graph_utils import ExecutionBlocker

from ...lora_ops.errors import StackError


def in_use(hidden: Any, output: int) -> bool:
    """Whether a node's output goes anywhere. hidden has its unique_id and the dynprompt, which knows the nodes that
    others made while running too."""
    nodes = [hidden.dynprompt.get_node(name) for name in hidden.dynprompt.all_node_ids()]
    return any([hidden.unique_id, output] == value for node in nodes for value in node.get("inputs", {}).values())


def require_inputs(hidden: Any, **outputs: Any) -> None:
    """Raises StackError for an output, named as its input and in output order, that is used and has no value.

    Without this a None would travel on and fail in another node, which cannot say what to connect.
    """
    for number, (name, value) in enumerate(outputs.items()):
        if value is None and in_use(hidden, number):
            raise StackError(f"The {name} output is in use, the input is not connected.", remedy=f"Connect a {name}.")


def nothing(why: str | None = None) -> Any:
    """An output that has no value: what is behind it does not run, and says why if there is a reason."""
    return ExecutionBlocker(why)


def upstream(prompt: Mapping[str, Any], node: str) -> dict[str, Any]:
    """A node and all that it needs, as the API takes them: what the host notes in a prompt is left out."""
    found: dict[str, Any] = {}
    waiting = [node]
    while waiting:
        name = waiting.pop()
        if name not in found and name in prompt:
            found[name] = {key: prompt[name][key] for key in ("class_type", "inputs", "_meta") if key in prompt[name]}
            waiting += [value[0] for value in prompt[name]["inputs"].values() if _is_link(value)]
    return found


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)
