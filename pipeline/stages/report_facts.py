"""What the report tells, gathered from a run's artefacts as plain values: verdict, ranking, transport, cost, lineage.

What concerns single images and the training is in `report_images` and `report_training`. A part whose artefacts are
not there is left out with the reason, see `parts`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import FacultyError
from pipeline.stages.amalgamate import chosen
from pipeline.stages.artefacts import Record
from pipeline.stages.assess import SCORES, rows_of
from pipeline.stages.base import Run
from pipeline.stages.report_kept import kept_credits
from pipeline.tracking.redact import one_line, redact

Part = Callable[[Run], dict[str, Any]]

_TEACHERS = 2000  # rows of the ranking: of more the best, and the chosen ones
_PLANS = 8  # teachers whose transport plans are shown: the chosen ones, then the best
_SOURCES = 5  # classes of the teacher that are shown of each class of the task, where not all fit
_CELLS = 2500  # of a plan up to which all of it is shown
_NOT_SCORES = {"score_low", "score_high", "num_parameters", "class_level"}
_CONTROLS = {
    "no_teacher": "no teacher",
    "best_single": "best single teacher",
    "ensemble": "the set itself, no student",
}


class Absent(FacultyError):
    """Why a part of the report is left out."""


def parts(run: Run, wanted: Mapping[str, Part]) -> dict[str, dict[str, Any]]:
    """Gather parts of the report; one that can't be told is ``{"missing": why}``."""
    found: dict[str, dict[str, Any]] = {}
    for name, gather in wanted.items():
        try:
            found[name] = gather(run)
        except Absent as error:
            found[name] = {"missing": str(error)}
        except Exception as error:  # a report tells what it can: no artefact is worth losing all others for
            found[name] = {"missing": f"it can't be told ({type(error).__name__}: {one_line(error)})"}
    return found


def needs(run: Run, *stages: str) -> None:
    """Raise `Absent` unless the run has the results of some stages."""
    missing = [stage for stage in stages if stage not in run.records]
    if missing:
        raise Absent(f"the stage {missing[0]} has not run")


