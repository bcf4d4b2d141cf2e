"""The trials of a sweep: which comes next, which have ended, and what is recorded of each."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from pipeline.config import Settings
from pipeline.errors import FacultyError, StageError
from pipeline.report.console import Display
from pipeline.stages.artefacts import digest_of
from pipeline.stages.base import Run
from pipeline.stages.recording import optional
from pipeline.stages.recording_trainings import epoch_metrics
from pipeline.stages.sweep_assess import faculty_scores
from pipeline.stages.sweep_rows import Member, SweepFolder, TrialRow, best_of
from pipeline.stages.sweep_space import Search, Values, planned, trial_id, trial_settings
from pipeline.stages.sweep_training import Prepared, advance, inside, prepare, scores, with_settings
from pipeline.sweep_spec import SweepSpec
from pipeline.tracking.tracker import Tracker

Advance = Callable[..., None]


class Trials:
    """Goes through the trials of a sweep, whichever way they run.

    Parameters
    ----------
    run : Run
        With the sweep's tracker.
    spec : SweepSpec
    folder : SweepFolder
    search : Search
    known : mapping of str to TrialRow
        Trials of former calls that need not run again.

    Attributes
    ----------
    rows : dict of str to TrialRow
        Of the trials that have ended.
    """

    def __init__(
        self, run: Run, spec: SweepSpec, folder: SweepFolder, search: Search, known: Mapping[str, TrialRow]
    ) -> None:
        self._run, self._spec, self._folder, self._search = run, spec, folder, search
        self._known = dict(known)
        self.rows: dict[str, TrialRow] = {}
        self._plan: deque[tuple[str, Values, Prepared]] = deque()
        self._open: dict[str, tuple[Tracker, Any]] = {}
        self._asked: set[str] = set()
        self._values: dict[str, Values] = {}
        self.prepared: dict[str, Prepared] = {}
        if search.adaptive:  # one that learns counts what it has learnt from; others propose the same again
            for row in self._known.values():
                search.tell(row.values, row.metric)
                self.rows[row.trial] = row
                self._asked.add(row.trial)

    @property
    def former(self) -> list[TrialRow]:
        """Trials of former calls."""
        return list(self._known.values())

    @property
    def best(self) -> float | None:
        """The best metric so far."""
        found = best_of(self.rows.values(), self._spec.direction)
        return None if found is None else found.metric

    def note(self) -> str:
        """Return what a progress bar says."""
        return "" if self.best is None else f"best {self.best:.4f}"

    def plan(self) -> None:
        """Prepare all trials of a search that learns nothing, before any is trained: the cluster is free for that."""
        if self._search.adaptive:
            return
        for values in planned(self._search, self._spec.count):
            found = self._prepare(values, self._run.display)
            if found is not None:
                self._plan.append(found)

    def next(self, display: Display) -> tuple[str, Values, Prepared] | None:
        """Return the next trial that has to be trained; None when there is none left."""
        if not self._search.adaptive:
            return self._plan.popleft() if self._plan else None
        while len(self._asked) < self._spec.count:
            values = self._search.ask()
            if values is None:
                return None
            found = self._prepare(values, display)
            if found is not None:
                return found
        return None

    def _prepare(self, values: Values, display: Display) -> tuple[str, Values, Prepared] | None:
        """Return a trial that is ready to be trained; None where it has ended: before, at once, or with an error."""
        named = self._named(values)
        if named is None:
            return None
        trial, settings = named
        try:
            ready = prepare(replace(self._run, display=display), settings, self._spec, trial, self._folder)
        except FacultyError as error:
            self.fail(trial, values, error)
            return None
        self.prepared[trial] = ready
        if ready.arm.done:  # in a former call whose row was lost, in another sweep, or by a plain run
            self.begin(trial, values)
            member = self.member(trial)
            self.done(trial, values | member.values, 0.0, member.curve)
            return None
        return trial, values, ready

    def _named(self, values: Values) -> tuple[str, Settings] | None:
        """Return a trial's number and settings; None where it has ended."""
        try:
            settings = trial_settings(self._run.settings, values)
        except FacultyError as error:
            name = f"invalid-{digest_of(values)[:10]}"
            self._asked.add(name)
            self.fail(name, values, error)
            return None
        trial = trial_id(settings)
        if trial in self._asked:  # two ways to write the same settings
            self._search.tell(values, self.rows[trial].metric if trial in self.rows else None)
            return None
        self._asked.add(trial)
        if trial in self._known:
            self.rows[trial] = self._known[trial]
            self._search.tell(values, self._known[trial].metric)
            return None
        return trial, settings

    def member(self, trial: str) -> Member:
        """Return where a member of a population stood when a former call was interrupted."""
        return self._folder.member(trial)

    def keep_member(self, trial: str, member: Member) -> None:
        """Keep where a member stands, for a call after this one."""
        self._folder.keep_member(trial, member)

    def judge_all(self, bar: Advance, display: Display) -> None:
        """Run trials that train nothing, one after the other, in this process."""
        run = replace(self._run, display=display)
        proposed = None if self._search.adaptive else iter(planned(self._search, self._spec.count))
        bar(len(self.rows))
        while proposed is not None or len(self._asked) < self._spec.count:
            values = self._search.ask() if proposed is None else next(proposed, None)
            if values is None:
                break
            named = self._named(values)
            if named is not None:
                self._judge(run, named[0], values, named[1])
            bar(1, self.note())

    def _judge(self, run: Run, trial: str, values: Values, settings: Settings) -> None:
        began, own = time.perf_counter(), with_settings(run, settings)
        self.begin(trial, values)
        try:
            advance(own, "select")
            found = faculty_scores(own)
        except FacultyError as error:
            self.fail(trial, values, error)
            return
        metric = found.get(self._spec.metric)
        self._end(TrialRow(trial, "done", values, metric, found, seconds=time.perf_counter() - began))

    def begin(self, trial: str, values: Values) -> None:
        """Open the record of a trial."""
        self._values[trial] = values
        with optional(f"trial {trial}"):
            context = self._run.tracker.run(
                f"trial {trial}",
                key=f"trial-{self._folder.root.name}-{trial}",
                tags={"trial": trial},
                params=dict(values),
            )
            self._open[trial] = (context.__enter__(), context)

    def report(self, trial: str, metrics: Mapping[str, Any]) -> None:
        """Record an epoch of a trial that trains."""
        if trial in self._open:
            with optional(f"the epochs of trial {trial}"):
                self._open[trial][0].metrics(epoch_metrics(metrics), step=int(metrics["epoch"]))

    def done(self, trial: str, values: Values, seconds: float, curve: tuple[tuple[int, float], ...] = ()) -> None:
        """Judge a trial that has come to its end, by what its student says of validation and probe images."""
        from pipeline.stages.training import history

        ready = self.prepared[trial]
        try:
            found, epochs = scores(ready), len(history(ready.arm))
        except (FacultyError, OSError, ValueError, KeyError) as error:
            self.fail(trial, values, StageError(f"its student can't be judged: {error}"), seconds=seconds)
            return
        metric = found.get(self._spec.metric)
        ready.forget_checkpoints()
        self._end(
            TrialRow(
                trial,
                "done",
                values,
                metric=metric,
                scores=found,
                epochs=epochs,
                seconds=seconds,
                curve=curve,
                student=inside(self._run, ready.arm.folder),
            )
        )

    def stopped(self, trial: str, values: Values, seconds: float, curve: tuple[tuple[int, float], ...]) -> None:
        """Note a trial that the scheduler has ended."""
        self.prepared[trial].forget_checkpoints()
        epochs, metric = curve[-1] if curve else (0, None)
        self._end(TrialRow(trial, "stopped", values, metric=metric, epochs=epochs, seconds=seconds, curve=curve))

    def fail(
        self,
        trial: str,
        values: Values,
        error: Exception | None = None,
        *,
        told: Mapping[str, Any] | None = None,
        seconds: float = 0.0,
        curve: tuple[tuple[int, float], ...] = (),
    ) -> None:
        """Note a trial that failed: a row, not the end. Its checkpoints stay, as it may be tried again."""
        line = str(error) if error is not None else str((told or {}).get("error", "ended without a result"))
        kind = type(error).__name__ if error is not None else str((told or {}).get("error_type", "StageError"))
        self._end(
            TrialRow(
                trial,
                "failed",
                values,
                epochs=curve[-1][0] if curve else 0,
                seconds=seconds,
                curve=curve,
                error=" ".join(line.split())[:500],
                error_type=kind,
            ),
            (told or {}).get("traceback"),
        )

    def _end(self, row: TrialRow, traceback: str | None = None) -> None:
        self.rows[row.trial] = row
        self._folder.keep(row, traceback)
        self._search.tell(self._values.get(row.trial, row.values), row.metric if row.state != "failed" else None)
        opened = self._open.pop(row.trial, None)
        if opened is None:
            return
        tracker, context = opened
        with optional(f"trial {row.trial}"):
            numbers = {name: value for name, value in row.scores.items() if math.isfinite(value)}
            tracker.metrics({f"end.{name}": value for name, value in numbers.items()} | {"seconds": row.seconds})
            tracker.tags({"state": row.state, "student": row.student or ""})
            failure = None if row.error is None else StageError(row.error)
            with contextlib.suppress(StageError):
                context.__exit__(type(failure) if failure else None, failure, None)

    def close(self, error: BaseException | None) -> None:
        """End the records of trials that were cut off; delete checkpoints that came after a trial had been ended."""
        for trial, ready in self.prepared.items():
            if trial in self.rows and self.rows[trial].state != "failed":
                ready.forget_checkpoints()
        for trial in list(self._open):
            _, context = self._open.pop(trial)
            with contextlib.suppress(BaseException):
                context.__exit__(None if error is None else type(error), error, None)
