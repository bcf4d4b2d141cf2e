"""What is recorded of the teachers: a run for each one that was assessed, its transport plan, and the choice."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import TeacherError
from pipeline.stages.recording import optional, recorded
from pipeline.tracking.tracker import Tracker

if TYPE_CHECKING:
    from pipeline.stages.base import Run

_PICTURED = 20  # plans that are drawn: of the best; and those of the chosen ones, wherever they stand
_FORMER = 200  # teachers assessed by former stages that get a run in this one, too: the best; all are in the table
_SCORED = 40  # rows of the picture of scores
_COSTS = ("images", "seconds", "forward_seconds", "peak_mb", "peak_gpu_mb")
_NOT_OF_A_RUNG = {"rung", "seconds", "classes", "parameters", "forward_seconds"}


class TeacherRuns:
    """Gives each teacher one run under the stage's, however often the stage is cut off and continued.

    Which ones have theirs is kept in the stage's folder, so that a thousand teachers are not looked up again.

    Parameters
    ----------
    run : Run
        With the stage's tracker.
    folder : Path
        The stage's.
    """

    def __init__(self, run: Run, folder: Path) -> None:
        self._run, self._path = run, folder / "recorded.txt"
        self._told: set[str] = set()
        self._whole: str | None = None
        if recorded(run):
            with optional("the teachers"):
                self._whole = run.root.run_id  # another store knows nothing of what this one was told
                if self._path.exists():
                    self._told = set(self._path.read_text(encoding="utf-8").splitlines())

    def record(self, row: Mapping[str, Any]) -> None:
        """Record a teacher that has just been assessed, from its row, see `record_teacher`."""
        if not recorded(self._run):
            return
        with optional(f"teacher {row['teacher']}"):
            spec = self._run.zoo[row["teacher"]]
            about = {"licence": spec.licence, "source": spec.source.model_dump(mode="json")}
            record_teacher(self._run.tracker, row, about)
            self._tell(row["teacher"])

    def record_others(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Record teachers that have no run yet: those that a kill kept from it, and those of former stages.

        Parameters
        ----------
        rows : sequence of mappings
            Best first; those that were never run are passed over.
        """
        missing = [row for row in rows if row["images"] or row["error"]] if recorded(self._run) else []
        missing = [row for row in missing if not self._knows(row["teacher"])]
        if len(missing) > _FORMER:  # all but a few were assessed by former stages
            best = {row["teacher"] for row in rows[:_FORMER]}
            missing = [row for row in missing if row["teacher"] in best]
        for row in missing:
            self.record(row)

    def record_plans(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Record the transport plans of the best teachers, in their runs, as picture and table."""
        from pipeline.stages.plans import draw_plan, plan_rows, transport_plan

        if not recorded(self._run):
            return
        usable = [row for row in rows if row["error"] is None and row["dropped"] is None]
        for row in usable[:_PICTURED]:
            name = row["teacher"]
            if self._knows(name, "plan"):
                continue
            with optional(f"the transport plan of {name}"):
                plan = transport_plan(self._run, name)
                picture = draw_plan(self._run, row, plan)
                with self._run.tracker.run(f"teacher {name}", key=_key(row)) as tracker:
                    tracker.artifact(picture)
                    tracker.table("plan", plan_rows(plan))
                self._tell(name, "plan")

    def _knows(self, name: str, what: str = "row") -> bool:
        return f"{self._whole} {what} {name}" in self._told

    def _tell(self, name: str, what: str = "row") -> None:
        line = f"{self._whole} {what} {name}"
        if line not in self._told:
            self._told.add(line)
            with self._path.open("a", encoding="utf-8") as handle:
                handle.write(f"{line}\n")


def _key(row: Mapping[str, Any]) -> str:
    return f"assess-{row['teacher']}-{row['fingerprint'][:12]}"


def record_teacher(tracker: Tracker, row: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Record one teacher in a run of its own, which fails if the teacher did.

    Its scores stand at the rung they were taken on as the step, so that they can be followed over the rungs.

    Parameters
    ----------
    tracker : Tracker
        The stage's.
    row : mapping
        Of the assessment; it may also have ``rungs``, the JSON of its history (see `pipeline.stages.rungs`), and
        ``trial_id``.
    about : mapping
        ``licence`` and ``source``.
    """
    from pipeline.stages.assess import SCORES

    tags = {
        "teacher": row["teacher"],
        "fingerprint": row["fingerprint"],
        "licence": about["licence"],
        "outcome": outcome(row),
        "ray.trial_id": row.get("trial_id"),
    }
    params = {key: row[key] for key in ("teacher", "classes", "parameters", "precision")}
    params |= {"source": about["source"]}
    with contextlib.suppress(_Failed), tracker.run(f"teacher {row['teacher']}", key=_key(row), tags=tags) as child:
        child.params(params)
        steps = rung_metrics(row.get("rungs"), row["rung"])
        last = max(steps, default=row["rung"] or 0)
        final = {key: row[key] for key in (*SCORES, *_COSTS, "rung") if row[key] is not None}
        steps[last] = steps.get(last, {}) | final
        for step, numbers in sorted(steps.items()):
            if numbers:
                child.metrics(numbers, step=step)
        if row["error"]:
            raise _Failed(row["error"])


class _Failed(TeacherError):
    """What a teacher failed with: its run ends as failed, and nothing else does."""


def outcome(row: Mapping[str, Any]) -> str:
    """Return what became of a teacher: ``assessed``, ``dropped: WHY`` or ``failed: WHY``."""
    if row["error"]:
        return f"failed: {row['error']}"
    return f"dropped: {row['dropped']}" if row["dropped"] else "assessed"


def rung_metrics(history: str | None, last: int | None) -> dict[int, dict[str, float]]:
    """Return the numbers of every rung by step, the last of which is `last`.

    Parameters
    ----------
    history : str or None
        JSON as `pipeline.stages.rungs.assess_rung` leaves it.
    last : int or None
    """
    entries = json.loads(history) if history else []
    top = last or len(entries)
    steps: dict[int, dict[str, float]] = {}
    for back, entry in enumerate(reversed(entries)):
        numbers = {key: value for key, value in entry.items() if key not in _NOT_OF_A_RUNG}
        steps[top - back] = numbers | {"rung_seconds": entry["seconds"]}
    return steps


def record_assessment(run: Run, folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Record the table of all teachers, and a picture of the best ones' scores with their intervals."""
    from pipeline.report.plots import plot_scores

    if not recorded(run):
        return
    with optional("the assessment"):
        run.tracker.artifact(folder / "assessment.parquet")
        run.tracker.table("assessment", rows)
        if any(row["score"] is not None for row in rows[:_SCORED]):
            plot_scores(rows, folder / "scores.png")
            run.tracker.artifact(folder / "scores.png")


def record_choice(run: Run, folder: Path, choice: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> None:
    """Record who was chosen and why: tag, tables, picture, and the transport plans of the chosen ones."""
    from pipeline.report.plots import plot_scores
    from pipeline.stages.plans import picture_of

    if not recorded(run):
        return
    rows = list(rows)
    with optional("the choice"):
        run.tracker.artifact(folder / "faculty.json")
        run.tracker.tags({"chosen": ", ".join(choice["chosen"]) or "none", "verdict": choice["verdict"]})
        run.tracker.metrics({"chosen": len(choice["chosen"])})
        run.tracker.table("choice", choice_rows(choice))
        if choice["coverage"]:
            run.tracker.table(
                "coverage", [{"class": name, "known": value} for name, value in choice["coverage"].items()]
            )
    with optional("the picture of the choice"):
        if any(row["score"] is not None for row in rows):
            plot_scores(rows, folder / "scores.png", chosen=choice["chosen"])
            run.tracker.artifact(folder / "scores.png")
    by_name = {row["teacher"]: row for row in rows}
    for name in choice["chosen"][:_PICTURED]:
        with optional(f"the transport plan of {name}"):
            copy = folder / "plans" / f"{name}.png"
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(picture_of(run, by_name[name]), copy)
            run.tracker.artifact(copy, "plans")


def choice_rows(choice: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return who was chosen and who was not, and why: the chosen ones first, in their order."""
    place = {name: number for number, name in enumerate(choice["chosen"], start=1)}
    found = []
    for name in sorted(choice["reasons"], key=lambda name: place.get(name, len(place) + 1)):
        verdict = choice["verdicts"].get(name, {})
        found.append(
            {
                "teacher": name,
                "place": place.get(name),
                "why": choice["reasons"][name],
                "score": verdict.get("score"),
                "gain": verdict.get("gain"),
                "confidence": verdict.get("confidence"),
                "share": choice["shares"].get(name),
            }
        )
    return found
