"""The trials of a sweep that train: on the cluster, as trials of Ray Tune, each with its training run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.report.console import Display
from pipeline.stages import training
from pipeline.stages.base import Run
from pipeline.stages.sweep_rows import Member
from pipeline.stages.sweep_training import watched
from pipeline.stages.sweep_trials import Advance, Trials
from pipeline.sweep_spec import Domain, SweepSpec

if TYPE_CHECKING:
    from pipeline.cluster.sweep import Proposal
    from pipeline.cluster.sweep_schedulers import Asha, Pbt


def fit_trials(run: Run, spec: SweepSpec, trials: Trials, quiet: Display) -> None:
    """Train what is left of the trials, as many side by side as the cluster holds with all of their workers.

    Parameters
    ----------
    run : Run
        With the sweep's tracker.
    spec : SweepSpec
    trials : Trials
        Prepared, unless the search learns.
    quiet : Display
        For what goes on beneath the progress bar.
    """
    first = trials.next(run.display)
    if first is None:
        return
    from pipeline.cluster.sweep import Fitting, run_sweep, side_by_side
    from pipeline.engine.watching import train_watched

    run.files.push()
    run.open_cluster()
    workers = run.settings.distill.resources
    fitting = Fitting(
        loop=train_watched,
        make=watched,
        num_workers=workers.num_workers,
        storage=run.files.storage,
        resources_per_worker=training.resources_per_worker(run),
        max_failures=workers.max_failures,
    )
    speaking = run.settings.amalgamate.resources
    also = {"CPU": speaking.cpus, "GPU": speaking.gpus} if spec.search == "optuna" else None
    concurrent = min(side_by_side(fitting, also=also), spec.max_concurrent or spec.count, spec.count)
    run.display.note(f"{concurrent} trials side by side")
    pbt = spec.scheduler.pbt if spec.scheduler is not None else None
    error: BaseException | None = None
    with run.display.bar("trials", spec.count) as bar:
        fleet = _Fleet(spec, trials, first, quiet, bar)
        try:
            run_sweep(
                fitting,
                fleet.propose,
                count=spec.count,
                metric=spec.metric,
                mode=spec.direction,
                on_report=fleet.on_report,
                on_end=fleet.on_end,
                on_leg=fleet.on_leg,
                concurrent=concurrent,
                max_failures=spec.max_failures,
                scheduler=_scheduler(run, spec, trials),
                interval=None if pbt is None else pbt.interval,
                verbose=run.verbose,
            )
        except BaseException as caught:
            error = caught
            raise
        finally:
            trials.close(error)


class _Fleet:
    """Stands between the trials and those that run them."""

    def __init__(self, spec: SweepSpec, trials: Trials, first: Any, quiet: Display, bar: Advance) -> None:
        self._spec, self._trials, self._quiet, self._bar = spec, trials, quiet, bar
        self._waiting = [first]
        self._names: dict[str, str] = {}
        self._values: dict[str, dict[str, Any]] = {}
        self._curves: dict[str, dict[int, float]] = {}
        self._shown = 0
        self._show()

    def propose(self) -> Proposal | None:
        from pipeline.cluster.sweep import Proposal

        found = self._waiting.pop() if self._waiting else self._trials.next(self._quiet)
        self._show()
        if found is None:
            return None
        trial, values, ready = found
        self._names[ready.store], self._values[trial] = trial, values
        self._trials.begin(trial, values)
        changing: dict[str, Any] = {}
        if self._spec.population:
            member = self._trials.member(trial)
            changing = values | member.values
            self._curves[trial] = dict(member.curve)
        return Proposal(ready.store, ready.payload, ready.run.settings.distill.loop.epochs, changing)

    def on_report(self, name: str, metrics: dict[str, Any]) -> None:
        trial = self._names[name]
        if self._spec.metric in metrics:
            # Restarted workers report some epochs a second time.
            self._curves.setdefault(trial, {})[int(metrics["epoch"])] = float(metrics[self._spec.metric])
        self._trials.report(trial, metrics)

    def on_leg(self, name: str, values: dict[str, Any]) -> None:
        trial = self._names[name]
        self._trials.keep_member(trial, Member(values, self._curve(trial)))

    def on_end(self, name: str, row: dict[str, Any]) -> None:
        trial = self._names[name]
        curve = self._curve(trial)
        values = self._values[trial] | row["values"]
        if row.get("ended"):
            self._trials.done(trial, values, row["seconds"], curve)
        elif row.get("stopped"):
            self._trials.stopped(trial, values, row["seconds"], curve)
        else:
            self._trials.fail(trial, values, told=row, seconds=row["seconds"], curve=curve)
        self._show()

    def _curve(self, trial: str) -> tuple[tuple[int, float], ...]:
        return tuple(sorted(self._curves.get(trial, {}).items()))

    def _show(self) -> None:
        ended = len(self._trials.rows)
        self._bar(ended - self._shown, self._trials.note())
        self._shown = ended


def _scheduler(run: Run, spec: SweepSpec, trials: Trials) -> Asha | Pbt | None:
    from pipeline.cluster.sweep_schedulers import Asha, Pbt

    chosen, epochs = spec.scheduler, run.settings.distill.loop.epochs
    if chosen is None:
        return None
    if chosen.asha is not None:
        asha = Asha(
            spec.metric, spec.direction, epochs=epochs, grace=chosen.asha.grace, reduction=chosen.asha.reduction
        )
        for row in trials.former:
            asha.recall(row.trial, row.curve)
        return asha
    assert chosen.pbt is not None
    return Pbt(
        spec.metric,
        spec.direction,
        interval=chosen.pbt.interval,
        quantile=chosen.pbt.quantile,
        resample=chosen.pbt.resample,
        draws={path: domain.draw for path, domain in spec.space.items()},
        fit={path: _allowed(domain) for path, domain in spec.space.items()},
        seed=spec.seed,
    )


def _allowed(domain: Domain) -> Any:
    return sorted(domain.ends) if domain.dist == "choice" else domain.fit