def read_json(path: Path) -> Any:
    """Read a JSON file of the run.

    Raises
    ------
    Absent
        When it is not there, or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise Absent(f"{path.parent.parent.name}/{path.parent.name}/{path.name} is not there") from None
    except ValueError:
        raise Absent(f"{path.parent.parent.name}/{path.parent.name}/{path.name} is damaged") from None


def head(run: Run) -> dict[str, Any]:
    """Return what the page is called, and when what it tells was computed."""
    from pipeline.stages.recording import version

    records = run.records
    return {
        "name": run.settings.name,
        "version": version(),
        "run_dir": redact(run.files.place),
        "finished": max(record.finished for record in records.values()),
        "stages": list(records),
        "keys": {name: record.key for name, record in records.items()},
    }


def verdict(run: Run) -> dict[str, Any]:
    """Return what came out: the student with an interval, beside all that it was compared with.

    Intervals of accuracies are two standard errors of the mean over the trainings, SE = s / √n; of a single training
    those of its N test images, SE = √(p (1 − p) / N). Differences likewise: over trainings as the stage evaluate has
    them, of single ones in pairs over the test images.
    """
    found: dict[str, Any] = {"stages": list(run.records), "arms": [], "comparisons": [], "figure": None}
    if "ingest" in run.records:
        found["data"] = run.records["ingest"].summary
    if "assess" in run.records:
        found["assessed"] = run.records["assess"].summary
        with contextlib.suppress(FacultyError):  # its table has gone: the ranking says so
            found["best"] = next((row for row in rows_of(run) if row["score"] is not None), None)
    if "select" in run.records:
        choice = read_json(run.folder("select") / "faculty.json")
        found["choice"] = {name: choice.get(name) for name in ("chosen", "verdict", "best_single", "score")}
        found["choice"] |= {name: choice.get(name) for name in ("score_interval", "reference_score")}
        found["choice"] |= {"by_score": [choice["verdicts"].get(name, {}).get("score") for name in choice["chosen"]]}
    if "distill" in run.records:
        found["guard"] = run.records["distill"].summary.get("guard")
        found["taught"] = run.records["distill"].summary.get("taught")
    if "evaluate" not in run.records:
        return found
    evaluation = read_json(run.folder("evaluate") / "evaluation.json")
    found["sentence"] = evaluation["verdict"]
    if not evaluation["arms"]:
        return found
    found["arms"] = _arms(run, evaluation["arms"])
    found["figure"] = found["arms"][0]
    found["comparisons"] = [*_comparisons(run, found["arms"]), _champion(run.records.get("register"), run)]
    return found


def _arms(run: Run, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    credits = kept_credits(run.folder("evaluate"))
    arms = []
    for row in rows:
        values, images = row["accuracies"], row["first"]["samples"]
        error, over = _error(row["mean"], row["std"], len(values), images)
        arm = {name: row[name] for name in ("name", "title", "mean", "accuracies", "ece")}
        arm |= {"low": row["mean"] - 2 * error, "high": row["mean"] + 2 * error, "over": over, "images": images}
        arm["with_teachers"] = row.get("mean_with_teachers")
        if row.get("difference") is not None:
            arm |= _difference(row, credits, rows[0]["name"], images)
        arms.append(arm)
    return arms


def _error(mean: float, deviation: float, seeds: int, images: int) -> tuple[float, str]:
    if seeds > 1:
        return deviation / math.sqrt(seeds), f"{seeds} trainings"
    return math.sqrt(max(mean * (1 - mean), 0.0) / images), f"{images:,} test images"


def _difference(row: Mapping[str, Any], credits: Mapping[str, Any], own: str, images: int) -> dict[str, Any]:
    gap, error, over = row["difference"], row.get("difference_2se"), f"{len(row['accuracies'])} trainings"
    if error is None and {own, row["name"]} <= credits.keys():
        from pipeline.stages.gate import paired

        gap, one = paired(credits[own], credits[row["name"]])
        error, over = 2 * one, f"{images:,} test images, in pairs"
    if error is None:
        outcome = "no interval"
    else:
        outcome = "clear" if gap > error else "clearly worse" if gap < -error else "not clear"
    return {"difference": gap, "error": error, "difference_over": over, "outcome": outcome}


def _comparisons(run: Run, arms: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    by_name, found = {arm["name"]: arm for arm in arms[1:]}, []
    for name, title in _CONTROLS.items():
        arm = by_name.get(name)
        if arm is not None:
            keys = ("difference", "error", "difference_over", "outcome", "mean")
            found.append({"against": title, "title": arm["title"]} | {key: arm.get(key) for key in keys})
        else:
            found.append({"against": title, "title": "", "why": _why_not(run, name, arms)})
    return found


def _why_not(run: Run, name: str, arms: Sequence[Mapping[str, Any]]) -> str:
    if name == "no_teacher" and arms[0]["title"].startswith("no teacher"):
        return "the student is itself the one without teachers"
    if "select" in run.records:
        names = chosen(run)["chosen"]
        if not names:
            return "no teacher was chosen"
        if name == "best_single" and len(names) == 1:
            return f"the faculty is {names[0]} alone"
    if name in run.settings.evaluate.controls:
        return "it does not apply to this run"
    return f"not measured; add {name} to evaluate.controls"


def _champion(record: Record | None, run: Run) -> dict[str, Any]:
    found: dict[str, Any] = {"against": "champion", "title": ""}
    if record is None:
        return found | {"why": "not registered"}
    decision = read_json(run.folder("register") / "registered.json").get("decision")
    hurdles = [one for one in (decision or {}).get("hurdles", []) if one["against"] == "champion"]
    if not hurdles:
        return found | {"why": "it was not asked"}
    one = hurdles[0]
    if one["difference"] is None:
        return found | {"why": one["why"]}
    error = None if one["standard_error"] is None else 2 * one["standard_error"]
    return found | {
        "title": f"version {one['version']}",
        "difference": one["difference"],
        "error": error,
        "difference_over": f"{one['images']:,} test images, in pairs",
        "outcome": {"passed": "clear", "failed": "not passed"}.get(one["outcome"], one["outcome"]),
        "mean": one["theirs"],
    }


def ranking(run: Run) -> dict[str, Any]:
    """Return the teachers, best first, with their scores, and why each was chosen or not."""
    needs(run, "assess")
    rows = rows_of(run)
    choice = chosen(run) if "select" in run.records else {"chosen": [], "reasons": {}, "verdicts": {}}
    place = {name: number for number, name in enumerate(choice["chosen"], start=1)}
    shown = [row for number, row in enumerate(rows) if number < _TEACHERS or row["teacher"] in place]
    scores = score_names(rows)
    keys = ("teacher", "classes", "parameters", "images", "score_low", "score_high", "dropped", "error", "seconds")
    return {
        "teachers": len(rows),
        "scores": scores,
        "labels": run.records["assess"].summary["labels"],
        "rows": [
            {key: row.get(key) for key in (*keys, *scores)}
            | {
                "rank": rank,
                "place": place.get(row["teacher"]),
                "why": choice["reasons"].get(row["teacher"], row.get("error") or row.get("dropped") or ""),
                "gain": choice["verdicts"].get(row["teacher"], {}).get("gain"),
            }
            for rank, row in enumerate(shown, start=1)
        ],
        "chosen": choice["chosen"],
    }


def score_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the scores that any of the teachers has: ours, the settings' own, then those of the literature."""
    own = [name for row in rows[:1] for name in row if name.startswith("own.")]
    names = dict.fromkeys([SCORES[0], *own, *SCORES])
    return [name for name in names if name not in _NOT_SCORES and any(row.get(name) is not None for row in rows)]


