"""Several trainings in one worker group: the student and its controls, under the same loop, data and batches."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from pipeline.data.mirror import share
from pipeline.data.spec import AugmentSpec
from pipeline.data.table import ImageSplit, ImageTable
from pipeline.data.views import augment
from pipeline.distillation.flow import Flow, FlowStudent, default_sources
from pipeline.distillation.step import About, Head, TeacherAbout
from pipeline.engine.context import WorkerContext
from pipeline.engine.evaluation import predict
from pipeline.engine.feeding import Lesson
from pipeline.engine.learner import Learner
from pipeline.engine.live import Live, student_layers, teacher_layers
from pipeline.engine.loop import batches_of, fit
from pipeline.engine.objective_spec import FlowSpec, LayersSpec, ObjectiveSpec, labels_alone
from pipeline.engine.objectives import build_objective, wants
from pipeline.engine.sampling import seed_of
from pipeline.engine.spec import Arm, LoopSpec
from pipeline.engine.teaching import Teaching
from pipeline.models.recalibrate import assert_independent, recalibrate_batchnorm
from pipeline.models.spec import StudentSpec
from pipeline.models.student import Student, adopt, build_student, save_student
from pipeline.models.teacher import Teacher
from pipeline.places import own

LABELLED = ("train_labelled",)
TAUGHT = ("train_labelled", "train_unlabelled")
TESTED = ("probe", "validation", "test")
WITH_TEACHERS = ".with_teachers"
_BATCH = 512


class TeacherReference(Protocol):
    """Where a worker gets a teacher from."""

    def load(self) -> Teacher:
        """Load it."""
        ...


@dataclass(frozen=True)
class ArmsPayload:
    """What travels to every worker: settings and references.

    Attributes
    ----------
    arms : tuple of Arm
    table : str
        The image table.
    student, loop, objective, augment
        Settings of all arms; an arm may have a student and an objective of its own.
    teachers : dict of str to TeacherReference
        Those that arms may need live.
    heads : tuple of Head
        Sub-tasks of the student; empty for a single task.
    classes : tuple of str
        What the student's logits stand for; empty: the table's classes.
    """

    arms: tuple[Arm, ...]
    table: str
    student: StudentSpec
    loop: LoopSpec
    objective: ObjectiveSpec
    augment: AugmentSpec
    teachers: Mapping[str, TeacherReference] = field(default_factory=dict)
    heads: tuple[Head, ...] = ()
    classes: tuple[str, ...] = ()


def train_arms(context: WorkerContext, payload: ArmsPayload) -> None:
    """Train every arm that is not done, one after the other.

    An arm's result is in its folder before the next one starts, and the checkpoint belongs to the arm that is being
    trained: an interruption repeats at most one checkpoint interval of one arm.
    """
    table = ImageTable.open(payload.table)
    for number, arm in enumerate(payload.arms):
        if _agreed(arm.done, context):
            continue
        _train(number, arm, payload, table, context)
        context.barrier()


def _train(number: int, arm: Arm, payload: ArmsPayload, table: ImageTable, context: WorkerContext) -> None:
    labelled, taught = table.split(*LABELLED), table.split(*TAUGHT)
    classes = payload.classes or table.classes
    torch.manual_seed(arm.seed)
    student = build_student(arm.student or payload.student, len(classes), table.image_shape)
    if arm.start is not None:
        adopt(student, arm.start.load())
    own = set(student.state_dict())
    student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    teaching = Teaching.open(arm.teaching) if arm.teaching is not None else None
    if teaching is not None:
        teaching.check(taught.ids)
    learner, live = _learner(arm, payload, student, teaching, taught, classes, context.device)
    history = fit(
        learner,
        Lesson(arm.name, labelled, taught, teaching, live),
        payload.loop,
        context,
        seed=arm.seed,
        augment=lambda images, keys: augment(images, payload.augment, keys),
        report_with={"arm": number},
    )
    if context.rank == 0:
        predictions = _finish(learner, live, table, taught, arm, context.device)
        assert_independent(student, own, () if live is None else live.teachers)
        _store(arm, student, classes, predictions, history)


def _learner(
    arm: Arm,
    payload: ArmsPayload,
    student: Student,
    teaching: Teaching | None,
    taught: ImageSplit,
    classes: tuple[str, ...],
    device: torch.device,
) -> tuple[Learner, Live | None]:
    """Put student, loss and flow together, and load the teachers where they are needed live."""
    spec = arm.objective or payload.objective
    needed = wants(spec) if teaching is not None else frozenset()
    flowing = arm.flow if teaching is not None else None
    live, example = None, taught.images(torch.arange(min(2, len(taught))))
    if teaching is not None and ("live" in needed or flowing is not None):
        loaded = [payload.teachers[name].load().to(device) for name in teaching.teachers]
        live = Live(loaded, compiled=payload.loop.compile_teachers)
    rows = torch.nonzero(taught.labels >= 0)[:, 0]
    labels = taught.labels[rows]
    features = teaching.features(rows) if teaching is not None and "labelled" in needed else None
    dims = teaching.feature_dims() if teaching is not None and {"said.features", "labelled"} & needed else None
    taps: dict[str, tuple[int, ...]] = {}

    def about(layers: LayersSpec | None) -> About:
        own = student_layers(student, layers) if layers is not None and teaching is not None else {}
        taps.update(own)
        teachers = []
        for index, one in enumerate(teaching.speakers if teaching is not None else ()):
            shapes: dict[str, tuple[int, ...]] = {}
            if layers is not None and live is not None:
                shapes = teacher_layers(live.teachers[index], layers, example)
                live.tap(index, shapes)
            teachers.append(
                TeacherAbout(
                    name=one.name,
                    classes=one.classes,
                    cost=teaching.costs[index] if teaching is not None else torch.empty(0),
                    gain=one.gain,
                    feature_dim=None if dims is None else dims[index],
                    tap_shapes=shapes,
                    labelled_features=None if features is None else features[index],
                    labels=None if features is None else labels,
                )
            )
        return About(classes, student.feature_dim, own, tuple(teachers), payload.heads)

    if teaching is None:  # the labels alone: what teachers are needed for has no part in it
        objective = build_objective(labels_alone(spec), about)
    else:
        objective = build_objective(spec, about)
    flow = None
    if flowing is not None and live is not None:
        flow = _flow(flowing, student, live, example)
    if live is not None:
        live.fold()
    learner = Learner(student, objective, wants=needed, taps=tuple(taps), flow=flow, flow_spec=flowing)
    return learner, live


def _flow(spec: FlowSpec, student: Student, live: Live, example: Tensor) -> FlowStudent:
    shapes = []
    for index, teacher in enumerate(live.teachers):
        shapes.append(teacher_layers(teacher, spec.layers, example))
        live.tap(index, shapes[-1])
    layers = student_layers(student, spec.layers)
    sources = default_sources(layers, shapes)
    return FlowStudent(student, Flow(layers, sources, student_share=spec.student_share))


def _finish(
    learner: Learner, live: Live | None, table: ImageTable, taught: ImageSplit, arm: Arm, device: torch.device
) -> dict[str, Tensor]:
    """Return the student's logits on its own, and where features flowed also with its teachers."""
    student = learner.student
    assert isinstance(student, Student)
    splits = {name: table.split(name) for name in TESTED}
    splits = {name: split for name, split in splits.items() if len(split)}
    found: dict[str, Tensor] = {}
    if learner.flow is not None and live is not None and arm.flow is not None:
        learner.eval()
        learner.begin(1.0)
        for name, split in splits.items():
            found[name + WITH_TEACHERS] = predict(
                lambda images: learner.look(images, live(images)), batches_of(split, _BATCH), device
            )
        generator = torch.Generator().manual_seed(seed_of(arm.seed, 6))
        rows = torch.randperm(len(taught), generator=generator)[: arm.flow.precise]
        recalibrate_batchnorm(student, (taught.images(part).to(device) for part in rows.split(_BATCH)))
    for name, split in splits.items():
        found[name] = predict(student, batches_of(split, _BATCH), device)
    return found


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
    classes: tuple[str, ...],
    predictions: Mapping[str, Tensor],
    history: list[dict[str, float]],
) -> None:
    from safetensors.torch import save_file

    folder = own(arm.folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in predictions.items()}, folder / "predictions.safetensors")
    save_student(student, folder, classes=classes)
    (folder / "history.json").write_text(json.dumps(history), encoding="utf-8")
    temporary = folder / ".done.json"
    temporary.write_text(json.dumps({"name": arm.name, "seed": arm.seed}), encoding="utf-8")
    temporary.replace(folder / "done.json")
    share(folder)
