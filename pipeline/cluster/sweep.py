"""The trials of a sweep on the cluster: each a trial of Ray Tune that fits a training run."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import cloudpickle, tune
from ray.tune.search import Searcher
from ray.util.placement_group import remove_placement_group

from pipeline.cluster import launch, session
from pipeline.cluster.fleet import FleetCallback
from pipeline.cluster.inline import bounds
from pipeline.cluster.launch import check_room
from pipeline.cluster.relay import Relay
from pipeline.cluster.sweep_schedulers import OWN, Asha, Pbt
from pipeline.cluster.sweep_trial import CURVE, Packed, SweepTrial, Work, clear_shelf
from pipeline.cluster.trainable import ROW, Refused, Row
from pipeline.cluster.tuning import DRIVER, delete_records, groups_made_here, run_settings
from pipeline.engine.checkpoint import CheckpointStore
from pipeline.errors import ConfigError

_CLEAR_S = 30.0
_SETTLE_S = 5.0


@dataclass(frozen=True)
class Proposal:
    """A trial that is to run.

    Attributes
    ----------
    name : str
        Unique; the folder of its checkpoints in the storage, from which it goes on where there are any.
    payload : object
        What `Fitting.make` is called with; small and picklable.
    epochs : int
        Of its training.
    values : dict
        What a scheduler may change while it trains, by paths of settings.
    """

    name: str
    payload: Any
    epochs: int
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Fitting:
    """How trials train; see `Work` and :func:`pipeline.cluster.train.fit`."""

    loop: Callable[..., None]
    make: Callable[..., Any]
    num_workers: int | tuple[int, int]
    storage: str
    resources_per_worker: dict[str, float]
    max_failures: int = 0

    @property
    def most(self) -> int:
        """Workers of a trial at most."""
        return bounds(self.num_workers)[1]

    def work(self, interval: int | None, verbose: bool) -> Work:
        """Return what travels to the trials."""
        how = {
            "num_workers": self.num_workers,
            "storage": self.storage,
            "use_gpu": self.resources_per_worker.get("GPU", 0) > 0,
            "resources_per_worker": self.resources_per_worker,
            "max_failures": self.max_failures,
            "verbose": verbose,
        }
        return Work(cloudpickle.dumps(self.loop), cloudpickle.dumps(self.make), how, interval)

    @property
    def trial_resources(self) -> dict[str, float]:
        """What a trial's own process takes: next to nothing beside its workers, or what it trains with itself."""
        return DRIVER if self.most else dict(self.resources_per_worker)