def agreement(run: Run) -> dict[str, Any]:
    """Return Spearman's rank correlations between the scores, over the teachers that have both.

    ρ is Pearson's correlation of the ranks, ties at their mean; None with fewer than three teachers, or a score that
    is the same for all. Scores of which lower is better (the transport cost) are turned around.
    """
    needs(run, "assess")
    import numpy as np

    rows = [row for row in rows_of(run) if row["error"] is None and row["dropped"] is None]
    names = score_names(rows)
    if len(rows) < 3 or len(names) < 2:
        raise Absent("it takes two scores and three teachers that were assessed to the end")
    values = np.array([[np.nan if row.get(name) is None else row[name] for name in names] for row in rows], float)
    values[:, [name == "transport_cost" for name in names]] *= -1
    matrix = [[rank_correlation(values[:, i], values[:, j]) for j in range(len(names))] for i in range(len(names))]
    return {"names": names, "matrix": matrix, "teachers": len(rows)}


def rank_correlation(left: Any, right: Any) -> float | None:
    """Return Spearman's ρ of two vectors (n,), over the places where neither is NaN; None where it is not defined."""
    import numpy as np

    both = ~(np.isnan(left) | np.isnan(right))
    if both.sum() < 3:
        return None
    first, second = (_ranks(values[both]) for values in (left, right))
    if first.std() == 0 or second.std() == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])


def _ranks(values: Any) -> Any:
    import numpy as np

    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def transport(run: Run) -> dict[str, Any]:
    """Return of the chosen and the best teachers which share of each class of the task lies on which of theirs."""
    needs(run, "assess")
    from pipeline.stages.plans import transport_plan

    rows = [row for row in rows_of(run) if row["error"] is None and row["dropped"] is None]
    names = chosen(run)["chosen"] if "select" in run.records else []
    known = {row["teacher"] for row in rows}
    order = [name for name in names if name in known]
    order += [row["teacher"] for row in rows if row["teacher"] not in set(names)]
    plans, troubles = [], []
    for name in order[:_PLANS]:
        try:
            plan = transport_plan(run, name)
        except (FacultyError, OSError, KeyError) as error:
            troubles.append(f"{name}: {one_line(error)}")
            continue
        shown = matrix_of_plan(plan.mass.numpy(), plan.sources)
        plans.append({"teacher": name, "chosen": name in names} | shown)
    if not plans:
        raise Absent(f"what the teachers said is no longer there ({'; '.join(troubles[:1]) or 'none was assessed'})")
    return {"plans": plans, "targets": list(plan.targets), "of": len(rows), "troubles": troubles}


