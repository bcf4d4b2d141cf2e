"""Trainings on the cluster: which arms there are, where each one's result lies, and the call that trains them."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import DistillSettings, LoopSpec, ObjectiveSpec
from pipeline.data.mirror import here
from pipeline.engine.objective_spec import labels_alone
from pipeline.engine.spec import NOT_DECISIVE, Arm
from pipeline.places import join
from pipeline.stages.artefacts import digest_of
from pipeline.stages.base import Run
from pipeline.stages.heads import heads_of, student_classes
from pipeline.stages.ingest import table_path
from pipeline.stages.own import code_of
from pipeline.stages.recording_trainings import TrainingRuns, title_of
from pipeline.stages.teachers import TeacherJob, table_of

if TYPE_CHECKING:
    import torch

    from pipeline.engine.arms import ArmsPayload, TeacherReference
    from pipeline.engine.evaluation import Evaluation, HeadsEvaluation
    from pipeline.models.spec import StudentSpec


def arm(
    run: Run,
    name: str,
    seed: int,
    teaching: Path | None,
    digest: str,
    *,
    objective: ObjectiveSpec | None = None,
    student: StudentSpec | None = None,
    loop: LoopSpec | None = None,
    start_from: str | None = None,
    part: str = "",
) -> Arm:
    """Describe one training; its folder is keyed by all that its result depends on.

    Parameters
    ----------
    run : Run
    name : str
        What kind of training it is: ``faculty``, ``no_teacher``, ``best_single``, …
    seed : int
    teaching : Path or None
        Where the teachers' say lies.
    digest : str
        Hash of what they say; "" without teachers.
    objective, student, loop
        Instead of those of the settings.
    start_from : str, optional
        Teacher whose weights the student starts from.
    part : str
        The sub-task that it is a component net of; "" for a student.
    """
    settings = run.settings.distill
    loss = objective or settings.objective
    flow = settings.flow if teaching is not None and not part else None
    if teaching is None:
        loss = labels_alone(loss)
    folder = run.part(
        "students",
        f"{name}-seed{seed}",
        {
            "table": run.records["ingest"].digest,
            "teaching": digest,
            "student": (student or settings.student).model_dump(mode="json"),
            "loop": (loop or settings.loop).model_dump(mode="json", exclude=set(NOT_DECISIVE)),
            "objective": _loss(loss),
            "flow": None if flow is None else flow.model_dump(mode="json"),
            "augment": settings.augment.model_dump(mode="json"),
            "start": None if start_from is None else run.fingerprint(start_from),
            "subtasks": run.settings.task.subtasks,
            "part": part,
            "seed": seed,
            "version": 3,
        },
    )
    start = None if start_from is None else TeacherJob.of(run, start_from, folder, run.settings.amalgamate.resources)
    return Arm(
        folder.name,
        seed,
        str(folder),
        str(teaching) if teaching is not None else None,
        objective=loss,
        flow=flow,
        student=student,
        start=start,
    )


def decisive(settings: DistillSettings) -> dict[str, Any]:
    """Return the settings that a student depends on."""
    found = settings.model_dump(mode="json", exclude={"resources": True, "loop": set(NOT_DECISIVE)})
    return found | {"objective": _loss(settings.objective)}


def _loss(objective: ObjectiveSpec) -> dict[str, Any]:
    """Return the settings of a loss, and the code of what is one's own in it."""
    code = code_of(objective.own)
    return objective.model_dump(mode="json") | ({"code": code} if code else {})


def payload_of(
    run: Run, arms: Sequence[Arm], teachers: Mapping[str, TeacherReference] | None = None, **changes: Any
) -> ArmsPayload:
    """Return what travels to the workers that train these arms.

    Parameters
    ----------
    run : Run
    arms : sequence of Arm
    teachers : mapping of str to TeacherReference, optional
        Where live teachers come from; by default the run's zoo.
    **changes
        Fields of `ArmsPayload` instead of the settings'.
    """
    from pipeline.engine.arms import ArmsPayload
    from pipeline.engine.objectives import wants
    from pipeline.engine.teaching import Teaching

    settings = run.settings.distill
    live = dict(teachers or {})
    for item in arms:
        assert item.objective is not None
        if item.teaching is not None and (item.flow is not None or "live" in wants(item.objective)):
            for name in Teaching.open(item.teaching).teachers:
                if name not in live:
                    live[name] = TeacherJob.of(run, name, Path(item.folder), _beside(run))
    fields: dict[str, Any] = {
        "student": settings.student,
        "loop": settings.loop,
        "objective": settings.objective,
        "heads": heads_of(run),
        "classes": student_classes(run),
    }
    return ArmsPayload(
        arms=tuple(arms), table=str(table_path(run)), augment=settings.augment, teachers=live, **(fields | changes)
    )


def _beside(run: Run) -> Any:
    """Return the resources of a teacher that runs beside a student: it is put on the student's device by the loop."""
    return run.settings.amalgamate.resources.model_copy(update={"gpus": 0.0})


