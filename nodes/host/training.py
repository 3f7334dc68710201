"""Training on the host: the modules, weights and answers of a MODEL that is loaded as it samples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.sampler_helpers
import comfy.samplers
import psutil
import torch
from torch import Tensor, nn

from ...lora_ops.adapters import Transform
from ...lora_ops.errors import TrainingError
from ...lora_ops.inplace import OutOfPlace
from ...lora_ops.lora import Lora, TargetMap
from ...lora_ops.train import state
from ...lora_ops.train.blocks import checkpointed
from ...lora_ops.train.compiling import compiled, failure
from ...lora_ops.train.data import Item, widest
from ...lora_ops.train.dataset import REFERENCES
from ...lora_ops.train.encoders import require_known
from ...lora_ops.train.initial import of_inputs
from ...lora_ops.train.loop import Progress, Run, looks, train
from ...lora_ops.train.memory import Estimate, Probe, estimate, out_of_memory, probe
from ...lora_ops.train.offload import Offload, offloaded
from ...lora_ops.train.places import Place
from ...lora_ops.train.plan import Beginning, Plan
from ...lora_ops.train.starts import ALGEBRAS
from ...lora_ops.train.timesteps import Timesteps, recommended
from ...lora_ops.train.wrapper import Wrapper
from . import live
from .items import Items
from .offloading import offload_of, offloadable, put_away
from .patching import targets
from .wrapping import Part, Prompt, Text, stays, weight_of

T = TypeVar("T")
NETWORK = "diffusion_model"
SAME, SAME_IN_HALF = 1e-3, 0.05  # shares of an answer's norm in which two ways of computing it may differ


class Model(Part):
    """A MODEL to train on: its own patcher around the same modules; the MODEL stays what it is. So does clip, a CLIP
    that trains along.

    Its sampling hands out the model's answer as it is, instead of the picture that the answer means. Raises
    TrainingError for a text encoder that does not train.
    """

    def __init__(self, model: Any, clip: Any = None) -> None:
        self.model, self.network = model, model.model.diffusion_model
        modules = {f"{NETWORK}.{name}": module for name, module in self.network.named_modules() if name}
        super().__init__(model.clone(), modules)
        self.sampling = self.patcher.get_model_object("model_sampling")
        self.patcher.add_object_patch("model_sampling", _answering(self.sampling))
        self.text = None if clip is None else Text(clip)
        made = Items(self.patcher, self.text)
        self.item, self.items = made.item, made.items
        self._out_of_place = self._copying = False
        self._memory = 0  # that the host keeps free while it is loaded
        self._training = False  # what the host's flag was before
        self._offload: Offload | None = None
        self._wrappers: Sequence[Wrapper] = ()  # that are in
        self._autocast: torch.dtype | None = None
        if self.text is not None:
            require_known(self.targets().family)

    @property
    def _parts(self) -> list[Part]:
        return [self] if self.text is None else [self, self.text]

    def targets(self) -> TargetMap:
        return targets(self.patcher, self.text and self.text.clip)

    def places(self, plan: Plan) -> tuple[Place, ...]:
        """Where a plan trains on this model.

        Raises TrainingError where what trains looks at a weight beside which a LoRA runs live: it would see another one
        when it is put on after that.
        """
        where, algebra = plan.places(self.targets()), ALGEBRAS[plan.algebra]
        beside = {key for part in self._parts for key in live.weights(part.patcher)}
        for place in where if issubclass(algebra, Transform) else ():
            if place.target.key in beside:
                what = f"has a LoRA on it live, which {algebra.ALGEBRA} that trains there does not see."
                raise TrainingError(what, module=place.module, remedy="Put that LoRA on in mode patch.")
        return where

    def part(self, place: Place) -> Part:
        return self if place.target.part == "model" or self.text is None else self.text

    def weight(self, place: Place) -> Tensor:
        """The rows of a place's weight, as the model is loaded."""
        part = self.part(place)
        comfy.model_management.load_models_gpu([part.patcher])
        like = torch.empty(0, device=part.patcher.load_device)
        weight, _ = weight_of(part.modules[place.target.key.removesuffix(".weight")], like)
        return weight.narrow(0, place.target.rows.start, place.target.rows.length)

    def wrappers(self, begun: Beginning, dropout: float = 0.0) -> list[Wrapper]:
        """Those of the model and of the text encoder, on their devices."""

        def weights(module: nn.Module, like: Tensor) -> tuple[Tensor, Tensor | None]:
            if self._offload is not None:
                self._offload.need(module)
            return weight_of(module, like)

        found: list[Wrapper] = []
        for part in self._parts:
            adapters = {place: adapter for place, adapter in begun.adapters.items() if self.part(place) is part}
            more = {"taken_off": begun.taken_off, "dropout": dropout}
            found.append(Wrapper(part.modules, adapters, weight_of=weights, **more))
            for each in found[-1].trained:
                each.to(part.patcher.load_device)
        return found

    @contextmanager
    def running(
        self,
        wrappers: Sequence[Wrapper],
        batch: Sequence[Item],
        *,
        checkpointing: bool = False,
        autocast: torch.dtype | None = None,
        offload: Offload | None = None,
        compiler: str = "",
    ) -> Iterator[Probe]:
        """While inside, the model is loaded with its wrapper in it, and the text encoder with its own, and they answer
        with gradients; yields what a batch like this one keeps for them under autocast. offload brings the weights of
        the model's blocks; compiler is torch.compile's backend for them, if they are to be compiled.

        Raises TrainingError for a model whose blocks cannot be computed again.
        """
        self._memory = _required(self.patcher.model, batch)
        self._training, device = comfy.model_management.in_training, self.patcher.load_device.type
        self._offload, self._wrappers, self._autocast = offload, wrappers, autocast
        with torch.inference_mode(False), torch.enable_grad():
            try:
                for part, wrapper in zip(self._parts, wrappers, strict=True):
                    part.put(wrapper)
                self._enter()
                again = checkpointed(self.network, lambda: self._out_of_place) if checkpointing else nullcontext()
                fast = compiled(self.network, compiler) if compiler else nullcontext()
                with fast, offloaded(offload) if offload else nullcontext(), again:
                    with torch.autocast(device, autocast) if autocast else nullcontext():
                        found = self._examined(batch, checkpointing)
                    if compiler and self._copying:
                        what = "The model writes into its own tensors, which cannot be compiled."
                        raise TrainingError(what, remedy="Turn compile off.")
                    yield found
            finally:
                self._leave()
                for part, wrapper in zip(self._parts, wrappers, strict=True):
                    part.take_out(wrapper)

    def _enter(self) -> None:
        patchers = [part.patcher for part in self._parts]
        comfy.model_management.load_models_gpu(patchers, memory_required=self._memory)
        if self._offload is not None:
            put_away(self.patcher)
        for part in self._parts:
            part.enter()
        if self._autocast is not None and self._casts_pay(self._autocast):
            for wrapper in self._wrappers:
                wrapper.make_casts(self._autocast, stays)
        comfy.model_management.in_training = True
        if self._offload is not None:
            self._offload.start()

    def _leave(self) -> None:
        comfy.model_management.in_training = self._training
        if self._offload is not None:
            self._offload.stop()
        for wrapper in self._wrappers:
            wrapper.drop_casts()
        for part in self._parts:
            part.leave()

    def _casts_pay(self, dtype: torch.dtype) -> bool:
        """Whether weights are kept as autocast makes them: on a processor, where they take at most half of what is
        free. A GPU makes them in less time than their memory is worth there."""
        device = self.patcher.load_device
        weights = sum(weight.numel() for part in self._parts for weight in part.patcher.model.parameters())
        free = comfy.model_management.get_free_memory(device)
        return comfy.model_management.is_device_cpu(device) and 2 * weights * dtype.itemsize <= free

    @contextmanager
    def lent(self) -> Iterator[tuple[Any, Any]]:
        """While inside, where it is running, a MODEL and a CLIP (None: it does not train) for the host's own nodes:
        those that came, with the wrappers in them. Afterwards everything is as it was, the process's random state
        too."""
        device = self.patcher.load_device
        self._leave()
        model, clip = self.model.clone(), self.text and self.text.clip.clone()
        try:
            with (
                self.lending(model),
                self.text.lending(clip.patcher) if self.text and clip else nullcontext(),
                torch.random.fork_rng([device] if device.type == "cuda" else []),
                torch.inference_mode(),
            ):
                yield model, clip
        finally:
            self._enter()

    def _examined(self, items: Sequence[Item], checkpointing: bool) -> Probe:
        """Whether the model adds in place, and answers the same when it does not."""
        guises = [item.guise() for item in items]
        latent = torch.stack([guise.latent for guise in guises]).to(self.patcher.load_device)
        middle = self.sampling.sigmas[len(self.sampling.sigmas) // 2]
        levels = middle.to(latent).expand(len(items)).clone()
        conditions = [guise.condition for guise in guises]
        self._out_of_place = self._copying = False
        with torch.no_grad():
            sampled = self.predict(latent, levels, conditions)

        half = self._autocast is not None or self.patcher.model.get_dtype_inference().itemsize < 4
        share = SAME_IN_HALF if half else SAME

        def same(found: Probe) -> bool:
            return bool((found.result - sampled).norm() <= share * sampled.norm())

        plain = found = probe(lambda: self.predict(latent, levels, conditions))
        if found.overwrites:
            self._out_of_place = True
            found = probe(lambda: self.predict(latent, levels, conditions))
        if same(found) and not found.overwrites:
            return found
        self._out_of_place, self._copying = False, True
        if checkpointing:
            what = "The model, or what another extension runs in it, writes into its own tensors."
            raise TrainingError(what, remedy="Turn checkpointing off: its blocks cannot be computed again.")
        return plain

    def foreseen(self, found: Probe, run: Run) -> Estimate:
        """What a step of a run needs."""
        width = self.patcher.model.get_dtype_inference().itemsize
        largest = width * max(weight.numel() for weight in self.network.parameters())
        copies = 2 * largest  # cast, and laid out for its product
        copies += self._offload.most if self._offload else 0
        copies += sum(wrapper.casts for wrapper in run.wrappers)
        return estimate(found.kept, run.parameters, run.plan.descent, ema=bool(run.plan.ema), copies=copies)

    def around(self) -> AbstractContextManager[Any]:
        """What a forward pass and its backward pass run in: copies of what a model writes over, where it must be."""
        return torch.autograd.graph.allow_mutation_on_saved_tensors() if self._copying else nullcontext()

    def predict(self, noisy: Tensor, sigma: Tensor, conditions: Sequence[Any]) -> Tensor:
        """The model's answer in float32. conditions are those of items. Raises the host's interrupt."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        if self.text is not None:
            conditions = [self.text.encode(each) for each in conditions]
        with OutOfPlace() if self._out_of_place else nullcontext():
            encoded = [self._encoded(each, noisy[n : n + 1]) for n, each in enumerate(conditions)]
            first = encoded[0]
            if all(comfy.samplers.cond_equal_size(first, other) for other in encoded[1:]):
                return self._answer(noisy, sigma, comfy.samplers.cond_cat(encoded))
            answers = (
                self._answer(noisy[n : n + 1], sigma[n : n + 1], comfy.samplers.cond_cat([each]))
                for n, each in enumerate(encoded)
            )
            return torch.cat(list(answers))

    def _encoded(self, condition: Sequence[Any], latent: Tensor) -> dict[str, Any]:
        """What the model's own code makes of a conditioning for one latent."""
        entries = comfy.sampler_helpers.convert_cond(
            [[_copied(cross), _copied(options)] for cross, options in condition]
        )
        options = {"latent_image": latent, "denoise_mask": None, "seed": 0}
        (entry,) = comfy.samplers.encode_model_conds(
            self.patcher.model.extra_conds, entries, latent, latent.device, "positive", **options
        )
        return {name: cond.process_cond(batch_size=1, area=None) for name, cond in entry["model_conds"].items()}

    def _answer(self, noisy: Tensor, sigma: Tensor, conditioning: dict[str, Any]) -> Tensor:
        patcher, count = self.patcher, len(noisy)
        options = comfy.model_patcher.create_model_options_clone(patcher.model_options)
        told = options.setdefault("transformer_options", {})
        for kind in ("wrappers", "callbacks"):
            there = getattr(patcher, kind)
            told[kind] = comfy.patcher_extension.merge_nested_dicts(told.get(kind, {}), there, copy_dict1=False)
        told |= {"cond_or_uncond": [0] * count, "uuids": [None] * count, "sigmas": sigma, "sample_sigmas": sigma}
        conditioning = {name: _to(value, noisy.device) for name, value in conditioning.items()}
        conditioning["transformer_options"] = told
        apply: Callable[..., Tensor] = patcher.model.apply_model
        if wrapper := options.get("model_function_wrapper"):
            call = {"input": noisy, "timestep": sigma, "c": conditioning, "cond_or_uncond": [0] * count}
            return wrapper(apply, call)
        return apply(noisy, sigma, **conditioning)

    def begin(self, plan: Plan, where: Sequence[Place], items: Sequence[Item], timesteps: Timesteps) -> Beginning:
        """What the plan's training begins with on this model."""

        def directions() -> dict[Place, Tensor]:
            nothing = [Wrapper({}, {}) for _ in self._parts]
            modules = {name: module for part in self._parts for name, module in part.modules.items()}
            with self.running(nothing, items[:1]), torch.no_grad():
                device = self.patcher.load_device
                return of_inputs(modules, where, looks(plan, items, self.predict, self.sampling, timesteps, device))

        return plan.begin(where, self.weight, directions)

    @torch.inference_mode(False)
    def learn(
        self,
        plan: Plan,
        items: Sequence[Item],
        *,
        name: str,
        lora: Lora | None = None,
        held_out: Sequence[Item] = (),
        path: Path | None = None,
        checkpointing: bool = False,
        offload: bool = False,
        compiler: str = "",
        foreseen: Callable[[Estimate, int], None] = lambda needed, free: None,
        stepped: Callable[[Progress, Session], None] = lambda done, session: None,
        stopped: Callable[[Session], None] = lambda session: None,
    ) -> Lora:
        """Carry a plan out on this model, from a LoRA or from nothing.

        path is the state's: the run goes on from it if it is there, and saves it; the best by the held-out items is
        beside it, as NAME.best.safetensors. foreseen hears what a step will need and how much is free on the device;
        stepped hears of each step. Either may raise Finish: the run then ends with what it has.

        Raises the host's interrupt when the user asks for it, TrainingError, naming the setting that frees most, when
        memory runs out; what was learned until then is in path, and stopped has been called, if there was a step.
        """
        if bool(plan.text_aims) != (self.text is not None):
            plans, given = ("no", "a") if self.text else ("a", "no")
            what = f"The plan trains {plans} text encoder, and {given} CLIP is given."
            raise TrainingError(what, remedy="Give both or none.")
        device, targets = self.patcher.load_device, self.targets()
        where = self.places(plan)
        timesteps = plan.timesteps or recommended(targets.family, self.sampling)
        resumed = path is not None and path.exists()
        if lora is not None:
            begun = plan.go_on(where, lora, targets)
        else:
            begun = plan.shaped(where, self.weight) if resumed else self.begin(plan, where, items, timesteps)
        brought = offload_of(self.patcher) if offload else None
        wrappers = self.wrappers(begun, plan.dropout)
        run = Run(plan, *wrappers, scaled=self.patcher.model.get_dtype_inference() == torch.float16)
        if path is not None and resumed:
            state.restore(path, run)
        session = Session(self, run, path)

        def save(run: Run, best: bool) -> None:
            if path is not None:
                session.save()
                if best:
                    state.save(path.with_suffix(f".best{path.suffix}"), run)

        needed: Estimate | None = None
        try:
            more = {"checkpointing": checkpointing, "autocast": plan.autocast, "offload": brought}
            more |= {"compiler": compiler}
            with self.running(wrappers, widest(items, plan.batch), **more) as found:
                needed = self.foreseen(found, run)
                foreseen(needed, comfy.model_management.get_free_memory(device))
                train(
                    run,
                    items,
                    self.predict,
                    self.sampling,
                    timesteps,
                    around=self.around,
                    held_out=held_out,
                    save=save,
                    progress=lambda done: stepped(done._replace(memory=_in_use(device)), session),
                )
        except Finish:
            pass
        except BaseException as error:
            if run.step and run.whole:
                stopped(session)
            if compiler and (told := failure(error)):
                raise told from error
            if not out_of_memory(error):
                raise
            free = 0 if offload else offloadable(self.patcher)
            raise _no_memory(run, needed, path, checkpointing, free) from error
        return session.lora(name)


class Session:
    """A run, for who looks on between two steps. clip is, while it draws, the CLIP that encodes with what was learned;
    None where the text encoder does not train."""

    def __init__(self, model: Model, run: Run, path: Path | None) -> None:
        self._model, self._run, self._path = model, run, path
        self.clip: Any = None

    def lora(self, name: str) -> Lora:
        """What was learned until now: the average, where there is one."""
        return self._run.lora(name, {"lora_ops.plan": self._run.plan.told()})

    def save(self) -> None:
        """Save the state as it is now. Raises TrainingError for a run that has no file for it, or FileError."""
        if self._path is None:
            raise TrainingError("The run has no file for its state.", remedy="Give it a path.")
        state.save(self._path, self._run)

    def sample(self, draw: Callable[[Any], T]) -> T:
        """What draw makes of a MODEL that the host's own samplers take, with what was learned until now. The MODEL is
        good while draw runs, and refuses to run afterwards; training goes on as if nothing had been drawn. Raises what
        draw raises."""
        with self._run.result(), self._model.lent() as (model, self.clip):
            try:
                return draw(model)
            finally:
                self.clip = None


class Finish(Exception):
    """Raised by who looks on: the run ends here, with what it has learned."""


def _in_use(device: torch.device) -> int:
    """Bytes on a device; on the CPU, of this process."""
    if comfy.model_management.is_device_cpu(device):
        return psutil.Process().memory_info().rss
    return comfy.model_management.get_total_memory(device) - comfy.model_management.get_free_memory(device)


def _no_memory(
    run: Run, needed: Estimate | None, path: Path | None, checkpointing: bool, offloadable: int
) -> TrainingError:
    what = f"Memory ran out in step {run.step + 1}."
    if path is not None and run.step:
        what += f" What was learned in the {run.step} steps before is kept: the same plan goes on from there."
    if needed is None:
        return TrainingError(what, remedy="Use smaller pictures or a lower batch size.", step=run.step + 1)
    what += f" A step needs about {needed.total / 2**30:.1f} GB beside the model."
    remedy = needed.advice(checkpointing=checkpointing, batch=run.plan.batch, offloadable=offloadable)
    return TrainingError(what, remedy=remedy, step=run.step + 1)


def _answering(sampling: Any) -> Any:
    """The same sampling, whose pictures are the model's answers."""
    kind = type(sampling)
    found = copy.copy(sampling)
    found.__class__ = type(kind.__name__, (kind,), {"calculate_denoised": lambda self, sigma, answer, x: answer})
    return found


def _copied(value: Any) -> Any:
    """The same in tensors that autograd takes."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    return value


def _required(model: Any, batch: Sequence[Item]) -> float:
    """Bytes that the host wants free for a batch when it samples, its control pictures among it."""
    shapes: dict[str, list[Any]] = {}
    for condition in (item.guise().condition for item in batch):
        options = condition.options if isinstance(condition, Prompt) else condition[0][1]
        if options.get(REFERENCES) is not None:
            for name, shape in model.extra_conds_shapes(**options).items():
                shapes.setdefault(name, []).append(shape)
    return model.memory_required([len(batch), *batch[0].shape], cond_shapes=shapes)


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
