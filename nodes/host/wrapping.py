"""Wrapping: a model of the host with a training wrapper in it, through its patcher's injections; a CLIP to train on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import comfy.ops
import comfy.sd
import torch
from comfy.patcher_extension import CallbacksMP, PatcherInjection
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn

from ...lora_ops.errors import TrainingError
from ...lora_ops.train.frozen import stored_weight
from ...lora_ops.train.memory import copying
from ...lora_ops.train.wrapper import Wrapper
from .caches import hooks_of

KEY = "lora_ops_train"


def weight_of(module: nn.Module, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """A weight as the host computes with it: patched, de-quantised, brought from where it is."""
    if not hasattr(module, "weight_function"):
        return stored_weight(module, like)
    weight, bias = comfy.ops.cast_bias_weight(module, dtype=like.dtype, device=like.device, bias_dtype=like.dtype)
    return weight.dequantize().to(like.dtype) if isinstance(weight, QuantizedTensor) else weight, bias


def stays(module: nn.Module) -> bool:
    """Whether the host computes with one weight always: with none that it, or somebody, makes for each call."""
    return not (getattr(module, "weight_function", None) or getattr(module, "bias_function", None))


class Part:
    """A model of the host and its own clone of the patcher, with a wrapper in it while it trains."""

    def __init__(self, patcher: Any, modules: Mapping[str, nn.Module]) -> None:
        self.patcher, self.modules = patcher, modules

    def put(self, wrapper: Wrapper) -> None:
        """The wrapper goes in before all other hooks, so that their gradients are autograd's."""
        self.patcher.injections = {KEY: [_injection(wrapper)], **self.patcher.injections}

    @contextmanager
    def lending(self, patcher: Any) -> Iterator[None]:
        """While inside, another clone has the wrapper in it. Afterwards that one and its clones refuse to run: they
        would go on changing with the run. When they die they take nothing out with them."""
        (own,), over = self.patcher.injections[KEY], list[bool]()

        def require_lent(_: Any) -> None:
            if over:
                what = "This MODEL or CLIP was lent for a sample of a training run, which has gone on since."
                raise TrainingError(what, remedy="Load the LoRA that the run saves.")

        def inject(whom: Any) -> None:
            require_lent(whom)
            own.inject(whom)

        lent = PatcherInjection(inject=inject, eject=lambda whom: None if over else own.eject(whom))
        patcher.injections = {KEY: [lent], **patcher.injections}
        patcher.add_callback_with_key(CallbacksMP.ON_PRE_RUN, KEY, require_lent)
        try:
            yield
        finally:
            over.append(True)

    def enter(self) -> None:
        self.patcher.eject_model()  # what was in from another clone
        self.patcher.inject_model()
        self.patcher.pre_run()

    def leave(self) -> None:
        self.patcher.cleanup()
        self.patcher.unpatch_model(unpatch_weights=False)

    def take_out(self, wrapper: Wrapper) -> None:
        wrapper.remove()
        self.patcher.injections.pop(KEY, None)


class Prompt(NamedTuple):
    """A condition of which the text encoder makes a conditioning in each step; options are what else that says."""

    tokens: Any
    options: Mapping[str, Any]


class _Loaded(comfy.sd.CLIP):
    """A CLIP that is where it should be."""

    def load_model(self, tokens: Any = ()) -> Any:
        return self.patcher


class Text(Part):
    """A CLIP to train on."""

    def __init__(self, clip: Any) -> None:
        if clip.use_clip_schedule or clip.patcher.forced_hooks is not None:
            what = "The CLIP has hooks, which training does not use."
            raise TrainingError(what, remedy="Connect it as it was before those.")
        self.clip, self._loaded = clip, clip.clone()
        self._loaded.__class__ = _Loaded
        named = self._loaded.cond_stage_model.named_modules()
        super().__init__(self._loaded.patcher, {name: module for name, module in named if name})

    def prompt(self, text: str, options: Mapping[str, Any]) -> Prompt:
        return Prompt(self.clip.tokenize(text), options)

    def encode(self, prompt: Prompt) -> list[Any]:
        """The CONDITIONING of a prompt, by the host's own encoder, whose layers add in place."""
        with copying() if torch.is_grad_enabled() else nullcontext():
            ((cross, options),) = self._loaded.encode_from_tokens_scheduled(prompt.tokens, show_pbar=False)
        return [[cross, {**prompt.options, **options}]]


def _injection(wrapper: Wrapper) -> PatcherInjection:
    """Our live hooks may still be in from another clone: they come on top again, with their own injection."""

    def inject(patcher: Any) -> None:
        installed = hooks_of(patcher.model).installed
        if installed is not None:
            installed.remove()
        wrapper.install()

    return PatcherInjection(inject=inject, eject=lambda _: wrapper.remove())
