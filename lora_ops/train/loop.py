"""The loop: from a Plan, a Wrapper and items to what was learned."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Generator, Tensor, nn

from ..errors import TrainingError
from ..lora import Lora
from .data import Guise, Item, batches
from .objectives import Sampling, coefficients, losses, noise_of, noisy, target
from .optimizers import averaging, device_of
from .plan import Plan
from .randomness import generator
from .timesteps import Timesteps
from .wrapper import Draw, Wrapper

MOMENTS = (0.1, 0.3, 0.5, 0.7, 0.9)  # where held-out items are looked at
LOOKS = 64  # batches that EVA sees at most
SKIPPED = 20  # steps of float16 in a row whose gradients may be too large, while the scale for them is found


class Predict(Protocol):
    """The model's answer (batch, …) to noisy latents at noise levels (batch,), one condition each."""

    def __call__(self, noisy: Tensor, sigma: Tensor, conditions: Sequence[Any]) -> Tensor: ...


class Progress(NamedTuple):
    step: int  # steps done
    steps: int
    loss: float
    smoothed: float
    rate: float
    seconds: float  # of this step
    validation: float | None = None
    best: bool = False  # whether no validation before was better
    memory: int = 0  # bytes in use, where who trains knows


class Run:
    """What changes while a plan is carried out: parameters, optimizer, schedule, average, and how far it is."""

    def __init__(self, plan: Plan, *wrappers: Wrapper, scaled: bool = False) -> None:
        """wrappers: one for each part of the model. scaled: the loss is multiplied before the backward pass, for models
        that compute in float16."""
        self.plan, self.wrappers = plan, wrappers
        self.trained = tuple(each for wrapper in wrappers for each in wrapper.trained)
        self.parameters: Mapping[str, nn.Parameter] = {
            name: parameter for wrapper in wrappers for name, parameter in wrapper.parameters().items()
        }
        encoder = [each for each in self.trained if each.place.target.part == "clip"]
        text = {f"{each.place.module}.{name}" for each in encoder for name in each.parameters}
        self.optimizer = plan.descent.optimizer_of(self.parameters, text)
        self.schedule = plan.descent.schedule_of(self.optimizer, plan.steps)
        self.scaler = torch.GradScaler(device_of(self.parameters).type) if scaled else None
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()} if plan.ema else {}
        self.step = 0
        self.smoothed = math.nan
        self.best = math.inf
        self.whole = True  # false while the optimizer is in the middle of a step

    @contextmanager
    def result(self) -> Iterator[None]:
        """While inside, the parameters are those to use: their average, where there is one. Afterwards they are to the
        bit what they were; a schedule-free optimizer, which goes there and back in place, only comes near."""
        trained = {name: parameter.data for name, parameter in self.parameters.items()}
        for parameter in self.parameters.values():
            parameter.data = parameter.data.clone()
        averaging(self.optimizer, True)
        there_and_back = {name: parameter.data for name, parameter in self.parameters.items()}
        for name, average in self.average.items():
            self.parameters[name].data = average
        try:
            yield
        finally:
            self._hold(there_and_back)
            averaging(self.optimizer, False)
            self._hold(trained)

    def _hold(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.data = tensors[name]

    def lora(self, name: str, metadata: Mapping[str, str] | None = None) -> Lora:
        """What was learned until now, in tensors of its own on the CPU."""
        with self.result():
            modules = {name: adapter for wrapper in self.wrappers for name, adapter in wrapper.now().items()}
            return Lora(name, modules, metadata or {})

    @contextmanager
    def base_only(self) -> Iterator[None]:
        """While inside, the model answers as it did before."""
        with ExitStack() as stack:
            for wrapper in self.wrappers:
                stack.enter_context(wrapper.base_only())
            yield

    def drop(self, draw: Draw | None) -> None:
        for wrapper in self.wrappers:
            wrapper.draw = draw

    def advance(self) -> bool:
        """Move the parameters down their gradients. False where those are not finite: nothing has moved then."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(list(self.parameters.values()), self.plan.clip or math.inf)
        finite = bool(torch.isfinite(norm))
        self.whole = False
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif finite:
            self.optimizer.step()
        if finite:
            self.schedule.step()
            self.step += 1
            weight = 1 - min(self.plan.ema, (1 + self.step) / (10 + self.step))
            for name, average in self.average.items():
                average.lerp_(self.parameters[name].detach(), weight)
        self.whole = True
        return finite


def train(
    run: Run,
    items: Sequence[Item],
    predict: Predict,
    sampling: Sampling,
    timesteps: Timesteps,
    *,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    held_out: Sequence[Item] = (),
    save: Callable[[Run, bool], None] = lambda run, best: None,
    progress: Callable[[Progress], None] = lambda done: None,
) -> None:
    """Carry the run's plan out from the step where it is. The wrapper is in its model already.

    around gives what each forward pass and its backward pass run in. save(run, best) is called every save_every steps,
    at the end, and before anything that stops the run leaves here, progress's exceptions too, that of whoever cancels:
    what was learned until then is kept. best: it is the best state by the held-out items.

    Raises TrainingError where a loss or gradient is not finite; the parameters are those of the last step that was.
    """
    plan = run.plan
    averaging(run.optimizer, False)
    skipped = 0
    try:
        while run.step < plan.steps:
            began = time.perf_counter()
            rate = float(run.optimizer.param_groups[0]["lr"])
            loss = _gradients(run, items, predict, sampling, timesteps, around)
            if not math.isfinite(loss):
                raise _diverged(run, "loss")
            if not run.advance():
                skipped += 1
                if run.scaler is None or skipped > SKIPPED:
                    raise _diverged(run, "gradient")
                continue
            skipped = 0
            share = max(
                1 - plan.smoothing, 1 / run.step
            )  # the mean at first: the first loss is worth no more than others
            run.smoothed = loss if math.isnan(run.smoothed) else run.smoothed + share * (loss - run.smoothed)
            validation, best = None, False
            if held_out and plan.validate_every and run.step % plan.validate_every == 0:
                validation = validate(run, held_out, predict, sampling, timesteps)
                best = validation < run.best
                run.best = min(run.best, validation)
            if best or run.step == plan.steps or (plan.save_every and run.step % plan.save_every == 0):
                save(run, best)
            seconds = time.perf_counter() - began
            progress(Progress(run.step, plan.steps, loss, run.smoothed, rate, seconds, validation, best))
    except BaseException:
        run.optimizer.zero_grad(set_to_none=True)
        if run.whole and run.step:
            save(run, False)
        raise


def looks(
    plan: Plan,
    items: Sequence[Item],
    predict: Predict,
    sampling: Sampling,
    timesteps: Timesteps,
    device: torch.device,
) -> Iterator[Callable[[], Tensor]]:
    """Calls of the model on noisy items as in training, EVA's batches; nothing is learned."""
    for step in range(LOOKS):
        for numbers in batches(items, plan.batch, 1, plan.seed, step):
            guises = [items[n].guise(generator(plan.seed, "look at", step, place)) for place, n in enumerate(numbers)]
            latent = torch.stack([guise.latent for guise in guises]).to(device, torch.float32)
            moments = timesteps.moments(len(latent), generator(plan.seed, "look at", step))
            sigma = timesteps.sigmas(sampling, moments, *latent.shape[-2:]).to(device)
            noise = noise_of(plan.objective, latent.cpu(), generator(plan.seed, "look", step)).to(latent)
            x, conditions = noisy(sampling, sigma, noise, latent), [guise.condition for guise in guises]
            with torch.no_grad():
                yield lambda x=x, sigma=sigma, conditions=conditions: predict(x, sigma, conditions)


def _gradients(
    run: Run,
    items: Sequence[Item],
    predict: Predict,
    sampling: Sampling,
    timesteps: Timesteps,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> float:
    """The gradients of a step, of all its items alike however they are split into batches; returns their mean loss."""
    plan, step = run.plan, run.step
    run.optimizer.zero_grad(set_to_none=True)
    parts = batches(items, plan.batch, plan.accumulate, plan.seed, step)
    count = sum(map(len, parts))
    moments = timesteps.moments(count, generator(plan.seed, "moments", step))
    total, position = torch.zeros((), dtype=torch.float64), 0
    for number, part in enumerate(parts):
        places = range(position, position + len(part))
        run.drop(Draw(plan.seed, step, number))
        now = moments[position : position + len(part)]
        guises = [
            items[n].guise(generator(plan.seed, "guise", step, place)) for n, place in zip(part, places, strict=True)
        ]
        for there in (guises, [each.beside for each in guises if each.beside]):
            if not there:
                continue
            noises = [generator(plan.seed, "noise", step, place) for place in places]
            with around():
                loss = _loss(run, there, now, noises, predict, sampling, timesteps).sum() / count
                (loss if run.scaler is None else run.scaler.scale(loss)).backward()
            total += loss.detach().cpu().double()
        position += len(part)
    run.drop(None)
    return float(total)


def _loss(
    run: Run,
    guises: Sequence[Guise],
    moments: Tensor,
    noises: Sequence[Generator],
    predict: Predict,
    sampling: Sampling,
    timesteps: Timesteps,
) -> Tensor:
    """The loss of each guise of a batch (batch,)."""
    device, objective = device_of(run.parameters), run.plan.objective
    latent = torch.stack([guise.latent for guise in guises]).to(device, torch.float32)
    sigma = timesteps.sigmas(sampling, moments, *latent.shape[-2:])
    found = coefficients(sampling, sigma)
    drawn = [noise_of(objective, each[None], draws) for each, draws in zip(latent.cpu(), noises, strict=True)]
    noise = torch.cat(drawn).to(latent)
    sigma = sigma.to(device)
    x, conditions = noisy(sampling, sigma, noise, latent), [guise.condition for guise in guises]
    wanted = target(found, noise, latent)
    with torch.autocast(device.type, run.plan.autocast) if run.plan.autocast else nullcontext():
        if guises[0].of_base:
            with torch.no_grad(), run.base_only():
                wanted = predict(x, sigma, conditions).float()
        answer = predict(x, sigma, conditions)
    masks = [guise.mask for guise in guises if guise.mask is not None]
    mask = torch.stack(masks).to(device) if masks else None
    weight = torch.tensor([guise.weight for guise in guises], device=device)
    return losses(objective, found, answer, wanted, mask) * weight


def validate(run: Run, items: Sequence[Item], predict: Predict, sampling: Sampling, timesteps: Timesteps) -> float:
    """The mean loss of held-out items, each time in the same guise, at the same moments and with the same noise."""
    total = 0.0
    with torch.no_grad(), run.result():
        for number, item in enumerate(items):
            for place, moment in enumerate(MOMENTS):
                noise = generator(run.plan.seed, "held out", number, place)
                now = torch.tensor([moment], dtype=torch.float64)
                total += float(_loss(run, [item.guise()], now, [noise], predict, sampling, timesteps))
    return total / (len(items) * len(MOMENTS))


def _diverged(run: Run, what: str) -> TrainingError:
    return TrainingError(
        f"The {what} of step {run.step + 1} is not finite: training has diverged. What was learned in the {run.step} "
        "steps before is kept.",
        remedy="Lower the learning rate or go on from an earlier state.",
        step=run.step + 1,
    )
