"""What is recorded of trainings: every epoch once, checkpoints with their hashes, curves, and what the tests gave.

A training is a run of its own under its stage's, found again by the name of its folder. What its workers report is
recorded as it comes. What was lost with a driver that died is filled in from the training's history when it is done, so
that a continued run has neither a gap nor a step twice.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pipeline.data.mirror import here
from pipeline.engine.checkpoint import CheckpointStore
from pipeline.stages.artefacts import digest_of_file, write_json
from pipeline.stages.recording import optional, recorded
from pipeline.tracking.tracker import Tracker

if TYPE_CHECKING:
    from pipeline.engine.spec import Arm
    from pipeline.stages.base import Run

CHECKPOINTS = "checkpoints.json"
_RESULTS = ("model.safetensors", "student.json", "predictions.safetensors", "history.json")
_MOST_CLASSES = 1000  # rows of the table of accuracies by class


def title_of(arm: Arm) -> str:
    """Return what a training is called: kind and seed, without the key."""
    return arm.name.rpartition("-")[0]


@dataclass
class _Open:
    """The record of one training that is going on."""

    arm: Arm
    tracker: Tracker
    context: contextlib.AbstractContextManager[Tracker] | None
    teachers: tuple[str, ...] = ()
    epochs: set[int] = field(default_factory=set)


class TrainingRuns:
    """Records trainings while they go on; a context manager around the call that trains them.

    Parameters
    ----------
    run : Run
        With the stage's tracker.
    arms : sequence of Arm
        All that the stage uses; those that are done already are recorded, too.
    loop : mapping
        Settings of the loop, which all of them share.
    own : Arm, optional
        The one whose epochs are the stage's own: they go to the stage's run.
    storage : mapping of str to sequence of Arm
        Folder (path or URI) of checkpoints to the trainings that leave theirs there, by their number.
    """

    def __init__(
        self,
        run: Run,
        arms: Sequence[Arm],
        *,
        loop: Mapping[str, Any],
        own: Arm | None = None,
        storage: Mapping[str, Sequence[Arm]] | None = None,
    ) -> None:
        self._run, self._own, self._loop = run, own, loop
        self._arms = {arm.name: arm for arm in arms}
        self._storage = [(folder, list(inside)) for folder, inside in (storage or {}).items()]
        self._open: dict[str, _Open] = {}
        self._ended: set[str] = set()
        self._refused: set[str] = set()
        self._on = recorded(run)
        self._stores: list[tuple[CheckpointStore, list[Arm]]] = []
        self._seen: set[str] = set()  # names of checkpoints, which are like no other's
        if self._on and self._storage:
            with optional("the checkpoints"):
                self._stores = [(CheckpointStore.at(folder), inside) for folder, inside in self._storage]
                self._seen = {name for store, _ in self._stores for name in store.manifests()}

    def __enter__(self) -> TrainingRuns:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Fill in what is missing of trainings that are done, and end the records of those that are not as `error`."""
        if not self._on:
            return
        for arm in self._arms.values():
            if arm.name in self._open or kind is None:
                self.end(arm, error)

    def report(self, arm: Arm, metrics: Mapping[str, Any]) -> None:
        """Record an epoch, unless it has been recorded: restarted workers report some a second time."""
        if not self._on or "epoch" not in metrics or arm.name in self._ended | self._refused:
            return
        with optional(f"the epochs of {title_of(arm)}"):
            epoch, one = int(metrics["epoch"]), self._opened(arm)
            if epoch not in one.epochs:
                one.tracker.metrics(epoch_metrics(metrics, one.teachers), step=epoch)
                one.epochs.add(epoch)
            self._look_at_checkpoints()
            return
        self._refused.add(arm.name)  # one warning is enough

    def end(self, arm: Arm, error: BaseException | None = None) -> None:
        """End the record of a training: as finished if it is done, else as failed or killed by `error`."""
        if not self._on or arm.name in self._ended:
            return
        self._ended.add(arm.name)
        with optional(f"the training {title_of(arm)}"):
            one = self._opened(arm)
            del self._open[arm.name]
            if arm.done:
                self._complete(one)
            failure = None if arm.done else error
            if one.context is not None:
                one.context.__exit__(type(failure) if failure else None, failure, None)

    def end_others(self, arm: Arm) -> None:
        """End the records of the trainings before this one: those of one group follow each other."""
        for name in [name for name in self._open if name != arm.name]:
            self.end(self._arms[name])

    def _opened(self, arm: Arm) -> _Open:
        if arm.name in self._open:
            return self._open[arm.name]
        teachers: tuple[str, ...] = ()
        if arm.flow is not None and arm.teaching is not None:
            from pipeline.engine.teaching import Teaching

            teachers = Teaching.open(arm.teaching).teachers
        if self._own is not None and arm.name == self._own.name:
            found = _Open(arm, self._run.tracker, None, teachers)
        else:
            context = self._run.tracker.run(
                title_of(arm), key=training_key(arm), tags=arm_tags(arm), params=arm_params(arm, self._loop)
            )
            found = _Open(arm, context.__enter__(), context, teachers)
        self._open[arm.name] = found
        return found

    def _complete(self, one: _Open) -> None:
        history = _history(one.arm)
        for row in history:
            if int(row["epoch"]) not in one.epochs:
                one.tracker.metrics(epoch_metrics(row, one.teachers), step=int(row["epoch"]))
        self._look_at_checkpoints()
        if one.context is not None:
            one.tracker.document(CHECKPOINTS.removesuffix(".json"), checkpoints(here(one.arm.folder), len(history)))

    def _look_at_checkpoints(self) -> None:
        """Write down checkpoints that have come: only the newest few are kept."""
        for store, arms in self._stores:
            for name, manifest in sorted(store.manifests(self._seen).items()):
                self._seen.add(name)
                with contextlib.suppress(OSError, ValueError, KeyError, IndexError):
                    arm = arms[int(manifest["metrics"].get("arm", 0))]
                    _note_checkpoint(Path(arm.folder), name, manifest)


