"""Stage evaluate: the student on the test split, beside the same student trained otherwise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.stages import training
from pipeline.stages.amalgamate import single_teaching
from pipeline.stages.artefacts import digest_of, write_json
from pipeline.stages.base import Outcome, Run
from pipeline.stages.distill import student_arm


@dataclass(frozen=True)
class Contender:
    """One way to train the student, with one arm a seed."""

    name: str
    title: str
    arms: tuple[training.Arm, ...]


class Evaluate:
    """Student and controls → `evaluation.json`: accuracy by class, calibration, confusion, and the differences."""

    name = "evaluate"
    version = 1
    needs = ("ingest", "select", "amalgamate", "distill")

    def inputs(self, run: Run) -> Mapping[str, Any]:
        """Depend on the settings and on those of the training, which the controls share."""
        return {
            "evaluate": run.settings.evaluate.model_dump(mode="json"),
            "distill": run.settings.distill.model_dump(mode="json", exclude={"resources"}),
            "seed": run.settings.seed,
        }

    def run(self, run: Run, folder: Path) -> Outcome:
        """Train the controls, test all arms, compare."""
        from pipeline.data.table import ImageTable
        from pipeline.stages.ingest import table_path

        contenders = _contenders(run)
        training.train(run, [arm for contender in contenders for arm in contender.arms], "controls")
        classes = ImageTable.open(str(table_path(run))).classes
        rows: list[dict[str, Any]] = []
        for contender in contenders:
            scores = [training.score(run, arm, "test") for arm in contender.arms]
            accuracies = [found.accuracy for found in scores]
            rows.append(
                {
                    "name": contender.name,
                    "title": contender.title,
                    "accuracies": accuracies,
                    "mean": statistics.fmean(accuracies),
                    "std": statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0,
                    "ece": statistics.fmean(found.ece for found in scores),
                    "first": scores[0].as_dict(classes),
                }
            )
        for row in rows[1:]:
            row |= difference(rows[0]["accuracies"], row["accuracies"])
        verdict = _verdict(run, rows)
        write_json(folder / "evaluation.json", {"arms": rows, "verdict": verdict, "classes": list(classes)})
        run.tracker.artifact(folder / "evaluation.json")
        summary: dict[str, Any] = {"verdict": verdict}
        for row in rows:
            summary[f"accuracy.{row['name']}"] = row["mean"]
            summary[f"ece.{row['name']}"] = row["ece"]
        return Outcome(digest=digest_of(rows), summary=summary)


def difference(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float | None]:
    """Return the mean difference of two sets of runs, and twice its standard error (Welch; None for a single run).

    SE² = s₁²/n₁ + s₂²/n₂ with the sample variances.
    """
    error = None
    if len(ours) > 1 and len(theirs) > 1:
        variance = statistics.variance(ours) / len(ours) + statistics.variance(theirs) / len(theirs)
        error = 2 * math.sqrt(variance)
    return {"difference": statistics.fmean(ours) - statistics.fmean(theirs), "difference_2se": error}


def _contenders(run: Run) -> list[Contender]:
    settings, first = run.settings, student_arm(run)
    seeds = range(settings.evaluate.seeds)
    taught = first.teaching is not None
    title = "the faculty" if taught else "no teacher (the student)"
    found = [Contender("student", title, tuple(student_arm(run, seed) for seed in seeds))]
    if "no_teacher" in settings.evaluate.controls and taught:
        arms = tuple(training.arm(run, "no_teacher", settings.seed + seed, None, "") for seed in seeds)
        found.append(Contender("no_teacher", "no teacher", arms))
    if "best_single" in settings.evaluate.controls:
        single = single_teaching(run)
        if single is None:
            run.display.note("the best single teacher is the whole faculty, or there is none: no control of its own")
        else:
            name, folder, digest = single
            arms = tuple(training.arm(run, "best_single", settings.seed + seed, folder, digest) for seed in seeds)
            found.append(Contender("best_single", f"the best single teacher ({name})", arms))
    return found


def _verdict(run: Run, rows: list[dict[str, Any]]) -> str:
    student = rows[0]
    if student["title"].startswith("no teacher"):
        return "do not transfer: no teacher was chosen; the student was trained on the labels alone"
    parts = []
    for row in rows[1:]:
        gap, error = row["difference"], row["difference_2se"]
        if error is None:
            kind = "one seed, no interval"
        elif gap > error:
            kind = "clear"
        elif gap < -error:
            kind = "clearly worse"
        else:
            kind = "not clear"
        parts.append(f"{100 * gap:+.1f} points against {row['title']} ({kind})")
    return f"student {100 * student['mean']:.1f} %: " + "; ".join(parts) if parts else f"{100 * student['mean']:.1f} %"