def train(
    run: Run,
    arms: Sequence[Arm],
    title: str,
    teachers: Mapping[str, TeacherReference] | None = None,
    *,
    own: Arm | None = None,
) -> None:
    """Train those arms that are not done, in one worker group; a group that was cut off continues where it was.

    Parameters
    ----------
    run : Run
    arms : sequence of Arm
        All that the stage uses: each has a record of its own, see `pipeline.stages.recording_trainings`.
    title : str
        Of the progress bar.
    teachers : mapping of str to TeacherReference, optional
        See `payload_of`.
    own : Arm, optional
        The one whose epochs are the stage's own.
    """
    missing = [item for item in arms if not item.done]
    name = f"{title}-{digest_of([item.name for item in arms])[:12]}"
    loop = run.settings.distill.loop.model_dump(mode="json")
    storage = {join(run.files.storage, name): missing}
    with TrainingRuns(run, arms, loop=loop, own=own, storage=storage) as runs:
        if missing:
            _fit(run, missing, title, name, teachers, runs)


def _fit(
    run: Run,
    missing: Sequence[Arm],
    title: str,
    name: str,
    teachers: Mapping[str, TeacherReference] | None,
    runs: TrainingRuns,
) -> None:
    from pipeline.cluster.train import fit
    from pipeline.engine.arms import train_arms

    settings = run.settings.distill
    workers = settings.resources
    payload = payload_of(run, missing, teachers)
    seen = {"done": 0}
    if workers.num_workers:
        run.open_cluster()
    run.files.push()
    images = [images_of(run, item) for item in missing]
    epochs = settings.loop.epochs
    with run.display.bar(title, len(missing) * epochs, "images", work=float(sum(images) * epochs)) as advance:
        if run.display.moving and workers.num_workers:
            advance(0, f"starting {workers.counts[-1]} workers")

        reported: list[float] = []
        began = time.perf_counter()

        def on_report(metrics: dict[str, Any]) -> None:
            if "epoch" not in metrics:  # of a checkpoint within an epoch
                return
            if not reported:
                reported.append(time.perf_counter() - began - float(metrics.get("seconds", 0.0)))
            number, epoch = int(metrics["arm"]), int(metrics["epoch"])
            told = f"{title_of(missing[number])}, loss {metrics['loss']:.3f}"
            # After a restart some epochs are reported again: the bar only moves forward. Those that were there already
            # tell nothing of how long the others take.
            done = number * epochs + epoch
            for step in range(seen["done"], done):
                advance(1, told, images[step // epochs], metrics.get("seconds") if step == done - 1 else 0.0)
            seen["done"] = max(seen["done"], done)
            runs.end_others(missing[number])  # they follow each other
            runs.report(missing[number], metrics)

        fit(
            train_arms,
            payload,
            name=name,
            on_report=on_report,
            num_workers=workers.num_workers,
            max_failures=workers.max_failures,
            storage=run.files.storage,
            verbose=run.verbose,
            use_gpu=workers.gpus_per_worker > 0,
            resources_per_worker=resources_per_worker(run),
            on_term=True,
        )
        if workers.num_workers and reported:
            run.timed["group"] = max(reported[0], 0.0)


def images_of(run: Run, item: Arm, loop: LoopSpec | None = None) -> int:
    """Return how many images a training goes through in an epoch: the labelled ones, and those that teachers teach."""
    from pipeline.engine.arms import LABELLED, TAUGHT

    table, loop = table_of(run), loop or run.settings.distill.loop
    steps = math.ceil(len(table.split(*TAUGHT)) / loop.batch_size)
    labelled = loop.labelled_batch * bool(len(table.split(*LABELLED)))
    return steps * (labelled + loop.batch_size * (item.teaching is not None))


def resources_per_worker(run: Run) -> dict[str, float]:
    """Return what each training worker takes of the cluster, as Ray names it."""
    workers = run.settings.distill.resources
    gpus = {"GPU": workers.gpus_per_worker} if workers.gpus_per_worker else {}
    return {"CPU": workers.cpus_per_worker} | gpus


def predictions(item: Arm) -> dict[str, torch.Tensor]:
    """Return the logits of a trained arm by split; `.with_teachers` where features flowed in from teachers."""
    from safetensors.torch import load_file

    return load_file(here(Path(item.folder) / "predictions.safetensors"))


def history(item: Arm) -> list[dict[str, float]]:
    """Return the metrics of every epoch of a trained arm."""
    return json.loads(here(Path(item.folder) / "history.json").read_text(encoding="utf-8"))


def score(run: Run, item: Arm, split: str, *, with_teachers: bool = False) -> Evaluation | HeadsEvaluation:
    """Evaluate a trained arm on a split."""
    from pipeline.engine.arms import WITH_TEACHERS

    return judge(run, predictions(item)[split + (WITH_TEACHERS if with_teachers else "")], split)


def judge(run: Run, logits: torch.Tensor, split: str) -> Evaluation | HeadsEvaluation:
    """Evaluate logits on a split: the mean over the sub-tasks where there are several."""
    from pipeline.engine.evaluation import evaluate, evaluate_heads
    from pipeline.stages.teachers import table_of

    labels, heads = table_of(run).split(split).labels, heads_of(run)
    return evaluate_heads(logits, labels, heads) if heads else evaluate(logits, labels)