def side_by_side(fitting: Fitting, *, also: Mapping[str, float] | None = None) -> int:
    """Return how many trials the cluster holds, each with its driver and all of its workers, so that none starves.

    A placement group of workers waits for room while its driver lives. With n workers of the same size in each trial
    and room for m of them on the nodes, ⌊m / n⌋ trials always find theirs, in whatever order they come and go. Room is
    that of the nodes less what others hold now.

    Parameters
    ----------
    fitting : Fitting
    also : mapping of str to float, optional
        What the driver must find room for while trials run: one trial's place has to be as large.

    Raises
    ------
    UserError
        When not a single trial fits, and no node is going to be added.
    """
    each = {key: value for key, value in fitting.resources_per_worker.items() if value > 0}
    count = max(fitting.most, 1)
    check_room(bounds(fitting.num_workers)[0] or 1, each)
    if session.active().autoscaling:
        return 1024
    place = {key: count * each.get(key, 0.0) for key in {*each, *(also or {})}}
    larger = {key: value for key, value in (also or {}).items() if value > place[key]}
    room = session.slots(each)
    deadline = time.monotonic() + _SETTLE_S
    while (free := min(_free(each), room)) < room and time.monotonic() < deadline:
        time.sleep(0.2)  # processes of the stage before may still be ending
    held = max(1, free // count)
    return max(1, held - 1) if larger else held


def _free(each: Mapping[str, float]) -> int:
    """Return how many times `each` fits into what is free on each node now."""
    from ray._private.state import available_resources_per_node

    nodes = available_resources_per_node().values()
    return sum(int(min(node.get(key, 0) / value for key, value in each.items()) + 1e-9) for node in nodes)


def run_sweep(
    fitting: Fitting,
    propose: Callable[[], Proposal | None],
    *,
    count: int,
    metric: str,
    mode: str,
    on_report: Callable[[str, Row], None],
    on_end: Callable[[str, Row], None],
    on_leg: Callable[[str, Row], None] | None = None,
    concurrent: int,
    max_failures: int = 1,
    scheduler: Asha | Pbt | None = None,
    interval: int | None = None,
    verbose: bool = False,
) -> None:
    """Run trials until there is none left to propose.

    Parameters
    ----------
    fitting : Fitting
        How each of them trains.
    propose : callable
        Called in this thread whenever there is room for another trial; None: there is no other.
    count : int
        How many it proposes at most.
    metric, mode : str
        By which a scheduler judges, among what the loop reports with ``epoch``.
    on_report : callable
        ``on_report(name, metrics)`` in this thread, for each epoch of a trial.
    on_end : callable
        ``on_end(name, row)`` in this thread, as soon as a trial has ended. The row has ``seconds``, ``values`` (as the
        scheduler left them) and either ``ended``; or ``stopped``, where a scheduler ended it; or ``error`` in one line,
        ``error_type``, and ``traceback``.
    on_leg : callable, optional
        ``on_leg(name, values)`` in this thread, after each leg of a member of a population, with the values that it
        goes on with. What these three raise ends the sweep.
    concurrent : int
        How many trials run side by side at most, see `side_by_side`.
    max_failures : int
        Restarts of a trial whose process died; it goes on from its newest checkpoint.
    scheduler : Asha or Pbt, optional
    interval : int, optional
        Epochs of a leg, with `Pbt`.
    verbose : bool
        Show Tune's progress table.

    Raises
    ------
    ConfigError
        When a population is larger than what the cluster holds.
    """
    population = isinstance(scheduler, Pbt)
    if population and fitting.most and count > concurrent:
        raise ConfigError(
            f"sweep.trials: the {count} members of a population train side by side, and the cluster has room for "
            f"{concurrent}; lower it to that, or set distill.resources.num_workers=0"
        )
    # Tune's own state of a sweep is written in place and never read: rows that were handed over are what counts.
    store = CheckpointStore(fitting.storage, f".sweep-{uuid.uuid4().hex[:8]}")
    relay = Relay()
    callback = SweepCallback(relay, on_report, on_end, on_leg if population else None)
    before = groups_made_here()
    try:
        with session.calm(verbose):
            trainable = tune.with_resources(
                tune.with_parameters(
                    SweepTrial, work=fitting.work(interval, verbose), spec=session.active(), relay=relay
                ),
                tune.PlacementGroupFactory([fitting.trial_resources]),
            )
            tuner = tune.Tuner(
                trainable,
                tune_config=tune.TuneConfig(
                    num_samples=count,
                    reuse_actors=True,
                    search_alg=Asking(propose, callback.names, store.root),
                    scheduler=scheduler,
                    # Trials of a population wait for each other: Tune counts those that wait, too.
                    max_concurrent_trials=None if population else concurrent,
                    trial_dirname_creator=lambda trial: trial.trial_id,
                ),
                run_config=run_settings(store, callback, max_failures=max_failures, verbose=verbose),
            )
            tuner.fit()
    except BaseException:
        callback.end_drivers()
        _clear(before)
        if callback.error is not None:
            raise callback.error from None
        raise
    finally:
        callback.end_drivers()
        relay.close()
        with contextlib.suppress(ray.exceptions.RayError, OSError):
            clear_shelf(store.root)
        delete_records(store)


class Asking(Searcher):
    """Gives Tune the trials that someone else proposes."""

    def __init__(self, propose: Callable[[], Proposal | None], names: dict[str, str], shelf: str) -> None:
        super().__init__()
        self._shelf = shelf
        self._propose: Callable[[], Proposal | None] | None = propose
        self._names = names

    def __getstate__(self) -> dict[str, Any]:
        # Tune saves its search with the experiment; where trials come from stays in the driver.
        return self.__dict__ | {"_propose": None, "_names": {}}

    def suggest(self, trial_id: str) -> Any:
        """Return the configuration of the next trial."""
        proposal = self._propose() if self._propose is not None else None
        if proposal is None:
            return Searcher.FINISHED
        self._names[trial_id] = proposal.name
        own = {"name": proposal.name, "payload": Packed(self._shelf, proposal.payload), "epochs": proposal.epochs}
        return own | proposal.values

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Learn nothing: rows are handed over as they are."""

    def save(self, checkpoint_path: str) -> None:
        """Save nothing."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing."""


class SweepCallback(FleetCallback):
    """Hands reports and rows over in the thread that waits for Tune, and lets trials that were ended let go.

    Attributes
    ----------
    names : dict of str to str
        From Tune's number of a trial to its name.
    """

    def __init__(
        self,
        relay: Relay,
        on_report: Callable[[str, Row], None],
        on_end: Callable[[str, Row], None],
        on_leg: Callable[[str, Row], None] | None,
    ) -> None:
        super().__init__(relay, on_end, None)
        self.names: dict[str, str] = {}
        self._tell: Callable[[str, Row], None] | None = on_report
        self._leg = on_leg
        self._actors: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"names": {}, "_tell": None, "_leg": None, "_actors": {}}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note which process the trial has: one of its own, or that of a former trial."""
        self._actors[trial.trial_id] = trial.temporary_state.ray_actor

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Row, **info: Any) -> None:
        """Hand an epoch over, or those of a leg."""
        name = self.names[trial.trial_id]
        for metrics in result.get(CURVE) or []:
            if self._tell is not None:
                self._guarded(self._tell, name, dict(metrics))
        if self._leg is not None:
            self._guarded(self._leg, name, _values(trial))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Hand the row of a trial over that ran to its end, or that the scheduler has ended."""
        row = dict(trial.last_result.get(ROW) or {"stopped": True})
        actor = self._actors.pop(trial.trial_id, None)
        if "stopped" in row and actor is not None:
            # Tune may keep its process for another trial; the workers must be free for whoever comes next.
            actor.release.remote()
        self._end(trial, row)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Hand a row over for a trial that Tune has given up."""
        self._actors.pop(trial.trial_id, None)
        super().on_trial_error(iteration, trials, trial, **info)

    def _hand_over(self, trial: Any, row: Row) -> None:  # of a trial that was given up
        self._end(trial, row)

    def _end(self, trial: Any, row: Row) -> None:
        row |= {"seconds": float((trial.last_result or {}).get("time_total_s", 0.0)), "values": _values(trial)}
        name = self.names[trial.trial_id]
        self._guarded(self._deliver, name, row)

    def _guarded(self, call: Callable[[str, Row], None], name: str, data: Row) -> None:
        if self.error is not None:
            return
        try:
            call(name, data)
        except Exception as error:
            self.error = error
            self.end_drivers()
            raise Refused from error


def _values(trial: Any) -> Row:
    """Return the values of settings that a trial has now."""
    return {key: value for key, value in trial.config.items() if key not in OWN}


def _clear(before: Iterable[Any]) -> None:
    """Remove the groups of trials, and wait until those of their workers are gone."""
    with contextlib.suppress(ray.exceptions.RayError):
        for group in groups_made_here() - set(before):
            remove_placement_group(group)
        deadline = time.monotonic() + _CLEAR_S
        while launch.sweep() and time.monotonic() < deadline:
            time.sleep(0.2)
