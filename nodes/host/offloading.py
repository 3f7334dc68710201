"""Offloading: the host's own partial loading with nothing left on the device, and blocks brought there ahead of use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ...lora_ops.errors import TrainingError
from ...lora_ops.train.offload import Bring, Offload


def offload_of(patcher: Any) -> Offload | None:
    """What brings the weights of a model's blocks. None where the host moves weights itself, as memory asks.

    Raises TrainingError where there is no device beside main memory.
    """
    device = patcher.load_device
    if comfy.model_management.is_device_cpu(device):
        what = "offload keeps weights in main memory, and the model runs there."
        raise TrainingError(what, remedy="Turn offload off.")
    if patcher.is_dynamic():
        return None
    network = patcher.model.diffusion_model
    return Offload(network, bring_to(device), lambda tensor: tensor.device != device)


def put_away(patcher: Any) -> None:
    """A loaded model's weights go to main memory, as the host's do that find no room; it pins them there."""
    patcher.partially_unload(patcher.offload_device, memory_to_free=1e32)


def offloadable(patcher: Any) -> int:
    """Bytes of weights on the device that offload would free."""
    if comfy.model_management.is_device_cpu(patcher.load_device) or patcher.is_dynamic():
        return 0
    return patcher.loaded_size()


def bring_to(device: torch.device) -> Bring:
    """Copies on a stream of their own where the host has one, while the device computes."""
    host = comfy.model_management

    def bring(tensors: Sequence[Tensor]) -> Callable[[], Sequence[Tensor]]:
        stream = host.get_offload_stream(device)
        if stream is not None:  # what it writes over is no longer in use then
            stream.wait_stream(host.current_stream(device))
        more = {"non_blocking": host.device_supports_non_blocking(device), "stream": stream}
        copies = [host.cast_to(tensor, None, device, copy=True, **more) for tensor in tensors]

        def arrived() -> Sequence[Tensor]:
            host.sync_stream(device, stream)
            return copies

        return arrived

    return bring
