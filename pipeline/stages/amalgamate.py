"""Stage amalgamate: every training image gets its teacher, the least ambiguous of the faculty."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import StageError
from pipeline.stages.artefacts import digest_of
from pipeline.stages.base import Outcome, Run
from pipeline.stages.ingest import table_path
from pipeline.stages.teachers import TeacherJob, load_bridge, teacher_folder

_NONE = "none"


@dataclass(frozen=True)
class SpeakPayload:
    """What travels to the worker that runs a teacher over the training images."""

    job: TeacherJob
    bridge: str
    batch_size: int


class Amalgamate:
    """Faculty and table → `assignments.parquet` (image, teacher, ambiguity of each) and what the student is taught."""

    name = "amalgamate"
    version = 1
    needs = ("ingest", "assess", "select")

    def inputs(self, run: Run) -> Mapping[str, Any]:
        """Depend on nothing but what the former stages found."""
        return {}

    def run(self, run: Run, folder: Path) -> Outcome:
        """Run the faculty over the training images; give each image to the least ambiguous of it."""
        names = chosen(run)["chosen"]
        if not names:
            return Outcome(digest=_NONE, summary={"shares": {}})
        speak(run, names)
        digest = teach(run, names, folder)
        run.tracker.artifact(folder / "assignments.parquet")
        from pipeline.engine.teaching import Teaching

        return Outcome(digest=digest, summary={"shares": Teaching.open(folder).shares()})


def chosen(run: Run) -> dict[str, Any]:
    """Return what the stage select decided."""
    return json.loads((run.folder("select") / "faculty.json").read_text(encoding="utf-8"))


def teaching_of(run: Run) -> tuple[Path | None, str]:
    """Return where the faculty's say lies and its digest; (None, "") when no teacher was chosen."""
    digest = run.records["amalgamate"].digest
    return (None, "") if digest == _NONE else (run.folder("amalgamate"), digest)


def single_teaching(run: Run) -> tuple[str, Path, str] | None:
    """Let the best single teacher teach alone, as a control; None when it is the whole faculty.

    Returns
    -------
    name, folder, digest
    """
    choice = chosen(run)
    name = choice["best_single"]
    if name is None or choice["chosen"] == [name]:
        return None
    speak(run, [name])
    folder = run.part("alone", name, {"spoken": spoken(run, name).name})
    return name, folder, teach(run, [name], folder)


def speak(run: Run, names: Sequence[str]) -> None:
    """Run teachers over the training images, those that have not been; side by side on the cluster.

    Raises
    ------
    StageError
        If one of them fails, naming it.
    """
    missing = [name for name in names if not (spoken(run, name) / "spoken.safetensors").exists()]
    if not missing:
        return
    settings = run.settings.amalgamate
    payloads = [
        SpeakPayload(
            TeacherJob.of(run, name, spoken(run, name), settings.resources),
            str(teacher_folder(run, name)),
            settings.batch_size,
        )
        for name in missing
    ]
    from pipeline.cluster.tasks import map_tasks

    run.open_cluster()
    with run.display.bar("faculty", len(missing)) as advance:
        results = map_tasks(
            speak_one,
            payloads,
            resources={"CPU": settings.resources.cpus, "GPU": settings.resources.gpus},
            max_concurrent=settings.resources.max_concurrent,
            max_failures=settings.resources.max_failures,
            on_result=lambda index, value, error: advance(1, missing[index]),
        )
    for name, (_, error) in zip(missing, results, strict=True):
        if error is not None:
            raise StageError(f"amalgamate: teacher {name!r} failed over the training images: {error}")


def spoken(run: Run, name: str) -> Path:
    """Return the folder of what a teacher says of the training images, keyed like its assessment."""
    return run.part("spoken", name, {"assessed": teacher_folder(run, name).name})


def speak_one(payload: SpeakPayload) -> None:
    """Run one teacher over the training images; on a worker.

    Stores p over its label space (N, L) and what that stands for among the task's classes (N, C_s), in half precision.
    """
    from pipeline.data.table import ImageTable
    from pipeline.engine.arms import TAUGHT
    from pipeline.models.teacher import predict

    split = ImageTable.open(payload.job.table).split(*TAUGHT)
    bridge = load_bridge(Path(payload.bridge))
    output = predict(payload.job.load(), split.batches(payload.batch_size))
    p = bridge.distribution(output.logits, output.features)
    payload.job.save("spoken.safetensors", {"p": p.half(), "carried": bridge.carry(p).half()})


def teach(run: Run, names: Sequence[str], folder: Path) -> str:
    """Assign every training image to one of the teachers; return the digest of what the student is taught."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from safetensors.torch import load_file

    from pipeline.amalgamation.ambiguity import assign
    from pipeline.data.table import ImageTable
    from pipeline.engine.arms import TAUGHT
    from pipeline.engine.teaching import Teaching

    said = [load_file(spoken(run, name) / "spoken.safetensors") for name in names]
    carried = torch.stack([one["carried"].float() for one in said])
    carried /= carried.sum(-1, keepdim=True)  # half precision rounds the sums away from 1
    assignment = assign(carried)
    widest = max(one["p"].shape[1] for one in said)
    p = torch.stack([torch.nn.functional.pad(one["p"], (0, widest - one["p"].shape[1])) for one in said])
    ids = ImageTable.open(str(table_path(run))).split(*TAUGHT).ids
    rows = torch.arange(len(ids))
    digest = Teaching.save(
        folder,
        ids=ids,
        teachers=names,
        costs=[load_bridge(teacher_folder(run, name)).M for name in names],
        teacher=assignment.teacher,
        p=p[assignment.teacher, rows],
        target=assignment.target,
        weight=assignment.confidence,
    )
    columns = {"sample_id": ids, "teacher": [names[int(number)] for number in assignment.teacher]}
    columns |= {f"ambiguity.{name}": row.tolist() for name, row in zip(names, assignment.ambiguity, strict=True)}
    pq.write_table(pa.table(columns), folder / "assignments.parquet")
    return digest_of([digest, list(names)])
