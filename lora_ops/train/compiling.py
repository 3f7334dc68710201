"""Compiling: a model's blocks through torch.compile, one by one; what is around them runs as it is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import nn

from ..errors import TrainingError
from .blocks import blocks, replaced
from .memory import probing

Backend = str | Callable[..., Any]
INDUCTOR = "inductor"  # torch's own
VARIANTS = 8  # of one block that are kept: of other shapes, with the adapters and without


def compiled(model: nn.Module, backend: Backend) -> AbstractContextManager[Any]:
    """While inside, the model's blocks run compiled where they learn; a probe sees them as they are.

    Raises TrainingError where this Python or system has no torch.compile.
    """
    # Imported where it is used: it takes seconds.
    import torch._dynamo.exc

    there = blocks(model)
    limit = VARIANTS * max(1, len(there))  # torch counts all blocks of a class together, and gives up beyond
    try:
        fast = {block: torch.compile(block.forward, backend=backend) for block in there}
    except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
        raise _refused(error) from error
    stack = ExitStack()
    stack.enter_context(torch._dynamo.config.patch(recompile_limit=limit, accumulated_recompile_limit=2 * limit))
    stack.enter_context(replaced(there, lambda block: _where_it_learns(fast[block], block.forward)))
    return stack


def _where_it_learns(fast: Callable[..., Any], forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        learns = torch.is_grad_enabled() and probing.get() is None
        return (fast if learns else forward)(*args, **kwargs)

    return run


def failure(error: BaseException) -> TrainingError | None:
    """What to tell a person of torch.compile's own errors; None for any other."""
    import torch._dynamo.exc

    return _refused(error) if isinstance(error, torch._dynamo.exc.TorchDynamoException) else None


def _refused(error: BaseException) -> TrainingError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = " ".join(lines[:2]) or type(error).__name__
    what = f"torch.compile could not compile the model's blocks: {first[:300]}"
    return TrainingError(what, remedy="Turn compile off, or install what it names: a C++ compiler, on a GPU Triton.")
