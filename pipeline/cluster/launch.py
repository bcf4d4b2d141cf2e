"""The driver's side of a training run on a cluster."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable
from typing import Any, cast

import ray
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.util.placement_group import remove_placement_group

from pipeline.cluster.causes import (
    forget_failures,
    is_death,
    is_memory,
    memory_failures,
    note_memory_failure,
    one_line,
    storage_of,
    training_line,
    write_log,
)
from pipeline.cluster.groups import own_groups
from pipeline.cluster.inline import FitOutcome, bounds
from pipeline.cluster.relay import Relay
from pipeline.cluster.session import active, calm, describe, slots
from pipeline.engine.checkpoint import KEPT, CheckpointStore
from pipeline.errors import FacultyError, StageError, UserError

_POLL_S = 0.1
_SWEEP_S = 2.0
# How often a start of the workers is tried again that found no room; the higher number where room comes and goes.
_STARTS, _STARTS_PATIENT = 2, 20


def fit_on_cluster(
    loop: Callable[[Any, Any], None],
    payload: Any,
    *,
    num_workers: int | tuple[int, int],
    storage: str,
    name: str,
    use_gpu: bool,
    resources_per_worker: dict[str, float] | None,
    max_failures: int,
    on_report: Callable[[dict[str, Any]], None] | None,
    verbose: bool,
) -> FitOutcome:
    """Train on Ray workers; see :func:`pipeline.cluster.train.fit`."""
    size = _settle(num_workers, dict(resources_per_worker or {"CPU": 1}) | ({"GPU": 1} if use_gpu else {}))
    store = CheckpointStore(storage, name)
    from pipeline.cluster.worker import Job

    lost = starts = 0
    while True:
        with storage_of(store):
            store.tidy(KEPT)
        relay = Relay()
        run = _Run(relay, on_report, starts)
        try:
            job = Job(loop, payload, storage, name, relay)
            with calm(verbose):
                trainer = _trainer(job, size, use_gpu, resources_per_worker, max_failures - lost, starts, verbose)
                run.follow(trainer.fit, sweeping=lost > 0)
            break
        except FacultyError:
            raise
        except Exception as error:
            if run.lost_controller and is_memory(error):
                note_memory_failure(store, memory_failures(store) + 1)
            if not run.lost_controller or lost == max_failures:
                raise _explain(error, run, store, verbose) from error
            lost += 1
        finally:
            relay.close()
        starts = run.starts
    forget_failures(store)
    with storage_of(store):
        store.tidy(KEPT)
        newest = store.newest()
    metrics = run.last if run.last is not None else newest.metrics if newest else {}
    return FitOutcome(metrics, store.path(newest.name) if newest else None)


def sweep() -> int:
    """Remove this job's groups whose creator has died; return how many there are whose creator has not.

    Ray keeps a group that an actor made until the whole job ends.
    """
    made = [one for one in own_groups() if one.by_actor]
    orphans = [one.group for one in made if one.orphaned]
    for group in orphans:
        remove_placement_group(group)
    return len(made) - len(orphans)


class _Aborted(Exception):
    """The driver ended the run because an error would only repeat."""


class _Run:
    """A run in a thread of its own, while this thread hands on its messages."""

    def __init__(self, relay: Relay, on_report: Callable[[dict[str, Any]], None] | None, starts: int) -> None:
        self.last: dict[str, Any] | None = None
        self.failures: list[dict[str, Any]] = []
        self.starts = starts
        self.lost_controller = False
        self._relay = relay
        self._on_report = on_report
        self._controller: Any = None
        self._error: BaseException | None = None

    def follow(self, call: Callable[[], Any], *, sweeping: bool) -> None:
        """Run the call to its end; raise what it raised. With `sweeping`, free what lost controllers hold."""
        ended = threading.Event()
        swept = time.monotonic()

        def target() -> None:
            try:
                call()
            except BaseException as error:
                self._error = error
            finally:
                ended.set()

        thread = threading.Thread(target=target, name="faculty-fit", daemon=True)
        thread.start()
        try:
            while not ended.wait(_POLL_S):
                self._hand_on()
                if sweeping and time.monotonic() - swept > _SWEEP_S:
                    sweep()  # again and again: it takes Ray a while to see that the creator of a group has died
                    swept = time.monotonic()
                if any(failure["final"] for failure in self.failures):
                    raise _Aborted
            self._hand_on()  # senders wait for delivery, so that all messages are in by now
        except BaseException:
            # Also an interrupt, or an exception in the caller's on_report: nothing may go on training unseen.
            self._abort()
            ended.wait(30)
            raise
        finally:
            if self._controller is not None:
                ray.kill(self._controller)  # its handle has travelled, so Ray would not end it by itself
        if self._error is not None:
            # Ray starts workers anew, but not the controller that does it: where memory is short, it may end that too.
            self.lost_controller = is_death(self._error) and not isinstance(self._error, TrainingFailedError)
            raise self._error

    def _hand_on(self) -> None:
        for kind, data in self._relay.drain():
            if kind == "report":
                self.last = data
                if self._on_report is not None:
                    self._on_report(data)
            elif kind == "failure":
                self.failures.append(data)
            elif kind == "start":
                self.starts = data + 1
                self.failures.clear()
            elif kind == "controller":
                self._controller = data

    def _abort(self) -> None:
        if self._controller is not None:
            with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
                ray.get(self._controller.abort.remote(), timeout=30)


def _explain(error: Exception, run: _Run, store: CheckpointStore, verbose: bool) -> StageError:
    """Turn what a run raised into one line, and leave the whole of it in a file beside the checkpoints."""
    failures = getattr(error, "worker_failures", None) or {}
    died = sorted(rank for rank, failure in failures.items() if is_death(failure))
    final = [failure for failure in run.failures if failure["final"]]
    told = next(iter(final or run.failures), None)
    if died and not final:
        line = f"worker {died[0]}: {training_line(failures[died[0]])}"
    elif told is not None:
        line = f"worker {told['rank']}: {told['line']}"
    elif isinstance(getattr(error, "controller_failure", None), OSError):
        line = f"its folder {store.uri} can't be written: {one_line(error)}"
    else:
        line = training_line(error)
    text = "\n".join(f"worker {item['rank']}\n{item['traceback']}" for item in run.failures) or str(error)
    log = write_log(store, text)
    where = f"\n{text}" if verbose else f" ({log})"
    return StageError(f"training {store.root.rsplit('/', 1)[-1]!r} failed: {line}{where}")


def _settle(num_workers: int | tuple[int, int], each: dict[str, float]) -> int | tuple[int, int]:
    """Check that there is room for the fewest workers; choose their number where no node will come or go."""
    fewest, most = bounds(num_workers)
    check_room(fewest, each)
    if fewest == most:
        return most
    return min(most, slots(each)) if active().local else (fewest, most)


def check_room(num_workers: int, each: dict[str, float]) -> None:
    """Refuse a number of workers that the cluster can't hold.

    Raises
    ------
    UserError
        When it does not add nodes either.
    """
    room = slots(each)
    if num_workers > room and not active().autoscaling:
        raise UserError(
            f"num_workers is {num_workers} with {describe(each)} each, but the cluster has room for {room}; "
            f"set num_workers to at most {room} (0 trains without a cluster) or ask for less per worker"
        )


def _trainer(
    job: Any,
    num_workers: int | tuple[int, int],
    use_gpu: bool,
    resources_per_worker: dict[str, float] | None,
    max_failures: int,
    starts: int,
    verbose: bool,
) -> Any:
    from ray.train.v2.api import config

    from pipeline.cluster.controller import ClusterTrainer, LocalTrainer, callbacks
    from pipeline.cluster.process_group import ProcessGroupConfig
    from pipeline.cluster.worker import run_worker

    tries = _STARTS_PATIENT if active().autoscaling or not isinstance(num_workers, int) else _STARTS
    trainer = LocalTrainer if active().local else ClusterTrainer
    return trainer(
        # A partial instead of a config: the controller would unpickle a config, and import torch for it.
        functools.partial(run_worker, job),
        backend_config=ProcessGroupConfig("nccl" if use_gpu else "gloo"),
        scaling_config=config.ScalingConfig(
            num_workers=num_workers, use_gpu=use_gpu, resources_per_worker=resources_per_worker
        ),
        run_config=cast(
            Any,
            config.RunConfig(
                name=job.name,
                storage_path=CheckpointStore(job.storage, job.name).storage,
                checkpoint_config=config.CheckpointConfig(num_to_keep=KEPT),
                failure_config=config.FailureConfig(max_failures=max_failures, controller_failure_limit=tries),
                callbacks=callbacks(job.relay, job.storage, job.name, starts),
                logging_config=config.LoggingConfig(log_level="INFO" if verbose else "ERROR"),
            ),
        ),
    )
