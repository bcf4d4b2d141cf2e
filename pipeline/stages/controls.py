"""Controls: the same student trained otherwise, to hold a claim against."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.engine.objective_spec import objective_of
from pipeline.engine.spec import Arm
from pipeline.errors import ConfigError
from pipeline.stages import training
from pipeline.stages.amalgamate import chosen, teaching_by
from pipeline.stages.assess import rows_of
from pipeline.stages.base import Run
from pipeline.stages.teachers import TeacherJob, has_labels, load_bridge, table_of, teacher_folder


@dataclass(frozen=True)
class Control:
    """A way to get predictions: a training by seed, or logits (N, C_s) of the test images.

    Attributes
    ----------
    title : str
    arm : callable or None
        From a seed's number to its training.
    logits : tensor or None
    """

    title: str
    arm: Callable[[int], Arm] | None = None
    logits: Any = None


def make(run: Run, name: str) -> Control:
    """Prepare a control: let its teachers speak, or find what it starts from.

    Raises
    ------
    ConfigError
        When it does not apply to this run; says why.
    """
    return _MAKERS[name](run)


def _best_single(run: Run) -> Control:
    choice = chosen(run)
    name = choice["best_single"]
    if name is None or choice["chosen"] == [name]:
        raise ConfigError("the best single teacher is the whole faculty, or there is none")
    folder, digest = teaching_by(run, "best_single", [name])
    return Control(f"the best single teacher ({name})", _arms(run, "best_single", folder, digest))


def _random_set(run: Run) -> Control:
    """As many teachers as were chosen, drawn from all that could be assessed."""
    choice = chosen(run)
    pool = sorted(row["teacher"] for row in rows_of(run) if row["error"] is None and row["dropped"] is None)
    size = len(choice["chosen"])
    if not size or size >= len(pool):
        raise ConfigError("no teacher was chosen, or all were")
    names = random.Random(run.settings.seed).sample(pool, size)
    folder, digest = teaching_by(run, "random_set", names)
    return Control(f"a random set ({', '.join(names)})", _arms(run, "random_set", folder, digest))


def _average(run: Run) -> Control:
    names = chosen(run)["chosen"]
    if len(names) < 2 or run.settings.amalgamate.mode == "components":
        raise ConfigError("it needs two or more teachers that teach directly")
    folder, digest = teaching_by(run, "average", names, choice="average")
    return Control("the average of the faculty", _arms(run, "average", folder, digest))


def _concatenated(run: Run) -> Control:
    names = chosen(run)["chosen"]
    if not names or not has_labels(run) or run.settings.task.subtasks is not None:
        raise ConfigError("it needs teachers, labels and a single task")
    folder, digest = teaching_by(run, "concatenated", names, choice="average", raw=True)
    loss = run.settings.distill.objective.cross_entropy
    objective = objective_of(cross_entropy={} if loss is None else loss.model_dump(), concatenated={})
    return Control("concatenated logits", _arms(run, "concatenated", folder, digest, objective=objective))


def _finetune(run: Run) -> Control:
    from pipeline.models.student import student_like

    name = chosen(run)["best_single"]
    if name is None or not has_labels(run):
        raise ConfigError("there is no best teacher, or no label")
    student = student_like(run.zoo[name])

    def arm(seed: int) -> Arm:
        return training.arm(run, "finetune", run.settings.seed + seed, None, "", student=student, start_from=name)

    return Control(f"labels, from the weights of {name}", arm)


def _ensemble(run: Run) -> Control:
    """Average what the chosen teachers say of the test images, carried to the task's classes; no student."""
    import torch

    from pipeline.models.teacher import predict

    names = chosen(run)["chosen"]
    if not names or run.settings.task.subtasks is not None:
        raise ConfigError("it needs teachers and a single task")
    settings, split = run.settings.amalgamate, table_of(run).split("test")
    total = torch.zeros(len(split), len(table_of(run).classes))
    with run.display.bar("ensemble", len(names), "teachers") as advance:
        for name in names:
            folder = run.part("controls", f"ensemble-{name}", {"assessed": teacher_folder(run, name).name})
            job, bridge = TeacherJob.of(run, name, folder, settings.resources), load_bridge(teacher_folder(run, name))
            output = predict(job.load().fold(), split.batches(settings.batch_size))
            total += bridge.carry(bridge.distribution(output.logits, output.features))
            advance(1, name)
    return Control("the faculty itself, averaged (no student)", logits=(total / len(names)).log())


def _arms(run: Run, name: str, folder: Any, digest: str, **changes: Any) -> Callable[[int], Arm]:
    def arm(seed: int) -> Arm:
        return training.arm(run, name, run.settings.seed + seed, folder, digest, **changes)

    return arm


_MAKERS: dict[str, Callable[[Run], Control]] = {
    "best_single": _best_single,
    "random_set": _random_set,
    "average": _average,
    "concatenated": _concatenated,
    "finetune": _finetune,
    "ensemble": _ensemble,
}
