"""A second module tree over the same weights: what a merged model is made of."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import comfy.utils
import torch
from torch import Tensor, nn

from ...lora_ops.errors import TargetError
from ...lora_ops.live import Link

# What the host notes on modules and models while they are loaded; on a new tree it begins anew.
NOTES = {
    *("bias_function", "bias_lowvram_function", "weight_function", "weight_lowvram_function"),
    *("comfy_force_cast_weights", "comfy_patched_weights", "prev_comfy_cast_weights", "seed_key"),
    *("_pin_state", "_pins", "_v", "_v_bias", "_v_block", "_v_block_faulted", "_v_signature", "_v_weight"),
    *("current_weight_patches_uuid", "model_loaded_weight_memory", "model_lowvram", "model_offload_buffer_memory"),
    *("dynamic_patchers", "dynamic_pins", "dynamic_vbars", "lowvram_patch_counter"),
}


class Base(NamedTuple):
    """A patcher's model, and what the patcher knows of it from before it was loaded and patched."""

    model: nn.Module
    offload_device: torch.device
    backup: Mapping[str, Any]
    backup_buffers: Mapping[str, Tensor]
    hook_backup: Mapping[str, tuple[Tensor, torch.device]]
    object_patches_backup: Mapping[str, Any]

    @classmethod
    def of(cls, patcher: Any) -> Base:
        """It follows the patcher: the host changes these dicts in place."""
        return cls(patcher.model, *(getattr(patcher, name) for name in cls._fields[1:]))

    def weight(self, key: str) -> Tensor:
        """A weight without any patch."""
        held = self.held(key)
        return comfy.utils.get_attr(self.model, key) if held is None else held

    def held(self, key: str) -> Tensor | None:
        """What the host holds back for a weight or buffer that it has changed in place. What it holds back for hooks
        has the patches already."""
        if key in self.backup:
            return self.backup[key].weight
        if key in self.hook_backup:
            return self.hook_backup[key][0]
        return self.backup_buffers.get(key)

    def copied(self, *, alone: bool = False) -> nn.Module:
        """The unpatched model as a tree of its own: other modules and Parameters over the same weights, or over copies
        of them (alone). Configurations and other values are shared.

        Raises TargetError for a module whose forward another node has replaced: it would go on calling the old one.
        """
        roots = (self.model, *(each for each in self.object_patches_backup.values() if isinstance(each, nn.Module)))
        copy = _Copy({module: name for root in roots for name, module in root.named_modules()}, self, alone)
        result = copy.of(self.model)
        if "current_patcher" in result.__dict__:
            result.__dict__["current_patcher"] = None
        result.__dict__["device"] = self.offload_device
        for name, value in self.object_patches_backup.items():
            comfy.utils.set_attr(result, name, value if value is comfy.utils.ATTR_UNSET else copy.of(value))
        for key in self.backup.keys() | self.hook_backup.keys():
            comfy.utils.set_attr_param(result, key, copy.second(self.weight(key)))
        for key, buffer in self.backup_buffers.items():
            comfy.utils.set_attr_buffer(result, key, copy.second(buffer))
        return result


class _Copy:
    """A tree's modules and tensors with their counterparts in the new one."""

    def __init__(self, modules: Mapping[nn.Module, str], base: Base, alone: bool) -> None:
        self._device, self._alone = base.offload_device, alone
        self._tensors: dict[int, Tensor] = {}  # one that two modules share stays shared
        self._modules = {id(module): type(module).__new__(type(module)) for module in modules}
        for module, name in modules.items():
            attributes = {key: value for key, value in module.__dict__.items() if key not in NOTES}
            if "prev_comfy_cast_weights" in module.__dict__:
                attributes["comfy_cast_weights"] = module.__dict__["prev_comfy_cast_weights"]
            attributes.pop("forward", None)
            attributes |= _forward(module, name)
            self._modules[id(module)].__dict__.update({key: self.of(value) for key, value in attributes.items()})

    def of(self, value: Any) -> Any:
        """A value of the tree with its modules and tensors replaced; one that has none is shared."""
        if isinstance(value, nn.Module):
            return self._modules.get(id(value), value)
        if isinstance(value, Tensor):
            return self._tensors[id(value)] if id(value) in self._tensors else self._kept(value)
        if isinstance(value, MethodType):
            return MethodType(value.__func__, self.of(value.__self__))
        if isinstance(value, partial):
            return partial(self.of(value.func), *self.of(value.args), **self.of(value.keywords))
        if type(value) in (list, tuple, set):
            return type(value)(map(self.of, value))
        if type(value) in (dict, OrderedDict):
            return type(value)((name, self.of(each)) for name, each in value.items())
        return value

    def _kept(self, value: Tensor) -> Tensor:
        """value lives as long as the tree that is copied: its id stays its own."""
        return self._tensors.setdefault(id(value), self.second(value))

    def second(self, tensor: Tensor) -> Tensor:
        """Another tensor, or Parameter, over the same memory or a copy of it."""
        with torch.inference_mode(tensor.is_inference()):  # what was made there cannot be wrapped elsewhere
            found = tensor.detach().to(self._device, copy=self._alone)
            return nn.Parameter(found, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else found


def _forward(module: nn.Module, name: str) -> Mapping[str, Any]:
    """The forward that a module has of its own, under our hooks. One that is the class's is what bypass leaves."""
    found = module.__dict__.get("forward")
    while isinstance(owner := getattr(found, "__self__", None), Link):
        found = owner.below
    if found is None or getattr(found, "__func__", None) is type(module).forward:
        return {}
    if owner is module:
        return {"forward": found}
    what = f"runs another node's {getattr(found, '__qualname__', type(found).__name__)}."
    raise TargetError(what, module=name, remedy="Put Merge LoRA before the node that replaces it.")
