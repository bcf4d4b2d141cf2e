"""Several trainings in one worker group: the student and its controls, under the same loop, data and batches."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.data.spec import AugmentSpec
from pipeline.data.table import ImageTable
from pipeline.data.views import augment
from pipeline.engine.context import WorkerContext
from pipeline.engine.evaluation import predict
from pipeline.engine.loop import Lesson, batches_of, fit
from pipeline.engine.spec import Arm, LoopSpec, ObjectiveSpec
from pipeline.engine.teaching import Teaching, TeachingObjective
from pipeline.models.spec import StudentSpec
from pipeline.models.student import Student, build_student, save_student

LABELLED = ("train_labelled",)
TAUGHT = ("train_labelled", "train_unlabelled")
_BATCH = 512


@dataclass(frozen=True)
class ArmsPayload:
    """What travels to every worker: settings and references."""

    arms: tuple[Arm, ...]
    table: str
    student: StudentSpec
    loop: LoopSpec
    objective: ObjectiveSpec
    augment: AugmentSpec


def train_arms(context: WorkerContext, payload: ArmsPayload) -> None:
    """Train every arm that is not done, one after the other.

    An arm's result is in its folder before the next one starts, and the checkpoint belongs to the arm that is being
    trained: an interruption repeats at most one checkpoint interval of one arm.
    """
    table = ImageTable.open(payload.table)
    labelled, taught = table.split(*LABELLED), table.split(*TAUGHT)
    for number, arm in enumerate(payload.arms):
        if _agreed(arm.done, context):
            continue
        torch.manual_seed(arm.seed)
        student = build_student(payload.student, len(table.classes), table.image_shape)
        student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        teaching = Teaching.open(arm.teaching) if arm.teaching is not None else None
        if teaching is not None:
            teaching.check(taught.ids)
        history = fit(
            student,
            TeachingObjective(payload.objective, teaching, label_smoothing=payload.loop.label_smoothing),
            Lesson(arm.name, labelled, taught, teaching),
            payload.loop,
            context,
            seed=arm.seed,
            augment=lambda images, generator: augment(images, payload.augment, generator),
            report_with={"arm": number},
        )
        if context.rank == 0:
            _store(arm, student, table, history, context.device)
        context.barrier()


def _agreed(done: bool, context: WorkerContext) -> bool:
    """Return what rank 0 sees: on a shared disk the others may see an older state of it."""
    if context.world_size == 1:
        return done
    seen = [done]
    torch.distributed.broadcast_object_list(seen, src=0)
    return seen[0]


def _store(
    arm: Arm,
    student: Student,
    table: ImageTable,
    history: list[dict[str, float]],
    device: torch.device,
) -> None:
    from safetensors.torch import save_file

    folder = Path(arm.folder)
    folder.mkdir(parents=True, exist_ok=True)
    predictions = {
        name: predict(student, batches_of(table.split(name), _BATCH), device) for name in ("validation", "test")
    }
    save_file(predictions, folder / "predictions.safetensors")
    save_student(student, folder, classes=table.classes)
    (folder / "history.json").write_text(json.dumps(history), encoding="utf-8")
    temporary = folder / ".done.json"
    temporary.write_text(json.dumps({"name": arm.name, "seed": arm.seed}), encoding="utf-8")
    temporary.replace(folder / "done.json")