def matrix_of_plan(mass: Any, sources: Sequence[str]) -> dict[str, Any]:
    """Return the shares of a plan (L, C) as cells [row, column, share], column by column those that are largest.

    Rows come in the order of the column that they give most to, so that a plan between related classes is a band.
    """
    import numpy as np

    total = mass.sum(0, keepdims=True)
    shares = np.divide(mass, total, out=np.zeros_like(mass, dtype=float), where=total > 0)
    whole = shares.size <= _CELLS
    if whole:
        kept = shares > 0.0005
    else:
        largest = np.argpartition(-shares, min(_SOURCES, len(shares) - 1), axis=0)[:_SOURCES]
        kept = np.zeros(shares.shape, bool)
        np.put_along_axis(kept, largest, True, axis=0)
        kept &= shares >= 0.005
    rows = np.arange(len(shares)) if whole else np.flatnonzero(kept.any(1))
    order = rows[np.lexsort((-shares[rows].max(1), shares[rows].argmax(1)))]
    number = {int(row): place for place, row in enumerate(order)}
    cells = [[number[int(i)], int(j), round(float(shares[i, j]), 3)] for i, j in zip(*np.nonzero(kept), strict=True)]
    return {"rows": [sources[row] for row in order], "cells": cells, "whole": whole, "of": len(shares)}


def cost(run: Run) -> dict[str, Any]:
    """Return what each stage took, and beside it what was planned where a plan was made."""
    from pipeline.planning.against import FILE, against

    stages = [{"stage": name, "seconds": record.seconds} for name, record in run.records.items()]
    found: dict[str, Any] = {"stages": stages, "against": against(run.files.root)}
    found["planned"] = (run.files.root / FILE).is_file()
    found |= dict.fromkeys(("peak_mb", "peak_gpu_mb", "images_per_second"))
    if "assess" in run.records:
        with contextlib.suppress(FacultyError):  # its table has gone: the ranking says so
            rows = rows_of(run)
            found["peak_mb"] = max((row["peak_mb"] for row in rows if row["peak_mb"]), default=None)
            found["peak_gpu_mb"] = max((row["peak_gpu_mb"] for row in rows if row.get("peak_gpu_mb")), default=None)
    if "distill" in run.records:
        found["images_per_second"] = run.records["distill"].summary.get("images_per_second")
    return found


def lineage(run: Run) -> dict[str, Any]:
    """Return what the results were made from; without credentials."""
    from pipeline.tracking.entries import clean_document

    registered: dict[str, Any] = {}
    if "register" in run.records:
        registered = read_json(run.folder("register") / "registered.json")
    kept = registered.get("lineage") or {}
    if "run" not in kept and len(run.zoo) and {"evaluate", "distill"} <= run.records.keys():
        from pipeline.stages.lineage import lineage_of

        kept = lineage_of(run)
    ingest = run.records.get("ingest")
    found = {
        "data": kept.get("data", {}) | {"fingerprint": ingest.digest if ingest else None},
        "images": {} if ingest is None else ingest.summary,
        "teachers": kept.get("teachers", {}),
        "teaching": kept.get("teaching"),
        "code": kept.get("code", {}),
        "run": kept.get("run", {}),
        "registered": {key: registered.get(key) for key in ("name", "version", "alias", "uri", "gate", "why")},
        "stages": {name: {"key": one.key, "digest": str(one.digest)} for name, one in run.records.items()},
        "here": {"python": platform.python_version(), "system": platform.platform(), **_versions()},
    }
    cleaned: dict[str, Any] = clean_document(found)
    return cleaned


def _versions() -> dict[str, str]:
    found = {}
    for name in ("faculty", "torch", "torchvision", "ray", "mlflow", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def settings(run: Run) -> dict[str, Any]:
    """Return the settings: by dotted path, and as they can be given with ``-c``."""
    import yaml

    from pipeline.stages.artefacts import flatten

    data = run.settings.dump()
    text = redact(yaml.safe_dump(data, sort_keys=False, allow_unicode=True))
    flat = {name: redact(str(value)) for name, value in flatten(data).items()}
    return {"yaml": text, "flat": flat, "seed": run.settings.seed}
