"""Training steps on made-up images: the loop's own code, timed."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pipeline.config import Settings
from pipeline.data.views import augment
from pipeline.distillation.step import About, Said, TeacherAbout
from pipeline.engine.context import LocalContext
from pipeline.engine.feeding import Lesson
from pipeline.engine.learner import Learner
from pipeline.engine.loop import fit
from pipeline.engine.objective_spec import ObjectiveSpec, labels_alone, objective_of
from pipeline.engine.objectives import build_objective, wants
from pipeline.errors import ConfigError
from pipeline.models.student import Student, build_student
from pipeline.planning.sizes import widths_of
from pipeline.planning.teachers import TeacherSize
from pipeline.planning.work import Training, Work

_WARM, _TIMED = 2, 24  # steps


def step_seconds(settings: Settings, work: Work, training: Training, workers: int, *, limit: float) -> float:
    """Return the seconds of one step on one of `workers`, live teachers and what workers say to each other left out.

    Parts of the loss that need live teachers or their layers are left out; teachers of these are counted apart.

    Parameters
    ----------
    settings : Settings
    work : Work
    training : Training
    workers : int
        Who share a batch.
    limit : float
        Seconds that it may take, once a few steps are done.

    Raises
    ------
    ConfigError
        When the student can't be built.
    """
    facts, spec = work.facts, training.loop
    changes = {
        "batch_size": max(1, spec.batch_size // workers),
        "labelled_batch": max(1, spec.labelled_batch // workers),
    }
    spec = spec.model_copy(update=changes | {"epochs": 1, "compile": False, "checkpoint_steps": None})
    torch.manual_seed(0)
    student = build_student(_student(settings, training), facts.classes, facts.shape)
    student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    cuda = settings.distill.resources.gpus_per_worker > 0 and torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    taught = training.kind != "labels"
    told = _Told(work, taught, together=_together(settings))
    learner = _learner(settings, training, student, told)

    def changed(images: Tensor, keys: Tensor) -> Tensor:
        return augment(images, settings.distill.augment, keys)

    def seconds_of(steps: int) -> float:
        # An epoch is a pass over the taught images: as many as make so many steps.
        images = _Pixels(steps * spec.batch_size, facts.shape, facts.classes)
        lesson = Lesson("plan", images if facts.count("train_labelled") else _Pixels(0, facts.shape, 2), images, told)
        if not taught:
            lesson = replace(lesson, targets=None)
        with LocalContext(device=device) as context:
            history = fit(
                learner,
                lesson,
                spec,
                context,
                seed=0,
                augment=lambda x, keys: augment(x, settings.distill.augment, keys),
            )
        return history[0]["seconds"] / steps

    first = seconds_of(_WARM)
    return seconds_of(max(1, min(_TIMED, int(limit / max(first, 1e-6)))))


def _together(settings: Settings) -> bool:
    from pipeline.stages.together import choice_of

    try:
        return choice_of(settings) == "together"
    except ConfigError:
        return False


def _student(settings: Settings, training: Training) -> Any:
    components = settings.amalgamate.components.student
    return components if training.kind == "component" and components is not None else settings.distill.student


def _learner(settings: Settings, training: Training, student: Student, told: _Told) -> Learner:
    if training.kind == "component":  # what it learns from runs live: its own step is a plain one
        objective, needed = labels_alone(ObjectiveSpec()), frozenset[str]()
    elif training.kind == "labels":
        objective, needed = labels_alone(settings.distill.objective), frozenset[str]()
    else:
        objective = _without_live(settings.distill.objective)
        needed = wants(objective)
    about = told.about(student, needed)
    return Learner(student, build_objective(objective, lambda layers: about), wants=needed - {"live", "taps"})


def _without_live(spec: ObjectiveSpec) -> ObjectiveSpec:
    kept = {name: part.model_dump() for name, part in spec.parts() if not wants(_alone(name, part)) & {"live", "taps"}}
    return objective_of(**(kept or {"cross_entropy": {}}))


def _alone(name: str, part: Any) -> ObjectiveSpec:
    return objective_of(**{name: part.model_dump()})


class _Pixels:
    """Images of noise with labels in turn, as the loop wants them."""

    def __init__(self, count: int, shape: tuple[int, int, int], classes: int) -> None:
        kept = min(count, 512)  # more would only take time to make
        generator = torch.Generator().manual_seed(0)
        self._images = torch.randint(0, 256, (kept, *shape), generator=generator, dtype=torch.uint8)
        self.labels = torch.arange(count) % classes
        self.numbers = torch.arange(count)

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, rows: Tensor) -> Tensor:
        return self._images[rows % len(self._images)]


class _Told:
    """What teachers might say: distributions of the right shapes."""

    views: int | None = None

    def __init__(self, work: Work, taught: bool, *, together: bool) -> None:
        self._classes = work.facts.classes
        # Together they are one speaker over the task's classes.
        self._teachers: tuple[TeacherSize, ...] = work.faculty if taught and not together else ()

    def _widths(self) -> list[tuple[int, int]]:
        return [widths_of(teacher) or (self._classes, 64) for teacher in self._teachers] or [(self._classes, 64)]

    def about(self, student: Student, needed: Collection[str]) -> About:
        teachers = []
        for number, (classes, features) in enumerate(self._widths()):
            labelled = 4 * self._classes
            teachers.append(
                TeacherAbout(
                    name=f"teacher {number}",
                    classes=tuple(f"class {k}" for k in range(classes)),
                    cost=1 - torch.eye(self._classes),
                    gain=1.0,
                    feature_dim=features,
                    tap_shapes={},
                    labelled_features=torch.randn(labelled, features) if "labelled" in needed else None,
                    labels=torch.arange(labelled) % self._classes if "labelled" in needed else None,
                )
            )
        names = tuple(f"class {k}" for k in range(self._classes))
        return About(names, student.feature_dim, {}, tuple(teachers), ())

    def batch(self, rows: Tensor, views: Tensor, wants: Collection[str]) -> Said:
        count, widths = len(rows), self._widths()
        p = torch.full((count, self._classes), 1 / self._classes)
        return Said(
            shares=torch.full((len(widths), count), 1 / len(widths)),
            p=tuple(p for _ in widths),
            target=torch.stack([p for _ in widths]),
            logits=tuple(torch.randn(count, one) for one, _ in widths) if "said.logits" in wants else None,
            features=tuple(torch.randn(count, one) for _, one in widths) if "said.features" in wants else None,
        )
