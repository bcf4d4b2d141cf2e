"""Many independent assessments as trials of Ray Tune, on processes that serve one trial after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import fs

from pipeline.cluster.session import active, calm, slots
from pipeline.cluster.tuning import groups_made_here, run_settings
from pipeline.engine.checkpoint import CheckpointStore

Row = dict[str, Any]
_TUNE_FILES = ("tuner.pkl", "basic-variant-state", "experiment_state", ".validate_storage_marker")


@dataclass(frozen=True)
class TrialItem:
    """One trial.

    Attributes
    ----------
    name : str
        Unique among the trials of a run.
    payload : object
        What the function gets; small and picklable.
    """

    name: str
    payload: Any


def run_trials(
    function: Callable[..., Row],
    items: Sequence[TrialItem],
    *,
    storage: str | Path,
    experiment: str,
    resources: dict[str, float] | None = None,
    max_concurrent: int | None = None,
    max_failures: int = 1,
    on_result: Callable[[str, Row], None] | None = None,
    done: dict[str, Row] | None = None,
    climbing: Sequence[int] | None = None,
    shared: Any = None,
    verbose: bool = False,
) -> dict[str, Row]:
    """Call ``function(item.payload)`` for every item and gather the rows.

    Parameters
    ----------
    function : callable
        Importable by name on the workers. Returns a row of scalars and strings; arrays go into files.
    items : sequence of TrialItem
        The trials.
    storage, experiment : str
        A folder or URI that every worker reaches, and the experiment's folder inside it, where
        ``errors/<name>.log`` is left with the traceback of every trial that failed.
    resources : dict of str to float, optional
        Of each trial, fractions allowed: ``{"CPU": 1, "GPU": 0.25}``; default one CPU.
    max_concurrent : int, optional
        How many run side by side at most; never more than the cluster holds now.
    max_failures : int
        How often a trial is tried again whose process died. An exception is no such failure.
    on_result : callable, optional
        ``on_result(name, row)`` in this thread, as soon as a trial has ended. What it keeps can come back as `done`, so
        that a driver that was killed loses nothing but the trials that were running.
    done : dict, optional
        Rows of trials that need not run again; they are returned with the others and not announced.
    climbing : sequence of int, optional
        Search by successive halving: ``function(payload, rung=r)`` is called with r = 0, 1, …, len(climbing), and only
        the `climbing[r]` trials with the highest ``row["score"]`` go on from rung r. The function keeps by itself what
        a later rung can use. Rows get ``rung``, the last one run, and ``dropped``, why it was the last.
    shared : object, optional
        What every call gets as ``shared=``, once for each node: arrays in it are in shared memory, read-only.
    verbose : bool
        Show Tune's progress table.

    Returns
    -------
    dict of str to dict
        The rows by name, in the order of `items`. To what the function returned come ``seconds``, ``peak_mb`` (see
        :class:`pipeline.cluster.measure.Meter`) and on a GPU ``peak_gpu_mb``. A trial that failed has ``error`` (one
        line) and ``error_type`` instead of the function's values.

    Raises
    ------
    UserError
        When the cluster can't hold a single trial.
    ValueError
        When two items have one name.
    """
    names = [item.name for item in items]
    if len(set(names)) != len(names):
        raise ValueError(f"trial names must be unique, got {sorted({n for n in names if names.count(n) > 1})} twice")
    rows = {name: row for name, row in (done or {}).items() if name in set(names)}
    missing = [item for item in items if item.name not in rows]
    if missing:
        wanted = {key: value for key, value in (resources or {"CPU": 1}).items() if value > 0}
        concurrent = min(
            len(missing), max_concurrent or len(missing), slots(wanted) if not active().autoscaling else 1024
        )
        store = CheckpointStore(str(storage), experiment)

        def deliver(name: str, row: Row) -> None:
            text = row.pop("traceback", None)
            if text:
                store.write(f"errors/{name.replace('/', '_')}.log", text.encode())
            rows[name] = row
            if on_result is not None:
                on_result(name, row)

        _tune(function, missing, wanted, concurrent, store, max_failures, deliver, climbing, shared, verbose)
        for name in (item.name for item in missing if item.name not in rows):
            deliver(name, {"error": "the trial ended without a result", "error_type": "StageError"})
    return {name: rows[name] for name in names}


def _tune(
    function: Callable[..., Row],
    items: list[TrialItem],
    resources: dict[str, float],
    concurrent: int,
    store: CheckpointStore,
    max_failures: int,
    deliver: Callable[[str, Row], None],
    climbing: Sequence[int] | None,
    shared: Any,
    verbose: bool,
) -> None:
    with calm(verbose):
        from ray import cloudpickle, tune
        from ray.tune.search import BasicVariantGenerator
        from ray.util.placement_group import remove_placement_group

        from pipeline.assessment.halving import Standing
        from pipeline.cluster.halving import HalvingScheduler, PausingGenerator
        from pipeline.cluster.trainable import Assessment, DeliveryCallback

        scheduler = None if climbing is None else HalvingScheduler(Standing(len(items), climbing), concurrent)
        callback = DeliveryCallback(deliver, {} if scheduler is None else scheduler.reasons)
        trainable = tune.with_resources(
            tune.with_parameters(
                Assessment,
                # Pickled here and unpickled in the trial: a module that a worker lacks is then an error of the trial.
                function=cloudpickle.dumps(function),
                payloads={item.name: cloudpickle.dumps(item.payload) for item in items},
                rungs=None if climbing is None else len(climbing) + 1,
                shared=shared,
            ),
            tune.PlacementGroupFactory([resources]),
        )
        tuner = tune.Tuner(
            trainable,
            param_space={"name": tune.grid_search([item.name for item in items])},
            tune_config=tune.TuneConfig(
                reuse_actors=True,
                search_alg=BasicVariantGenerator(max_concurrent=concurrent)
                if scheduler is None
                else PausingGenerator(scheduler),
                scheduler=scheduler,
            ),
            run_config=run_settings(store, callback, max_failures=max_failures, verbose=verbose),
        )
        before = groups_made_here()
        try:
            tuner.fit()
        except BaseException:
            # Tune keeps the room of a search that it did not end itself: what comes next would wait for it.
            for group in groups_made_here() - before:
                remove_placement_group(group)
            if callback.error is not None:
                raise callback.error from None
            raise
        finally:
            _sweep(store)


def _sweep(store: CheckpointStore) -> None:
    """Delete Tune's records: rows leave through the callback, and a later run would only add to them."""
    for info in store.filesystem.get_file_info(fs.FileSelector(store.root, allow_not_found=True)):
        if info.type == fs.FileType.Directory and info.base_name.startswith("Assessment_"):
            store.filesystem.delete_dir(info.path)
        elif info.type == fs.FileType.File and info.base_name.startswith(_TUNE_FILES):
            store.filesystem.delete_file(info.path)
