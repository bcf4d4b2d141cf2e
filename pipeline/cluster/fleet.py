"""Several training runs side by side, as trials of Ray Tune whose processes drive Ray Train."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray import cloudpickle, tune
from ray.tune.search import BasicVariantGenerator

from pipeline.cluster import session
from pipeline.cluster.causes import one_line
from pipeline.cluster.inline import bounds
from pipeline.cluster.launch import check_room, fit_on_cluster, sweep
from pipeline.cluster.many import FitJob, Result
from pipeline.cluster.relay import Relay
from pipeline.cluster.spec import ClusterSpec
from pipeline.cluster.trainable import ROW, DeliveryCallback, Row
from pipeline.cluster.tuning import DRIVER, delete_records, run_settings
from pipeline.engine.checkpoint import CheckpointStore

_SWEEP_S = 2.0
_ABORT_S = 15.0


def fit_side_by_side(
    loop: Callable[[Any, Any], None],
    jobs: Sequence[FitJob],
    *,
    num_workers: int | tuple[int, int],
    storage: str,
    use_gpu: bool,
    resources_per_worker: dict[str, float] | None,
    max_concurrent: int | None,
    max_failures: int,
    on_report: Callable[[str, dict[str, Any]], None] | None,
    verbose: bool,
) -> list[Result]:
    """Train on Ray workers; see :func:`pipeline.cluster.many.fit_many`."""
    each = dict(resources_per_worker or {"CPU": 1}) | ({"GPU": 1} if use_gpu else {})
    fewest, most = bounds(num_workers)
    check_room(fewest, each)
    room = 1024 if session.active().autoscaling else session.slots(each)
    concurrent = min(len(jobs), max_concurrent or len(jobs), max(1, room // most))
    results: dict[str, Result] = {}

    def deliver(name: str, row: Row) -> None:
        results[name] = (row["outcome"], None) if "outcome" in row else (None, row["error"])

    store = CheckpointStore(storage, f".fit-many-{uuid.uuid4().hex[:8]}")
    relay = Relay()
    callback = FleetCallback(relay, deliver, on_report)
    fitting = {
        "num_workers": num_workers,
        "storage": storage,
        "use_gpu": use_gpu,
        "resources_per_worker": resources_per_worker,
        "max_failures": max_failures,
        "verbose": verbose,
    }
    try:
        with session.calm(verbose):
            tuner = tune.Tuner(
                tune.with_resources(
                    tune.with_parameters(
                        drive,
                        # Pickled here and unpickled in the trial: a module that is not there is an error of the trial.
                        loop=cloudpickle.dumps(loop),
                        payloads={job.name: cloudpickle.dumps(job.payload) for job in jobs},
                        fitting=fitting,
                        spec=session.active(),
                        relay=relay,
                    ),
                    tune.PlacementGroupFactory([DRIVER]),
                ),
                param_space={"name": tune.grid_search([job.name for job in jobs])},
                tune_config=tune.TuneConfig(
                    reuse_actors=True, search_alg=BasicVariantGenerator(max_concurrent=concurrent)
                ),
                run_config=run_settings(store, callback, max_failures=max_failures, verbose=verbose),
            )
            tuner.fit()
            callback.hand_on()
    except BaseException:
        callback.end_drivers()
        _sweep_until_clear()
        if callback.error is not None:
            raise callback.error from None
        raise
    finally:
        callback.end_drivers()
        relay.close()
        delete_records(store)
    return [results.get(job.name, (None, "the run ended without a result")) for job in jobs]


def drive(
    config: Row,
    loop: bytes,
    payloads: dict[str, bytes],
    fitting: dict[str, Any],
    spec: ClusterSpec,
    relay: Relay,
) -> None:
    """Fit one job from a trial's process; an error is part of the trial's result."""
    name = config["name"]
    session._active = spec  # this process was connected by Ray, to the driver's cluster
    relay.push("driver", ray.get_runtime_context().current_actor)
    row: Row
    try:
        outcome = fit_on_cluster(
            cloudpickle.loads(loop),
            cloudpickle.loads(payloads[name]),
            name=name,
            on_report=lambda metrics: relay.push("report", (name, metrics)),
            **fitting,
        )
        row = {"outcome": outcome}
    except Exception as error:
        row = {"error": str(error) if fitting["verbose"] else one_line(error)}
    tune.report({ROW: row})


class FleetCallback(DeliveryCallback):
    """Hands on reports and outcomes in the thread that waits for Tune, and clears up after trials that died."""

    def __init__(
        self,
        relay: Relay,
        deliver: Callable[[str, Row], None],
        on_report: Callable[[str, dict[str, Any]], None] | None,
    ) -> None:
        super().__init__(deliver, {})
        self._relay: Relay | None = relay
        self._on_report = on_report
        self._drivers: list[Any] = []
        self._swept = time.monotonic()

    def __getstate__(self) -> dict[str, Any]:
        # Tune saves its callbacks with the experiment; what the driver does with a report stays in the driver.
        return super().__getstate__() | {"_relay": None, "_on_report": None, "_drivers": [], "_swept": 0.0}

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Hand on what has come since the last step."""
        self.hand_on()
        if time.monotonic() - self._swept > _SWEEP_S:
            # Else the workers of a trial that is tried again would wait for those it lost.
            sweep()
            self._swept = time.monotonic()

    def hand_on(self) -> None:
        """Give the caller the reports that have arrived; what it raises ends the runs."""
        for kind, data in self._relay.drain() if self._relay is not None else []:
            if kind == "driver":
                self._drivers.append(data)
            elif self._on_report is not None:
                try:
                    self._on_report(*data)
                except Exception as error:
                    self.error = error
                    self.end_drivers()  # Tune is going to wait for them
                    raise

    def end_drivers(self) -> None:
        """End the trials' processes, and with them what they own: their handles have travelled."""
        for kind, data in self._relay.drain() if self._relay is not None else []:
            if kind == "driver":
                self._drivers.append(data)
        for driver in self._drivers:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(driver)
        self._drivers = []


def _sweep_until_clear() -> None:
    """After the drivers were killed: wait until their runs are gone, so that what comes next finds the room."""
    deadline = time.monotonic() + _ABORT_S
    while sweep() and time.monotonic() < deadline:
        time.sleep(0.2)
