"""A callback for Ray Train (V2) that records a training run in MLflow, usable by itself.

    from ray.train import RunConfig
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        loop,
        scaling_config=...,
        run_config=RunConfig(
            name="birds", storage_path="/shared/runs", callbacks=mlflow_callbacks("http://mlflow:5000")
        ),
    )

They live in Ray Train's controller, and this module therefore imports no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import numbers
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import ray
from ray.train import UserCallback
from ray.train.v2._internal.execution.callback import ControllerCallback

from pipeline.errors import StageError
from pipeline.tracking.connect import open_tracker
from pipeline.tracking.spec import TrackingSpec
from pipeline.tracking.tracker import Tracker

_STEP_KEYS = ("step", "epoch", "training_iteration")
_STATUS = {"FinishedState": "FINISHED", "ErroredState": "FAILED", "AbortedState": "KILLED"}
_LAST_LOOK_S = 5.0
_MOST_NODES = 16
_CHUNK = 2**20


def mlflow_callbacks(uri: str | None = None, **named: Any) -> list[Any]:
    """Return the callbacks that record a training run in MLflow; arguments as of :class:`MlflowCallback`.

    Ray Train tells a `UserCallback` of reports and exceptions, but neither of a run's start nor of its end: that is
    what the second one is for.
    """
    callback = MlflowCallback(uri, **named)
    return [callback, StartAndEnd(callback)]


class MlflowCallback(UserCallback):
    """Records what the workers report: numbers of all ranks, throughput, checkpoints, the nodes' load, how it ended.

    For a number m_r that ranks r = 1..R report, its mean is recorded under its name; where the ranks differ, also
    ``<name>/min`` and ``<name>/max``. Names in `summed` are added up instead. ``seconds_per_report`` is the time
    between two reports and, where the ranks report the number of images (or other samples) that they have seen since
    the last report under one of the names in `samples`, ``<name>_per_second`` their sum divided by it.

    Nothing of it waits for MLflow: records go to a journal in the run's storage (a local path; elsewhere they wait in
    memory) and are sent in the background. A server that is gone for a while, at the start too, gets all of them when
    it is back. A run that is continued (the same name in the same storage, or the same `key`) continues the same
    MLflow run, without a gap and without a second point at a step.

    Parameters
    ----------
    uri : str, optional
        The tracking server or database; default: ``MLFLOW_TRACKING_URI`` of the controller's environment, else a
        database in the run's storage. Credentials belong in the environment: ``MLFLOW_TRACKING_USERNAME`` and
        ``MLFLOW_TRACKING_PASSWORD``, or ``MLFLOW_TRACKING_TOKEN``.
    experiment : str
        Created where it does not exist.
    key : str, optional
        What the run is found again by; default: its storage path and name.
    tags, params : mapping, optional
        Recorded at the start, beside the training loop's own configuration.
    step : str, optional
        The reported number that is the step; default: ``step``, ``epoch`` or ``training_iteration``, the first that
        is reported, else the number of the report.
    summed, samples : sequence of str
        See above.
    checkpoints : {"reference", "artifact", "none"}
        ``reference`` records path, size and SHA-256 of each checkpoint's files (the hash where the storage is a local
        path); ``artifact`` uploads the folder.
    load_every_s : float, optional
        Seconds between two looks at the nodes' processors, memory and GPUs; None: no looks.

    Notes
    -----
    A worker that fails leaves the tags ``exception.<rank>``; the run ends as FINISHED, FAILED, or KILLED when Ray Train
    was aborted. Without :class:`StartAndEnd` (see :func:`mlflow_callbacks`) the run is opened by the first report and
    stays RUNNING.
    """

    def __init__(
        self,
        uri: str | None = None,
        *,
        experiment: str = "ray-train",
        key: str | None = None,
        tags: Mapping[str, Any] | None = None,
        params: Mapping[str, Any] | None = None,
        step: str | None = None,
        summed: Sequence[str] = (),
        samples: Sequence[str] = ("images", "samples"),
        checkpoints: Literal["reference", "artifact", "none"] = "reference",
        load_every_s: float | None = 15.0,
    ) -> None:
        if checkpoints not in ("reference", "artifact", "none"):
            raise ValueError(f"checkpoints must be reference, artifact or none, got {checkpoints!r}")
        if load_every_s is not None and load_every_s <= 0:
            raise ValueError(f"load_every_s must be > 0 or None, got {load_every_s}")
        self._spec = TrackingSpec(uri=uri, experiment=experiment)
        self._key, self._tags, self._params = key, dict(tags or {}), dict(params or {})
        self._step, self._summed, self._samples = step, tuple(summed), tuple(samples)
        self._checkpoints, self._load_every_s = checkpoints, load_every_s
        self._exits = contextlib.ExitStack()
        self._tracker: Tracker | None = None
        self._reports = self._at = 0
        self._last = self._looked = 0.0
        self._looks: list[ray.ObjectRef] = []
        self._kept: list[dict[str, Any]] = []
        self._error: BaseException | None = None

    def __getstate__(self) -> dict[str, Any]:
        # It travels before the run begins: what it has open then is nothing.
        return {key: value for key, value in self.__dict__.items() if key != "_exits"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _exits=contextlib.ExitStack())

    def open(self, run_context: Any) -> None:
        """Open the run, unless it is open."""
        if self._tracker is not None:
            return
        config = run_context.get_run_config()
        place, name = str(config.storage_path), str(config.name)
        loop = run_context.train_loop_config
        given = self._params | {"workers": run_context.scaling_config.num_workers}
        if isinstance(loop, Mapping):
            given = {"loop": dict(loop)} | given
        digest = hashlib.sha256(f"{place}/{name}".encode()).hexdigest()
        opened = open_tracker(
            self._spec,
            place if "://" in place else Path(place) / name,
            name=name,
            key=self._key or f"ray-train-{digest[:24]}",
            tags=self._tags | {"ray.job_id": ray.get_runtime_context().get_job_id(), "ray.storage": f"{place}/{name}"},
            params=given,
            wait=False,
        )
        self._tracker = self._exits.enter_context(opened)
        self._last = time.monotonic()

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Record what the ranks reported."""
        self.open(run_context)
        assert self._tracker is not None
        self._reports += 1
        now = time.monotonic()
        elapsed, self._last = now - self._last, now
        found = reduced(metrics, self._summed)
        step = int(found.pop(self._step_key(found), self._reports))
        found |= throughput(metrics, self._samples, elapsed)
        self._at = step
        self._tracker.metrics(found | self._load(now), step=step)
        if checkpoint is not None and self._checkpoints != "none":
            self._keep(checkpoint, step)

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Record which ranks failed and by what; the run goes on if Ray Train restarts them."""
        self.open(run_context)
        if self._tracker is not None:
            named = {
                f"exception.{rank}": _line(error) for rank, error in sorted(worker_exceptions.items())[:_MOST_NODES]
            }
            self._tracker.tags(named)
        self._error = next(iter(worker_exceptions.values()), None)

    def close(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED."""
        error: BaseException | None = None
        if status == "FAILED":
            error = StageError(_line(self._error) if self._error is not None else "the training failed")
        elif status == "KILLED":
            error = KeyboardInterrupt("aborted")
        if self._tracker is not None:
            self._tracker.metrics(self._looked_at(_LAST_LOOK_S), step=self._at)
            self._tracker = None
            with contextlib.suppress(StageError, KeyboardInterrupt):
                self._exits.__exit__(None if error is None else type(error), error, None)

    def _step_key(self, found: Mapping[str, float]) -> str:
        if self._step is not None:
            return self._step
        return next((key for key in _STEP_KEYS if key in found), "")

    def _keep(self, checkpoint: Any, step: int) -> None:
        assert self._tracker is not None
        local = str(getattr(checkpoint.filesystem, "type_name", "")) == "local"
        if self._checkpoints == "artifact":
            with checkpoint.as_directory() as folder:
                self._tracker.artifact(folder, f"checkpoints/step_{step}")
            return
        self._kept.append({"step": step, "path": str(checkpoint.path), **(_files(checkpoint.path) if local else {})})
        self._tracker.document("checkpoints", self._kept)

    def _load(self, now: float) -> dict[str, float]:
        """Return what the last looks at the nodes found, and look again when it is time to."""
        if self._load_every_s is None:
            return {}
        found = self._looked_at(0.0)
        if not self._looks and now - self._looked >= self._load_every_s:
            self._looked = now
            nodes = [node for node in ray.nodes() if node["Alive"]][:_MOST_NODES]
            self._looks = [_look.options(scheduling_strategy=_on(node["NodeID"])).remote() for node in nodes]
        return found

    def _looked_at(self, wait_s: float) -> dict[str, float]:
        """Return what looks that were begun have found, and forget them."""
        found: dict[str, float] = {}
        if self._looks:
            done, self._looks = ray.wait(self._looks, num_returns=len(self._looks), timeout=wait_s)
            for look in done:
                with contextlib.suppress(ray.exceptions.RayError):
                    node, load = ray.get(look)
                    found |= {f"system/{node}/{name}": value for name, value in load.items()}
        return found


