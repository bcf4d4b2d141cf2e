"""Stage evaluate: the student on the test split, beside the same student trained otherwise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.stages import controls, training
from pipeline.stages.amalgamate import teaching_of
from pipeline.stages.artefacts import digest_of, write_json
from pipeline.stages.base import Outcome, Run
from pipeline.stages.components import component_references
from pipeline.stages.distill import control_arm, student_arm
from pipeline.stages.heads import student_classes
from pipeline.stages.recording import optional
from pipeline.stages.recording_data import record_datasets
from pipeline.stages.recording_trainings import numbers_of, record_evaluation, record_test
from pipeline.stages.report_kept import keep_trainings
from pipeline.stages.teachers import has_labels, table_of


@dataclass(frozen=True)
class Contender:
    """One way to train the student, with one arm a seed; or predictions that no training was needed for."""

    name: str
    title: str
    arms: tuple[training.Arm, ...]
    logits: Any = None


class Evaluate:
    """Student and controls → `evaluation.json`: accuracy by class, calibration, confusion, and the differences."""

    name = "evaluate"
    version = 2
    needs = ("ingest", "assess", "select", "amalgamate", "distill")

    def inputs(self, run: Run) -> Mapping[str, Any]:
        """Depend on the settings and on those of the training, which the controls share."""
        return {
            "evaluate": run.settings.evaluate.model_dump(mode="json"),
            "distill": training.decisive(run.settings.distill),
            "subtasks": run.settings.task.subtasks,
            "seed": run.settings.seed,
        }

    def run(self, run: Run, folder: Path) -> Outcome:
        """Train the controls, test all arms, compare."""
        if not len(table_of(run).split("test")):
            verdict = "not evaluated: the test split is empty (task.splits.test)"
            empty: dict[str, Any] = {"arms": [], "verdict": verdict, "classes": []}
            write_json(folder / "evaluation.json", empty)
            record_evaluation(run, folder, empty)
            return Outcome(digest=digest_of(verdict), summary={"verdict": verdict})
        record_datasets(run, table_of(run), "test")
        contenders = _contenders(run)
        arms = [arm for contender in contenders for arm in contender.arms]
        training.train(run, arms, "controls", component_references(run))
        classes = student_classes(run)
        rows: list[dict[str, Any]] = []
        for contender in contenders:
            if contender.logits is None:
                scores = [training.score(run, arm, "test") for arm in contender.arms]
            else:
                scores = [training.judge(run, contender.logits, "test")]
            for arm, found in zip(contender.arms or (None,), scores, strict=True):
                record_test(run, contender.name, contender.title, arm, numbers_of(found))
            accuracies = [found.accuracy for found in scores]
            row: dict[str, Any] = {
                "name": contender.name,
                "title": contender.title,
                "accuracies": accuracies,
                "mean": statistics.fmean(accuracies),
                "std": statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0,
                "ece": statistics.fmean(found.ece for found in scores),
                "first": scores[0].as_dict(classes),
            }
            if contender.arms and contender.arms[0].flow is not None:
                with_teachers = [training.score(run, arm, "test", with_teachers=True) for arm in contender.arms]
                row["mean_with_teachers"] = statistics.fmean(found.accuracy for found in with_teachers)
            rows.append(row)
        for row in rows[1:]:
            row |= difference(rows[0]["accuracies"], row["accuracies"])
        verdict = _verdict(run, rows)
        evaluation = {"arms": rows, "verdict": verdict, "classes": list(classes)}
        write_json(folder / "evaluation.json", evaluation)
        with optional("what the report compares"):
            keep_trainings(run, folder, contenders)
        record_evaluation(run, folder, evaluation)
        summary: dict[str, Any] = {"verdict": verdict}
        for row in rows:
            summary[f"accuracy.{row['name']}"] = row["mean"]
            summary[f"ece.{row['name']}"] = row["ece"]
            for name in ("difference", "difference_2se"):
                if row.get(name) is not None:
                    summary[f"{name}.{row['name']}"] = row[name]
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
    settings, seeds = run.settings, range(run.settings.evaluate.seeds)
    taught = teaching_of(run)[0] is not None
    dropped = run.records["distill"].summary.get("guard", {}).get("kept") == "no_teacher"
    own = tuple(student_arm(run, seed) for seed in seeds)
    alone = tuple(control_arm(run, seed) for seed in seeds) if has_labels(run) else ()
    if dropped:
        found = [Contender("student", "no teacher (the student)", alone), Contender("taught", "the faculty", own)]
    elif taught:
        found = [Contender("student", "the faculty", own)]
    elif settings.distill.start_from is not None:
        found = [Contender("student", "labels, from a teacher's weights", own)]
    else:
        found = [Contender("student", "no teacher (the student)", own)]
    wanted = settings.evaluate.controls
    if "no_teacher" in wanted and not dropped and alone and alone != own:
        found.append(Contender("no_teacher", "no teacher", alone))
    for name in wanted:
        if name == "no_teacher":
            continue
        try:
            made = controls.make(run, name)
        except ConfigError as error:
            run.display.note(f"control {name} is left out: {error}")
            continue
        arms = tuple(made.arm(seed) for seed in seeds) if made.arm is not None else ()
        found.append(Contender(name, made.title, arms, made.logits))
    return found


def _verdict(run: Run, rows: list[dict[str, Any]]) -> str:
    student = rows[0]
    if student["title"].startswith("no teacher"):
        if len(rows) > 1 and rows[1]["name"] == "taught":
            return (
                "do not transfer: the student that was taught was worse on the probe and validation images; "
                "the one that learnt from the labels alone was kept"
            )
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
    own = f"{100 * student['mean']:.1f} %"
    if "mean_with_teachers" in student:
        own += f" on its own ({100 * student['mean_with_teachers']:.1f} % with its teachers)"
    return f"student {own}: " + "; ".join(parts) if parts else own
