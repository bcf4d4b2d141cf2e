"""What the report tells of classes and training: coverage, who teaches what, learning curves, losses, flow."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.stages.amalgamate import chosen
from pipeline.stages.base import Run
from pipeline.stages.recording_data import subtasks
from pipeline.stages.report_facts import Absent, needs, read_json
from pipeline.stages.report_kept import kept_trainings
from pipeline.stages.together import TOGETHER

_MOST = 7  # teachers with a colour of their own; the others are summed up
_POINTS = 200  # of a curve
_CURVES = 12  # trainings whose curves are shown


def by_class(run: Run) -> dict[str, Any]:
    """Return of each class how well the set knows it, and what the student and the one without teachers make of it."""
    needs(run, "select")
    choice = chosen(run)
    coverage: Mapping[str, float] = choice.get("coverage") or {}
    arms = []
    if "evaluate" in run.records:
        found = read_json(run.folder("evaluate") / "evaluation.json")
        wanted = {"student", "no_teacher", "taught"}
        arms = [arm for arm in found["arms"] if arm["name"] in wanted]
    names = list(dict.fromkeys([*coverage, *(label for arm in arms for label in arm["first"]["per_class"])]))
    if not names:
        raise Absent("no labelled image tells how well a class is known")
    return {
        "arms": [{"name": arm["name"], "title": arm["title"]} for arm in arms],
        "covered": bool(coverage),
        "rows": [
            {"class": name, "coverage": coverage.get(name)}
            | {arm["name"]: arm["first"]["per_class"].get(name) for arm in arms}
            for name in names
        ],
        "shares": choice.get("shares") or {},
    }


def teaching(run: Run) -> dict[str, Any]:
    """Return who teaches which class, and how unsure each teacher is; where all teach as one, who is surest of what."""
    needs(run, "amalgamate")
    path = run.folder("amalgamate") / "histograms.json"
    if not run.records["amalgamate"].summary.get("shares"):
        raise Absent("no teacher was chosen")
    groups = []
    for name, one in subtasks(read_json(path)):
        together = one["taught"].get(TOGETHER)
        # An older version did not count who is surest of what: there is nothing to tell but that all teach as one.
        counted = one["taught"] if together is None else one.get("surest", {})
        order = sorted(counted, key=lambda teacher: -sum(counted[teacher]))
        teachers = [teacher for teacher in counted if teacher in order[:_MOST]]
        others = [teacher for teacher in counted if teacher not in teachers]
        rows = [[counted[teacher][place] for teacher in teachers] for place in range(len(one["classes"]))]
        rest = [sum(counted[teacher][place] for teacher in others) for place in range(len(one["classes"]))]
        shown = [*teachers, *([TOGETHER] if together is not None else [])]
        groups.append(
            {
                "subtask": name,
                "together": together is not None,
                "teachers": teachers,
                "others": len(others),
                "classes": [
                    {"class": label, "counts": counts, "rest": left, "total": sum(counts) + left}
                    for label, counts, left in zip(one["classes"], rows, rest, strict=True)
                ]
                if counted
                else [],
                "edges": one["edges"],
                "ambiguity": {teacher: one["ambiguity"][teacher] for teacher in shown if teacher in one["ambiguity"]},
                "mean": {teacher: value for teacher, value in one.get("mean", {}).items() if teacher in shown},
            }
        )
    return {"groups": groups, "epochs": _kept_teachers(run), "single": TOGETHER}


def _kept_teachers(run: Run) -> list[float]:
    """Return how many teachers were kept for an image, epoch by epoch, where the loss drops some at random."""
    if "distill" not in run.records:
        return []
    path = run.folder("distill") / "history.json"
    rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return [row["kept_teachers"] for row in rows if "kept_teachers" in row]


def flow(run: Run) -> dict[str, Any]:
    """Return the mixing weights of each student layer over the epochs, by the names of the teachers."""
    needs(run, "distill")
    history = _history(run.folder("distill"))
    keys = [key for key in history[0] if key.startswith("flow.")]
    if not keys:
        raise Absent("no features flowed from the teachers into the student (distill.flow)")
    from pipeline.engine.teaching import Teaching

    teachers = Teaching.open(run.folder("amalgamate")).teachers
    layers: dict[str, list[dict[str, Any]]] = {}
    for key in keys:
        layer, _, source = key.removeprefix("flow.").rpartition(".")
        own = source == "student"
        name = "the student itself" if own else teachers[int(source)]
        layers.setdefault(layer, []).append({"name": name, "own": own, "values": _thin([row[key] for row in history])})
    return {
        "layers": [{"layer": layer, "lines": lines} for layer, lines in layers.items()],
        "epochs": len(history),
        "student_weight": run.records["distill"].summary.get("flow_student_weight"),
        "with_teachers": run.records["distill"].summary.get("validation_accuracy_with_teachers"),
        "accuracy": run.records["distill"].summary.get("validation_accuracy"),
    }


def training(run: Run) -> dict[str, Any]:
    """Return the losses over the epochs: of all trainings the total, of the student's every part."""
    from pipeline.report.plots import loss_parts

    needs(run, "distill")
    own = _history(run.folder("distill"))
    curves: list[dict[str, Any]] = [
        {"name": "the student", "seed": None, "own": True, "values": _thin([row["loss"] for row in own])}
    ]
    if "evaluate" in run.records:
        kept = kept_trainings(run.folder("evaluate"))
        for one in kept[:_CURVES]:
            rows = _rows(one.folder)
            if rows:
                values = _thin([row["loss"] for row in rows])
                told = {"name": one.title, "seed": one.seed, "own": one.contender == "student", "values": values}
                curves.append(told)
        if len(curves) > 1:
            curves = curves[1:]  # the student is the first of its own seeds
    found = loss_parts(own)
    return {
        "curves": curves,
        "parts": [{"name": name, "values": _thin([row.get(name, math.nan) for row in own])} for name in found],
        "rate": _thin([row["lr"] for row in own if "lr" in row]),
        "epochs": len(own),
        "skipped": own[-1].get("skipped"),
        "validation": run.records["distill"].summary.get("validation_accuracy"),
        "losses": [name for name, _ in run.settings.distill.objective.parts()],
    }


def _history(folder: Path) -> list[dict[str, float]]:
    rows = _rows(folder)
    if not rows:
        raise Absent(f"{folder.parent.name}/{folder.name}/history.json is not there")
    return rows


def _rows(folder: Path) -> list[dict[str, float]]:
    try:
        return list(json.loads((folder / "history.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return []


def _thin(values: Sequence[float]) -> list[list[float | None]]:
    """Return [epoch, value] of at most `_POINTS` epochs, the first and the last among them; None where not finite."""
    count = len(values)
    if count <= _POINTS:
        places = list(range(count))
    else:
        places = sorted({round(number * (count - 1) / (_POINTS - 1)) for number in range(_POINTS)})
    return [[place + 1, values[place] if math.isfinite(values[place]) else None] for place in places]