class StartAndEnd(ControllerCallback):
    """Opens the run of a callback as Ray Train's begins, and ends it as that ends."""

    def __init__(self, callback: MlflowCallback) -> None:
        self._callback = callback

    def after_controller_start(self, train_run_context: Any) -> None:
        """Open the run."""
        self._callback.open(train_run_context)

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """End the run when Ray Train's has ended."""
        status = _STATUS.get(type(current_state).__name__)
        if status is not None:
            self._callback.close(status)

    def before_controller_abort(self) -> None:
        """End the run as killed."""
        self._callback.close("KILLED")


def reduced(ranks: Sequence[Mapping[str, Any]], summed: Sequence[str] = ()) -> dict[str, float]:
    """Return the mean over ranks of every number that one of them reports, its extremes where they differ.

    Numbers named in `summed` are added up. What is no number is left out.
    """
    found: dict[str, float] = {}
    for name in dict.fromkeys(name for metrics in ranks for name in metrics):
        values = [float(metrics[name]) for metrics in ranks if _is_number(metrics.get(name))]
        if not values:
            continue
        if name in summed:
            found[name] = math.fsum(values)
            continue
        found[name] = values[0] if len(set(values)) == 1 else math.fsum(values) / len(values)
        if len(set(values)) > 1:
            found |= {f"{name}/min": min(values), f"{name}/max": max(values)}
    return found


