"""Throughputs of former runs in the same run folder: what its stages say they took."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.config import Settings
from pipeline.planning.facts import LABELLED
from pipeline.planning.rates import Rates, Starts, points_of
from pipeline.planning.recalled import recalled
from pipeline.planning.simulate import makespan
from pipeline.planning.sizes import widths_of
from pipeline.planning.teachers import TeacherSize
from pipeline.planning.work import Work
from pipeline.stages.artefacts import Record, RunFolder
from pipeline.strict import load_yaml

_WHOLE = ("ingest", "select", "amalgamate", "register")  # of which no part is recorded apart
_LABELS = ("no_teacher", "finetune")
_SLACK = 2.0  # seconds by which the clocks of files and records may differ
# Settings that change how long a piece of work takes, by stage.
_DECISIVE: dict[str, tuple[tuple[str, ...], ...]] = {
    "assess": (("assess", "resources"), ("assess", "batch_size"), ("assess", "precision"), ("assess", "scores"),
               ("task", "image"), ("cluster",)),
    "distill": (("distill", "student"), ("distill", "objective"), ("distill", "flow"), ("distill", "augment"),
                ("distill", "resources", "num_workers"), ("distill", "resources", "cpus_per_worker"),
                ("distill", "resources", "gpus_per_worker"), ("distill", "loop", "batch_size"),
                ("distill", "loop", "labelled_batch"), ("distill", "loop", "precision"), ("distill", "loop", "parts"),
                ("task", "image"), ("cluster",)),
}  # fmt: skip
_DECISIVE["evaluate"] = _DECISIVE["distill"]


def recorded(settings: Settings, work: Work, files: RunFolder) -> Rates | None:
    """Return the throughputs that finished stages have left; None where they do not cover what the plan needs.

    Of each stage its latest record counts, where it was made under settings that do not change how long a piece of its
    work takes. What a stage took besides that work is kept as it was.
    """
    forward, besides = dict[str, float](), dict[str, float]()
    overheads: list[float] = []
    resident: int | None = None
    record = _usable(settings, files, "assess")
    if record is not None:
        forward, overheads, rest, resident = _assessed(work.teachers, record, files, settings)
        if rest is not None:
            besides["assess"] = max(rest - record.starts.get("session", 0.0), 0.0)
    steps: dict[str, list[float]] = {}
    for stage in ("distill", "evaluate"):
        record = _usable(settings, files, stage)
        if record is None:
            continue
        found = list(_trained(record, files, settings, work))
        if found:
            worked = sum(seconds for *_, seconds in found) + record.starts.get("session", 0.0)
            besides[stage] = max(record.seconds - worked, 0.0)
        for kind, step, _ in found:
            steps.setdefault(kind, []).append(step)
    for stage in _WHOLE:
        newest = files.newest(stage)
        if newest is not None:
            besides[stage] = max(newest.seconds - newest.starts.get("session", 0.0), 0.0)
    needed = {one.kind for trainings in work.trainings.values() for one in trainings}
    if not forward or not needed <= set(steps):
        return None
    sizes = {teacher.key: teacher.net for teacher in work.teachers if teacher.net is not None}
    images = work.facts.count(*LABELLED)
    widths = [two[1] for two in map(widths_of, work.teachers) if two is not None]
    middle = statistics.median(overheads) if overheads else 0.0
    rates = Rates(
        origin="recorded",
        forward=forward,
        points=points_of(forward, sizes),
        load=middle / 2,
        score=middle / 2 / (images * statistics.median(widths)) if images and widths else 0.0,
        steps={kind: statistics.median(values) for kind, values in steps.items()},
        synchronised=True,
        decode=0.0,
        besides=besides,
        whole=tuple(stage for stage in _WHOLE if stage in besides),
        resident=resident,
        notes=("stages ingest, select, amalgamate and register are taken to last as long as they did",),
    )
    # Reports of epochs are part of what the trainings took, results of trials of what the assessment did.
    starts = replace(Starts(), report=0.0, **({"result": 0.0} if "assess" in besides else {}))
    # Records of an older version have the start of Ray among the rest: nothing is added then.
    return replace(rates, starts=replace(starts, session=recalled(files.root).get("session", 0.0)))


def _usable(settings: Settings, files: RunFolder, stage: str) -> Record | None:
    """Return the latest record of a stage, where it was made under settings that count as these."""
    record = files.newest(stage)
    if record is None:
        return None
    try:
        before = load_yaml(files.finished(stage, record.key) / "settings.yaml")
    except Exception:  # damaged, or of another version: it says nothing then
        return None
    now = settings.dump()
    same = all(_at(before, path) == _at(now, path) for path in _DECISIVE[stage])
    return record if same else None


def _at(data: Any, path: Sequence[str]) -> Any:
    for key in path:
        data = data.get(key) if isinstance(data, Mapping) else None
    return data


def _assessed(
    teachers: Sequence[TeacherSize], record: Record, files: RunFolder, settings: Settings
) -> tuple[dict[str, float], list[float], float | None, int | None]:
    """Return seconds an image by architecture, what each teacher took besides, what the stage took besides all, and
    the bytes of the smallest process.
    """  # noqa: D205
    import pyarrow.parquet as pq

    keys = {teacher.name: teacher.key for teacher in teachers}
    try:
        rows = pq.read_table(files.finished("assess", record.key) / "assessment.parquet").to_pylist()
    except OSError:
        return {}, [], None, None
    rows = [row for row in rows if row["error"] is None and row["seconds"] is not None]
    looks: dict[str, list[float]] = {}
    overheads = []
    for row in rows:
        # A teacher whose answers were in the cache was not run.
        if row["forward_seconds"] and row["images"] and row["teacher"] in keys:
            looks.setdefault(keys[row["teacher"]], []).append(row["forward_seconds"] / row["images"])
            overheads.append(max(row["seconds"] - row["forward_seconds"], 0.0))
    rest = None
    if rows and record.summary.get("assessed_now") == record.summary.get("teachers"):
        slots = _side_by_side(settings, len(rows))
        rest = max(record.seconds - makespan([row["seconds"] for row in rows], slots), 0.0)
    peaks = [row["peak_mb"] for row in rows if row["peak_mb"]]
    resident = int(min(peaks) * 2**20) if peaks else None
    return {key: statistics.median(values) for key, values in looks.items()}, overheads, rest, resident


def _side_by_side(settings: Settings, teachers: int) -> int:
    from pipeline.planning.described import this_machine

    resources = settings.assess.resources
    room = this_machine(settings.cluster).slots({"CPU": resources.cpus, "GPU": resources.gpus}) or 1
    return max(1, min(teachers, resources.max_concurrent or teachers, room))


def _trained(record: Record, files: RunFolder, settings: Settings, work: Work) -> Iterator[tuple[str, float, float]]:
    """Yield kind, seconds of a step and of all epochs of every training that a stage has done.

    Whatever was finished while the stage ran was its own.
    """
    began, ended = record.finished - record.seconds - _SLACK, record.finished + _SLACK
    for done in sorted((files.root / "students").glob("*/done.json")):
        if not began <= os.path.getmtime(done) <= ended:
            continue
        name = done.parent.name.partition("-seed")[0]
        kind = "labels" if name in _LABELS else "component" if name.startswith("component") else "taught"
        loop = settings.distill.loop
        if kind == "component":
            loop = settings.amalgamate.components.loop or loop
        # As the loop counts them for its images a second.
        images = loop.labelled_batch * bool(work.facts.count("train_labelled")) + loop.batch_size * (kind != "labels")
        found = _history(done.parent, images)
        if found is not None:
            yield kind, *found


def _history(folder: Path, images: int) -> tuple[float, float] | None:
    """Return the median seconds of a step and the seconds of all epochs; `images` are those of a step."""
    try:
        epochs = json.loads((folder / "history.json").read_text(encoding="utf-8"))
        seconds = [float(epoch["seconds"]) for epoch in epochs]
        steps = [float(epoch["images_per_second"]) * float(epoch["seconds"]) / images for epoch in epochs]
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return None
    if not seconds or min(steps) <= 0:
        return None
    return statistics.median(taken / count for taken, count in zip(seconds, steps, strict=True)), sum(seconds)
