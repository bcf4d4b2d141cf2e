"""The driver's side of a training run on a cluster."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import Any, cast

import ray

from pipeline.cluster.causes import is_death, one_line
from pipeline.cluster.inline import FitOutcome
from pipeline.cluster.relay import Relay
from pipeline.cluster.session import active, calm, describe, slots
from pipeline.engine.checkpoint import KEPT, CheckpointStore
from pipeline.errors import FacultyError, StageError, UserError

_POLL_S = 0.1
# How often a start of the workers is tried again; each waits a minute for its resources.
_STARTS, _STARTS_AUTOSCALING = 2, 20


def fit_on_cluster(
    loop: Callable[[Any, Any], None],
    payload: Any,
    *,
    num_workers: int,
    storage: str,
    name: str,
    use_gpu: bool,
    resources_per_worker: dict[str, float] | None,
    max_failures: int,
    on_report: Callable[[dict[str, Any]], None] | None,
    verbose: bool,
) -> FitOutcome:
    """Train on Ray workers; see :func:`pipeline.cluster.train.fit`."""
    _check_room(num_workers, dict(resources_per_worker or {"CPU": 1}) | ({"GPU": 1} if use_gpu else {}))
    store = CheckpointStore(storage, name)
    store.tidy(KEPT)
    first = store.newest()
    relay = Relay()
    run = _Run(relay, on_report)
    try:
        from pipeline.cluster.worker import Job

        job = Job(loop, payload, storage, name, first.name if first else None, relay)
        with calm(verbose):
            trainer = _trainer(job, num_workers, use_gpu, resources_per_worker, max_failures, verbose)
            run.follow(trainer.fit)
    except FacultyError:
        raise
    except Exception as error:
        raise _explain(error, run, store, verbose) from error
    finally:
        relay.close()
    store.tidy(KEPT)
    newest = store.newest()
    metrics = run.last if run.last is not None else newest.metrics if newest else {}
    return FitOutcome(metrics, store.path(newest.name) if newest else None)


class _Aborted(Exception):
    """The driver ended the run because an error would only repeat."""


class _Run:
    """A run in a thread of its own, while this thread hands on its messages."""

    def __init__(self, relay: Relay, on_report: Callable[[dict[str, Any]], None] | None) -> None:
        self.last: dict[str, Any] | None = None
        self.failures: list[dict[str, Any]] = []
        self._relay = relay
        self._on_report = on_report
        self._controller: Any = None
        self._error: BaseException | None = None

    def follow(self, call: Callable[[], Any]) -> None:
        """Run the call to its end; raise what it raised."""
        ended = threading.Event()

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
        line = f"worker {died[0]}: {one_line(failures[died[0]])}"
    elif told is not None:
        line = f"worker {told['rank']}: {told['line']}"
    else:
        line = one_line(error)
    text = "\n".join(f"worker {item['rank']}\n{item['traceback']}" for item in run.failures) or str(error)
    log = store.write("error.log", text.encode())
    where = f"\n{text}" if verbose else f" (traceback in {log})"
    return StageError(f"training {store.root.rsplit('/', 1)[-1]!r} failed: {line}{where}")


def _check_room(num_workers: int, each: dict[str, float]) -> None:
    room = slots(each)
    if num_workers > room and not active().autoscaling:
        raise UserError(
            f"num_workers is {num_workers} with {describe(each)} each, but the cluster has room for {room}; "
            f"set num_workers to at most {room} (0 trains without a cluster) or ask for less per worker"
        )


def _trainer(
    job: Any,
    num_workers: int,
    use_gpu: bool,
    resources_per_worker: dict[str, float] | None,
    max_failures: int,
    verbose: bool,
) -> Any:
    from ray.train.v2.api import config

    from pipeline.cluster.controller import ClusterTrainer, LocalTrainer, callbacks
    from pipeline.cluster.process_group import ProcessGroupConfig
    from pipeline.cluster.worker import run_worker

    starts = _STARTS_AUTOSCALING if active().autoscaling else _STARTS
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
                storage_path=job.storage if "://" in job.storage else CheckpointStore(job.storage, "").root.rstrip("/"),
                checkpoint_config=config.CheckpointConfig(num_to_keep=KEPT),
                failure_config=config.FailureConfig(max_failures=max_failures, controller_failure_limit=starts),
                callbacks=callbacks(job.relay),
                logging_config=config.LoggingConfig(log_level="INFO" if verbose else "ERROR"),
            ),
        ),
    )