def throughput(ranks: Sequence[Mapping[str, Any]], samples: Sequence[str], elapsed: float) -> dict[str, float]:
    """Return the seconds between two reports, and how many samples a second all ranks together have seen."""
    found = {"seconds_per_report": elapsed}
    for name in samples:
        values = [float(metrics[name]) for metrics in ranks if _is_number(metrics.get(name))]
        if values and elapsed > 0:
            found[f"{name}_per_second"] = math.fsum(values) / elapsed
    return found


@ray.remote(num_cpus=0, max_retries=0)
def _look() -> tuple[str, dict[str, float]]:
    """Look at the node that this runs on."""
    import psutil

    memory = psutil.virtual_memory()
    found = {"cpu_percent": psutil.cpu_percent(0.2), "memory_mb": (memory.total - memory.available) / 2**20}
    with contextlib.suppress(Exception):  # no GPU, or no library for it
        from ray._private.thirdparty import pynvml

        pynvml.nvmlInit()
        for number in range(pynvml.nvmlDeviceGetCount()):
            device = pynvml.nvmlDeviceGetHandleByIndex(number)
            found[f"gpu{number}_percent"] = float(pynvml.nvmlDeviceGetUtilizationRates(device).gpu)
            found[f"gpu{number}_memory_mb"] = pynvml.nvmlDeviceGetMemoryInfo(device).used / 2**20
    return ray.util.get_node_ip_address(), found


def _on(node: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node, soft=False)


def _files(folder: str) -> dict[str, Any]:
    found = {}
    with contextlib.suppress(OSError):  # Ray has deleted it already, because newer ones are there
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                digest = hashlib.sha256()
                with path.open("rb") as file:
                    while chunk := file.read(_CHUNK):
                        digest.update(chunk)
                name = str(path.relative_to(folder))
                found[name] = {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
    return {"files": found}


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _line(error: BaseException) -> str:
    """Return the last line of an error, which is what a worker's own error ends with."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1].strip()
