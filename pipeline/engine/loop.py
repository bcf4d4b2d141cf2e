"""The training loop: labelled and taught images, one objective, checkpoints from which it resumes exactly."""

from __future__ import annotations

import itertools
import math
import tempfile
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from pipeline.distillation.step import Said, Seen
from pipeline.engine.checkpoint import load_state, save_state
from pipeline.engine.context import WorkerContext
from pipeline.engine.learner import Learner
from pipeline.engine.sampling import BatchSampler, seed_of
from pipeline.engine.spec import LoopSpec, OptimSpec


class Images(Protocol):
    """Where the loop gets images and labels from."""

    @property
    def labels(self) -> torch.Tensor:
        """Class numbers, (N,) int64; −1 where there is none."""
        ...

    def __len__(self) -> int: ...

    def images(self, rows: torch.Tensor) -> torch.Tensor:
        """Return uint8 images (n, C, H, W) of the given rows."""
        ...


class Targets(Protocol):
    """What teachers say of every taught image."""

    def batch(self, rows: torch.Tensor, device: torch.device, wants: Collection[str]) -> Said:
        """Return what they say of the given rows."""
        ...


class Teachers(Protocol):
    """Teachers that look at the images of a step."""

    def __call__(self, images: torch.Tensor) -> tuple[Seen, ...]:
        """Return what each of them shows of the images."""
        ...