def training_key(arm: Arm) -> str:
    """Return what the run of a training is found again by."""
    return f"training-{arm.name}"


def arm_tags(arm: Arm) -> dict[str, Any]:
    """Return the tags of a training's run."""
    kind, _, seed = title_of(arm).rpartition("-seed")
    return {"arm": kind or title_of(arm), "seed": seed, "taught": str(arm.teaching is not None).lower()}


def arm_params(arm: Arm, loop: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a training is computed with."""
    found: dict[str, Any] = {"seed": arm.seed, "folder": Path(arm.folder).name, "loop": dict(loop)}
    if arm.objective is not None:
        parts = arm.objective.model_dump(mode="json")
        found["objective"] = {name: part for name, part in parts.items() if part}
    for name in ("flow", "student"):
        settings = getattr(arm, name)
        if settings is not None:
            found[name] = settings.model_dump(mode="json")
    if arm.start is not None:
        found["start_from"] = getattr(getattr(arm.start, "teacher", None), "name", "a teacher")
    return found


def epoch_metrics(metrics: Mapping[str, Any], teachers: Sequence[str] = ()) -> dict[str, float]:
    """Return the numbers of an epoch as they are recorded: flow weights by the names of the teachers.

    ``flow.LAYER.NUMBER`` becomes ``flow.LAYER.TEACHER``.
    """
    found = {}
    for name, value in metrics.items():
        if name in ("arm", "epoch"):
            continue
        if name.startswith("flow.") and teachers:
            layer, _, source = name.rpartition(".")
            if source.isdecimal() and int(source) < len(teachers):
                name = f"{layer}.{teachers[int(source)]}"
        found[name] = value
    return found


def _note_checkpoint(folder: Path, name: str, manifest: Mapping[str, Any]) -> None:
    """Add a checkpoint to the list beside a training's results."""
    told = manifest["metrics"]
    row: dict[str, Any] = {"checkpoint": name, "epoch": told.get("epoch"), "step": told.get("step")}
    rows = [one for one in _noted(folder) if one["checkpoint"] != name]
    files = [
        row | {"file": file, "bytes": about["size"], "sha256": about["sha256"]}
        for file, about in manifest["files"].items()
    ]
    write_json(folder / CHECKPOINTS, rows + files)


def _noted(folder: Path) -> list[dict[str, Any]]:
    try:
        return list(json.loads((folder / CHECKPOINTS).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return []


def checkpoints(folder: Path, epochs: int) -> list[dict[str, Any]]:
    """Return all files that a training left and leaves, with their hashes: its checkpoints, then its results."""
    results = [
        {
            "checkpoint": "result",
            "epoch": epochs,
            "step": None,
            "file": name,
            "bytes": (folder / name).stat().st_size,
            "sha256": digest_of_file(folder / name),
        }
        for name in _RESULTS
        if (folder / name).is_file()
    ]
    return [*_noted(folder), *results]


def record_student(run: Run, kept: Arm, arms: Sequence[Arm], folder: Path) -> None:
    """Record the student that is handed on: curves, history, architecture, checkpoints with hashes, why this one.

    Parameters
    ----------
    run : Run
        With the stage's tracker.
    kept : Arm
        The training whose student is handed on.
    arms : sequence of Arm
        All trainings of the stage.
    folder : Path
        The stage's, with the student's files.
    """
    from pipeline.report.plots import plot_curves

    if not recorded(run):
        return
    with optional("the student"):
        run.tracker.tags({"kept": title_of(kept)} | arm_tags(kept))
        run.tracker.params({"arm": arm_params(kept, {})})
        for name in ("history.json", "student.json", "guard.json"):
            if (folder / name).is_file():
                run.tracker.artifact(folder / name)
        histories = {title_of(arm): _history(arm) for arm in [kept, *(arm for arm in arms if arm != kept)]}
        run.tracker.document(CHECKPOINTS.removesuffix(".json"), checkpoints(folder, len(histories[title_of(kept)])))
        plot_curves(histories, folder / "curves.png")
        run.tracker.artifact(folder / "curves.png")


def _history(arm: Arm) -> list[dict[str, float]]:
    return json.loads(here(Path(arm.folder) / "history.json").read_text(encoding="utf-8"))


def record_test(run: Run, contender: str, title: str, arm: Arm | None, numbers: Mapping[str, float]) -> None:
    """Record the test metrics of a training, in its run; those of predictions that took none get one of their own.

    Parameters
    ----------
    run : Run
        With the stage's tracker.
    contender, title : str
        What the training is called among the controls.
    arm : Arm or None
    numbers : mapping of str to float
    """
    if not recorded(run):
        return
    with optional(f"the test of {title}"):
        name, key = (contender, f"control-{contender}") if arm is None else (title_of(arm), training_key(arm))
        with run.tracker.run(name, key=key, tags={"contender": contender, "taught_by": title}) as tracker:
            tracker.metrics({f"test.{what}": value for what, value in numbers.items()})


def numbers_of(found: Any) -> dict[str, float]:
    """Return the scores of an `Evaluation`, or of a `HeadsEvaluation` in the mean and by sub-task."""
    heads = getattr(found, "heads", None)
    if heads is None:
        return {"accuracy": found.accuracy, "ece": found.ece, "nll": found.nll, "samples": found.samples}
    numbers = {"accuracy": found.accuracy, "ece": found.ece}
    return numbers | {f"accuracy.{name}": one.accuracy for name, one in heads.items()}


def record_evaluation(run: Run, folder: Path, evaluation: Mapping[str, Any]) -> None:
    """Record the comparison: verdict, tables of the controls and by class, pictures of accuracies and confusions."""
    from pipeline.report.plots import plot_accuracies, plot_confusion

    if not recorded(run):
        return
    with optional("the evaluation"):
        run.tracker.artifact(folder / "evaluation.json")
        run.tracker.tags({"verdict": evaluation["verdict"]})
        run.root.tags({"verdict": evaluation["verdict"]})
    arms = evaluation["arms"]
    if not arms:
        return
    with optional("the tables of the evaluation"):
        run.tracker.table("controls", control_rows(arms))
        run.tracker.table("classes", class_rows(arms, evaluation["classes"]))
    with optional("the pictures of the evaluation"):
        plot_accuracies(arms, folder / "accuracies.png")
        run.tracker.artifact(folder / "accuracies.png")
        found = arms[0]["first"]["confusion"]
        for name, counts in (found if isinstance(found, dict) else {"": found}).items():
            own = [label.removeprefix(f"{name}/") for label in evaluation["classes"] if label.startswith(f"{name}/")]
            path = folder / f"confusion{'-' if name else ''}{name}.png"
            title = f"The student on the test split{': ' if name else ''}{name}"
            plot_confusion(counts, own if name else evaluation["classes"], path, title=title)
            run.tracker.artifact(path)


def control_rows(arms: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the student and its controls, a row each."""
    columns = ("name", "title", "mean", "std", "ece", "difference", "difference_2se", "mean_with_teachers")
    return [{"seeds": len(arm["accuracies"])} | {name: arm.get(name) for name in columns} for arm in arms]


def class_rows(arms: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return the test accuracy by class, a column a control: that of its first seed."""
    return [
        {"class": label} | {arm["name"]: arm["first"]["per_class"].get(label) for arm in arms}
        for label in classes[:_MOST_CLASSES]
    ]
