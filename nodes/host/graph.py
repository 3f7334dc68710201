"""The graph around a node, as far as a node must know it."""

from __future__ import annotations

from typing import Any

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
