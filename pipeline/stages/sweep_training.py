"""Trials of a sweep that train a student: what each of them needs, and what it is worth."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import Settings
from pipeline.engine.objective_spec import labels_alone
from pipeline.settings_files import apply
from pipeline.stages import training
from pipeline.stages.base import Run, Stage
from pipeline.stages.distill import student_arm
from pipeline.stages.sweep_assess import CachedAssess, all_said
from pipeline.stages.sweep_rows import SweepFolder, TrialRow, best_of
from pipeline.stages.sweep_space import trial_settings
from pipeline.stages.teachers import table_of
from pipeline.sweep_spec import SweepSpec

if TYPE_CHECKING:
    from pipeline.engine.arms import ArmsPayload
    from pipeline.engine.spec import Arm
    from pipeline.engine.watching import WatchedPayload

_JUDGED = ("validation", "probe")
_MEMBER = "population"  # members of a population take over each other's state, which carries the name of the training


@dataclass(frozen=True)
class TrialPayload:
    """What travels to a trial: settings as plain values, and what its workers get."""

    settings: dict[str, Any]
    arms: ArmsPayload


@dataclass(frozen=True)
class Prepared:
    """A trial that can be trained.

    Attributes
    ----------
    run : Run
        With the trial's settings, and the results of the stages before.
    arm : Arm
    store : str
        Folder of its checkpoints, inside that of all trainings.
    """

    run: Run
    arm: Arm
    store: str

    @property
    def payload(self) -> TrialPayload:
        """What its process gets."""
        return TrialPayload(self.run.settings.dump(), training.payload_of(self.run, [self.arm]))

    def forget_checkpoints(self) -> None:
        """Delete what a trial went on from: it has ended."""
        delete_stores(self.run, self.store)


def delete_stores(run: Run, pattern: str) -> None:
    """Delete folders where trainings and trials keep their state, by a pattern of their names."""
    from fnmatch import fnmatch

    from pyarrow import fs

    from pipeline.engine.checkpoint import CheckpointStore

    store = CheckpointStore(run.files.storage, ".")
    above = store.root.removesuffix("/.")
    with contextlib.suppress(OSError):  # a leftover is no reason to end a sweep
        for info in store.filesystem.get_file_info(fs.FileSelector(above, allow_not_found=True)):
            if info.type == fs.FileType.Directory and fnmatch(info.base_name, pattern):
                store.filesystem.delete_dir(info.path)


def with_settings(run: Run, settings: Settings) -> Run:
    """Return the run under other settings, none of whose stages has been looked at."""
    return replace(run, settings=settings, records={})


def advance(run: Run, last: str) -> None:
    """Bring the stages up to `last` to where their results are there; those of other trials serve where they fit."""
    from pipeline.stages.artefacts import key_of
    from pipeline.stages.run import STAGES, _inputs, _run_stage

    for stage in STAGES:
        if stage.name not in run.records:
            inputs = _inputs(stage, run)
            key = key_of(stage.name, stage.version, inputs)
            record = run.files.record(stage.name, key)
            if record is None:
                with run.display.stage(stage.name):
                    record = _run_stage(run, _here(stage, run), key, inputs)
            run.records[stage.name] = record
        if stage.name == last:
            return


def _here(stage: Stage, run: Run) -> Stage:
    """Return the stage, in a form that needs no cluster where everything that it asks of teachers is known."""
    return CachedAssess() if stage.name == "assess" and all_said(run) else stage


def prepare(run: Run, settings: Settings, spec: SweepSpec, trial: str, folder: SweepFolder) -> Prepared:
    """Run the stages before the training under a trial's settings, as far as they have no result yet."""
    own = with_settings(run, settings)
    advance(own, "amalgamate")
    arm = student_arm(own)
    if not spec.population:
        return Prepared(own, arm, f"sweep-{arm.name}")
    # What a member becomes is no function of its settings: its student must not pass for that of such a run.
    member = replace(arm, name=_MEMBER, folder=str(folder.trial(trial) / "student"))
    return Prepared(own, member, f"sweep-{folder.root.name}-{trial}")


def watched(payload: TrialPayload, values: Mapping[str, Any], until: int | None) -> WatchedPayload:
    """Return what the workers of a trial get, for the leg until an epoch, with values that have changed on the way."""
    from pipeline.engine.watching import WatchedPayload

    arms = payload.arms
    if until is None:
        return WatchedPayload(arms)
    distill = apply(Settings.model_validate(payload.settings), values).distill
    loop = distill.loop.model_copy(update={"checkpoint_every": 1, "checkpoint_steps": None})
    [arm] = arms.arms
    objective = distill.objective if arm.teaching is not None else labels_alone(distill.objective)
    arms = replace(arms, arms=(replace(arm, objective=objective),), loop=loop, objective=distill.objective)
    return WatchedPayload(arms, until if until < loop.epochs else None)


def scores(prepared: Prepared) -> dict[str, float]:
    """Return what a trained student is worth on probe and validation images. The test split is not looked at."""
    from pipeline.engine.watching import scores_of

    run, found = prepared.run, dict[str, float]()
    payload, predictions = training.payload_of(run, [prepared.arm]), training.predictions(prepared.arm)
    for split in _JUDGED:
        labels = table_of(run).split(split).labels
        if len(labels):
            found |= scores_of(split, predictions[split], labels, payload)
    return {name: value for name, value in found.items() if math.isfinite(value)}


def images_of(run: Run, spec: SweepSpec, rows: Sequence[TrialRow]) -> int:
    """Return how many images the metric of the best trial is measured on; 0 where none has come to its end."""
    best = best_of(rows, spec.direction)
    if best is None:
        return 0
    own = with_settings(run, trial_settings(run.settings, best.values))
    advance(own, "ingest")
    return int(own.records["ingest"].summary.get("probe" if spec.metric.startswith("probe") else "validation", 0))


def inside(run: Run, path: str) -> str:
    """Return a folder's name inside the run folder."""
    return str(Path(path).relative_to(run.files.root))
