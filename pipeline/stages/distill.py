"""Stage distill: the student is trained by its faculty, data-parallel on the cluster."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.mirror import here
from pipeline.errors import ConfigError
from pipeline.stages import training
from pipeline.stages.amalgamate import chosen, teaching_of
from pipeline.stages.artefacts import digest_of_file, write_json
from pipeline.stages.base import Outcome, Run
from pipeline.stages.components import component_references
from pipeline.stages.recording import optional
from pipeline.stages.recording_data import record_datasets
from pipeline.stages.recording_trainings import record_student
from pipeline.stages.teachers import has_labels, table_of

if TYPE_CHECKING:
    from pipeline.engine.spec import Arm

_JUDGES = ("probe", "validation")


class Distill:
    """Table and what the faculty says → `model.safetensors`, `student.json`, history and predictions."""

    name = "distill"
    version = 2
    needs = ("ingest", "select", "amalgamate")

    def inputs(self, run: Run) -> Mapping[str, Any]:
        """Depend on the settings without resources, and the seed."""
        return {
            "distill": training.decisive(run.settings.distill),
            "subtasks": run.settings.task.subtasks,
            "seed": run.settings.seed,
        }

    def run(self, run: Run, folder: Path) -> Outcome:
        """Train, or continue to train, one student; and the same without teachers, where that guards it."""
        arm = student_arm(run)
        guards = [control_arm(run)] if guarded(run) else []
        record_datasets(run, table_of(run), "training", "validation")
        training.train(run, [arm, *guards], "epochs", component_references(run), own=arm)
        kept, guard = (arm, None) if not guards else choose(run, arm, guards[0])
        for path in here(kept.folder).iterdir():
            if path.name != "done.json":
                shutil.copy2(path, folder / path.name)
        history = training.history(kept)
        summary: dict[str, Any] = {
            "parameters": _parameters(folder),
            "epochs": len(history),
            "loss": history[-1]["loss"],
            "images_per_second": history[-1]["images_per_second"],
            "taught": kept.teaching is not None,
        }
        if has_labels(run):
            summary["validation_accuracy"] = training.score(run, kept, "validation").accuracy
        if guard is not None:
            write_json(folder / "guard.json", guard)
            summary["guard"] = guard
        record_student(run, kept, [arm, *guards], folder)
        if kept.flow is not None:
            summary |= _flow_summary(run, kept, history, folder)
        return Outcome(digest=digest_of_file(folder / "model.safetensors"), summary=summary)


def student_arm(run: Run, seed: int = 0) -> Arm:
    """Return the training of the student itself; further seeds of it serve the evaluation."""
    teaching, digest = teaching_of(run)
    if teaching is None and not has_labels(run):
        raise ConfigError(
            "distill: no teacher was chosen and the task has no labels, so there is nothing to learn from; name "
            "teachers with select.teachers, or give labels"
        )
    start = start_teacher(run)
    name = "faculty" if teaching is not None else "no_teacher" if start is None else "finetune"
    return training.arm(
        run, name, run.settings.seed + seed, teaching, digest, student=student_spec(run, start), start_from=start
    )


def control_arm(run: Run, seed: int = 0) -> Arm:
    """Return the training of the same student without teachers."""
    start = start_teacher(run)
    student = student_spec(run, start)  # the same architecture, with fresh weights
    return training.arm(run, "no_teacher", run.settings.seed + seed, None, "", student=student)


def start_teacher(run: Run) -> str | None:
    """Return the teacher whose weights the student starts from; None for fresh weights.

    Raises
    ------
    ConfigError
        When the zoo has no such teacher.
    """
    name = run.settings.distill.start_from
    if name == "best_single":
        return chosen(run)["best_single"]
    if name is not None and name not in run.zoo.names:
        raise ConfigError(f"distill.start_from: the zoo has no teacher {name!r}; give one of it, or best_single")
    return name


def student_spec(run: Run, start: str | None) -> Any:
    """Return the student's architecture: that of the settings, or of the teacher that it starts from."""
    if start is None:
        return run.settings.distill.student
    from pipeline.models.student import student_like

    return student_like(run.zoo[start])


def guarded(run: Run) -> bool:
    """Return whether the student is compared with one that had no teachers."""
    return run.settings.distill.guard is not None and has_labels(run) and teaching_of(run)[0] is not None


def choose(run: Run, taught: Arm, alone: Arm) -> tuple[Arm, dict[str, Any]]:
    """Return the training whose student is handed on, and why.

    The student without teachers is taken when mean(d) > guard · s / √n, with d_i in {−1, 0, 1} the difference of the
    two students' hits on the n probe and validation images and s its standard deviation: on few images a taught
    student must be clearly worse to be dropped.
    """
    import torch

    threshold = run.settings.distill.guard
    assert threshold is not None
    differences = torch.cat([_hits(run, alone, split) - _hits(run, taught, split) for split in _JUDGES])
    gap, count = float(differences.mean()), len(differences)
    error = float(differences.std(correction=0)) / math.sqrt(count)
    worse = gap > threshold * error and gap > 0
    found = {"kept": "no_teacher" if worse else "taught", "advantage": -gap, "standard_error": error, "images": count}
    return (alone if worse else taught), found


def _hits(run: Run, arm: Arm, split: str) -> Any:
    """Return which images of a split a student gets right, (N,) or over all heads; 1 or 0."""
    import torch

    from pipeline.stages.heads import heads_of

    logits, labels = training.predictions(arm)[split], table_of(run).split(split).labels
    heads = heads_of(run)
    if not heads:
        return (logits.argmax(1) == labels).double()
    parts = []
    for head in heads:
        own = torch.tensor([*head.members, -1])[labels]
        parts.append((logits[:, head.place].argmax(1) == own)[own >= 0].double())
    return torch.cat(parts)


def _parameters(folder: Path) -> int:
    from pipeline.models.student import load_student

    return load_student(folder, trusted_factories=None).num_parameters


def _flow_summary(run: Run, arm: Arm, history: list[dict[str, float]], folder: Path) -> dict[str, Any]:
    """Return and draw what became of the teachers' features: weights over time, accuracy with and without them."""
    from pipeline.engine.teaching import Teaching
    from pipeline.report.plots import plot_flow

    assert arm.teaching is not None
    with optional("the flow"):
        plot_flow(history, Teaching.open(arm.teaching).teachers, folder / "flow.png")
        run.tracker.artifact(folder / "flow.png")
    own = [value for key, value in history[-1].items() if key.startswith("flow.") and key.endswith(".student")]
    found: dict[str, Any] = {"flow_student_weight": min(own)}
    if has_labels(run):
        found["validation_accuracy_with_teachers"] = training.score(run, arm, "validation", with_teachers=True).accuracy
    return found