class Augment(Protocol):
    """A batched augmentation on uint8 images."""

    def __call__(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Return augmented images of the same shape."""
        ...


@dataclass(frozen=True)
class Lesson:
    """All that one student is trained on.

    Attributes
    ----------
    name : str
        Tells this training apart in a checkpoint.
    labelled : Images
        Images with a label in [0, C); may be empty where there are teachers.
    taught : Images
        Images that `targets` speak of, row by row; their labels are not used.
    targets : Targets or None
        None trains on the labels alone, with the same number of steps and the same labelled batches.
    live : Teachers or None
        Those of `targets`, in the same order, where the learner wants to see what they see.
    """

    name: str
    labelled: Images
    taught: Images
    targets: Targets | None
    live: Teachers | None = None


def fit(
    learner: Learner,
    lesson: Lesson,
    spec: LoopSpec,
    context: WorkerContext,
    *,
    seed: int,
    augment: Augment | None = None,
    report_with: dict[str, float] | None = None,
) -> list[dict[str, float]]:
    """Train a student in place; return the metrics of every epoch.

    Each step takes `spec.labelled_batch` labelled and `spec.batch_size` taught images, runs the student on both at
    once, and minimises the learner's ``"loss"`` (see `Learner`).

    Batches, augmentation and the schedule are pure functions of the seed and the step, and a checkpoint holds the
    model, optimiser, schedule, CPU RNG state of every rank and epoch: interrupted anywhere, training ends with the
    weights of an uninterrupted run on the same number of ranks (on a GPU only without dropout).

    Parameters
    ----------
    learner : Learner
        The student and what it is trained on; adapters and heads of the objective are trained with it.
    lesson, spec, context, seed, augment
        What is learnt, how, where and from which random numbers.
    report_with : dict, optional
        Added to every report, to tell several lessons of one worker group apart.

    Raises
    ------
    ValueError
        If a batch can't be shared evenly among the ranks, or there are neither labels nor teachers.
    FloatingPointError
        If the loss stops being finite; the last checkpoint stands.
    """
    world, device = context.world_size, context.device
    for field, size in (("batch_size", spec.batch_size), ("labelled_batch", spec.labelled_batch)):
        if size % world:
            raise ValueError(f"{field} must be a multiple of the {world} workers, got {size}")
    if not len(lesson.labelled) and lesson.targets is None:
        raise ValueError(f"{lesson.name} has neither labelled images nor teachers; there is nothing to learn from")
    steps = math.ceil(len(lesson.taught) / spec.batch_size)
    total = steps * spec.epochs
    labelled = None
    if len(lesson.labelled):
        labelled = BatchSampler(
            len(lesson.labelled), spec.labelled_batch, seed=seed_of(seed, 1), rank=context.rank, world_size=world
        )
    taught = BatchSampler(
        len(lesson.taught), spec.batch_size, seed=seed_of(seed, 2), rank=context.rank, world_size=world
    )

    all_labels = lesson.labelled.labels
    model = context.prepare(learner)
    parameters = list(learner.parameters())
    optimiser = build_optimiser(parameters, spec.optim, undecayed=learner.undecayed())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate(step, total, spec.optim))
    torch.manual_seed(seed_of(seed, 3, context.rank))

    first, history = 0, []
    with context.restore() as folder:
        state = load_state(folder) if folder is not None else None
    if state is not None and state["name"] == lesson.name:
        learner.load_state_dict(state["learner"])
        optimiser.load_state_dict(state["optimiser"])
        schedule.load_state_dict(state["schedule"])
        if len(state["rng"]) == world:
            torch.set_rng_state(state["rng"][context.rank])
        first, history = state["epoch"], state["history"]

    for epoch in range(first, spec.epochs):
        started = time.perf_counter()
        model.train()
        sums: dict[str, torch.Tensor] = {}
        none = itertools.repeat(torch.zeros(0, dtype=torch.int64), steps)
        owns = labelled.batches(epoch * steps, steps) if labelled is not None else none
        pairs = zip(owns, taught.batches(epoch * steps, steps), strict=True)
        for step, (own, theirs) in enumerate(pairs, start=epoch * steps):
            images, labels, said = _batch(lesson, all_labels[own], own, theirs, device, learner.wants)
            if augment is not None:
                generator = torch.Generator(device=images.device).manual_seed(seed_of(seed, 4, step, context.rank))
                images = augment(images, generator)
            looks = learner.begin(step / total)
            live = lesson.live(images) if looks and lesson.live is not None else None
            parts = model(images, labels, said, live, step / total)
            optimiser.zero_grad(set_to_none=True)
            parts["loss"].backward()
            if spec.optim.clip_norm is not None:
                nn.utils.clip_grad_norm_(parameters, spec.optim.clip_norm)
            optimiser.step()
            schedule.step()
            learner.after_step()
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + value.detach()
        metrics = {name: float(value) / steps for name, value in sums.items()}
        if not math.isfinite(metrics["loss"]):
            raise FloatingPointError(f"the loss of {lesson.name} became {metrics['loss']} in epoch {epoch + 1}")
        seconds = time.perf_counter() - started
        metrics |= {
            "epoch": epoch + 1,
            "lr": float(schedule.get_last_lr()[0]),
            "seconds": seconds,
            "images_per_second": steps * (spec.batch_size + (spec.labelled_batch if labelled else 0)) / seconds,
        }
        history.append(metrics)
        keep = (epoch + 1) % spec.checkpoint_every == 0 or epoch + 1 == spec.epochs
        reported = metrics | (report_with or {})
        _report(context, reported, _state(lesson, learner, optimiser, schedule, history, context, keep))
    return history


def build_optimiser(
    parameters: list[nn.Parameter], spec: OptimSpec, *, undecayed: Collection[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """Return the optimiser that the settings name; weight decay leaves the parameters in `undecayed` alone."""
    exempt = {id(parameter) for parameter in undecayed}
    groups: list[dict[str, Any]] = [{"params": [one for one in parameters if id(one) not in exempt]}]
    if exempt:
        groups.append({"params": [one for one in parameters if id(one) in exempt], "weight_decay": 0.0})
    if spec.name == "sgd":
        nesterov = spec.momentum > 0
        return torch.optim.SGD(
            groups, lr=spec.lr, momentum=spec.momentum, nesterov=nesterov, weight_decay=spec.weight_decay
        )
    return torch.optim.AdamW(groups, lr=spec.lr, weight_decay=spec.weight_decay)


def rate(step: int, total: int, spec: OptimSpec) -> float:
    """Return the learning rate of a step as a fraction of its peak, see `OptimSpec`."""
    warmup = spec.warmup * total
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(total - warmup, 1)
    if spec.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    if spec.schedule == "one_cycle":
        return max(1 - done, 0.0)
    if spec.schedule == "step":
        return spec.gamma ** sum(step >= milestone * total for milestone in spec.milestones)
    return 1.0


def _batch(
    lesson: Lesson,
    labels: torch.Tensor,
    own: torch.Tensor,
    theirs: torch.Tensor,
    device: torch.device,
    wants: Collection[str],
) -> tuple[torch.Tensor, torch.Tensor, Said | None]:
    images = lesson.labelled.images(own)
    if lesson.targets is None:
        return images.to(device), labels.to(device), None
    images = torch.cat([images, lesson.taught.images(theirs)])
    labels = torch.cat([labels, labels.new_full((len(theirs),), -1)])
    return images.to(device), labels.to(device), lesson.targets.batch(theirs, device, wants)


def _state(
    lesson: Lesson,
    learner: Learner,
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    history: list[dict[str, float]],
    context: WorkerContext,
    keep: bool,
) -> dict[str, Any] | None:
    """Return what a checkpoint holds, on rank 0; every rank must call this, to hand in its RNG state."""
    if not keep:
        return None
    rng: list[Any] = [torch.get_rng_state()]
    if context.world_size > 1:
        rng = [None] * context.world_size
        torch.distributed.all_gather_object(rng, torch.get_rng_state())
    if context.rank:
        return None
    return {
        "name": lesson.name,
        "epoch": len(history),
        "learner": learner.state_dict(),
        "optimiser": optimiser.state_dict(),
        "schedule": schedule.state_dict(),
        "rng": rng,
        "history": history,
    }


def _report(context: WorkerContext, metrics: dict[str, float], state: dict[str, Any] | None) -> None:
    if state is None:
        context.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        save_state(Path(folder), state)
        context.report(metrics, Path(folder))


def batches_of(images: Images, batch_size: int) -> Iterator[torch.Tensor]:
    """Yield all images in order."""
    for start in range(0, len(images), batch_size):
        yield images.images(torch.arange(start, min(start + batch_size, len(images))))
