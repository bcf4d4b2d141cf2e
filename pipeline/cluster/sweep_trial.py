"""One trial of a sweep, on its process: it drives a training run, and tells Tune of each epoch."""

from __future__ import annotations

import contextlib
import json
import queue
import shutil
import tempfile
import threading
import traceback
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle, tune
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

from pipeline.cluster import session
from pipeline.cluster.causes import one_line
from pipeline.cluster.relay import Relay
from pipeline.cluster.spec import ClusterSpec
from pipeline.cluster.train import fit
from pipeline.cluster.trainable import ROW, Row
from pipeline.engine.checkpoint import MANIFEST, CheckpointStore
from pipeline.errors import StageError

CURVE = "faculty_curve"  # the reports of a step, apart from the many keys that Tune adds to a result
_EPOCH = "faculty-epoch.json"
_SHELVES = b"faculty-sweep"
_END_S = 60.0  # a training that is told to end takes no longer, or its process ends


@dataclass(frozen=True)
class Work:
    """What all trials of a sweep share.

    Attributes
    ----------
    loop : bytes
        ``loop(context, payload)``, importable by name, pickled: a module that is not there is an error of the trial.
    make : bytes
        ``make(payload, values, until)``, likewise: from what a trial was given to what its loop gets; `values` are
        those that the scheduler has set, `until` is the last epoch of the leg.
    how : dict
        Further arguments of :func:`pipeline.cluster.train.fit`: workers, resources, storage.
    interval : int or None
        Epochs of a leg, after which a scheduler may give the trial other weights and values; None: one leg.
    """

    loop: bytes
    make: bytes
    how: dict[str, Any]
    interval: int | None = None


class Packed:
    """A trial's payload, kept by the cluster: Tune writes configurations into files, and an address may be secret.

    Parameters
    ----------
    shelf : str
        Where the payloads of a sweep stand; `clear_shelf` takes them away.
    payload : object
        Small and picklable.
    """

    def __init__(self, shelf: str, payload: Any) -> None:
        self._key = f"{shelf}/{uuid.uuid4().hex}".encode()
        _internal_kv_put(self._key, cloudpickle.dumps(payload), namespace=_SHELVES)

    def __repr__(self) -> str:
        return "packed"

    def unpack(self) -> Any:
        """Return it, in any process of the cluster."""
        data = _internal_kv_get(self._key, namespace=_SHELVES)
        if data is None:
            raise StageError("the trial's payload is no longer there; run the sweep again")
        return cloudpickle.loads(data)


def clear_shelf(shelf: str) -> None:
    """Take the payloads of a sweep away."""
    _internal_kv_del(f"{shelf}/".encode(), del_by_prefix=True, namespace=_SHELVES)


class _Stopped(BaseException):
    """Tune has ended the trial. No Exception: what trains must not take it for a failure of its own."""


class SweepTrial(tune.Trainable):
    """Fits a training run; a step is an epoch, or a leg. The process serves one trial after another.

    The configuration has ``name``, the run's folder in the storage; ``payload``, `Packed`; ``epochs``; and what a
    scheduler may set, by paths of settings.
    """

    def setup(self, config: Row, work: Work, spec: ClusterSpec, relay: Relay) -> None:  # type: ignore[override]
        """Take what all trials share."""
        session._active = spec  # this process was connected by Ray, to the driver's cluster
        relay.push("driver", ray.get_runtime_context().current_actor)
        self._work = work
        if not work.how["num_workers"]:
            _set_threads()
        self._begin()

    def _begin(self) -> None:
        self._thread: threading.Thread | None = None
        self._told: queue.Queue[tuple[str, Row]] = queue.Queue()
        self._go = threading.Semaphore(0)
        self._stopping = False

    def step(self) -> Row:
        """Train to the end of an epoch, or of a leg; the last result has a row, see `run_sweep`."""
        if self._work.interval is not None:
            return self._leg(self._work.interval)
        if self._thread is None:
            self._thread = threading.Thread(target=self._train, name="faculty-trial", daemon=True)
            self._thread.start()
        else:
            self._go.release()  # it waits where it told of its last epoch
        kind, data = self._told.get()
        return {ROW: data, "done": True} if kind == "end" else data | {CURVE: [data], "done": False}

    def _train(self) -> None:
        row: Row = {"ended": True}
        try:
            self._fit({}, None, self._tell)
        except _Stopped:
            return
        except Exception as error:
            row = _failure(error)
        self._told.put(("end", row))

    def _tell(self, metrics: Row) -> None:
        """Tell of an epoch, and wait until Tune has decided: whoever is to end does so at once."""
        if "epoch" in metrics:
            self._told.put(("report", metrics))
            self._go.acquire()
        if self._stopping:
            raise _Stopped

    def _leg(self, interval: int) -> Row:
        curve: list[Row] = []
        values = {path: value for path, value in self.config.items() if path not in ("name", "payload", "epochs")}
        newest = self._store().newest()
        until = min((newest.metrics.get("epoch", 0) if newest else 0) + interval, self.config["epochs"])
        try:
            self._fit(values, until, lambda metrics: curve.append(metrics) if "epoch" in metrics else None)
        except Exception as error:
            return {ROW: _failure(error), "done": True}
        last = curve[-1] if curve else {}
        told = last | {"epoch": until, CURVE: curve, "done": False}
        return told | {ROW: {"ended": True}, "done": True} if until == self.config["epochs"] else told

    def _fit(self, values: Row, until: int | None, on_report: Any) -> None:
        loop, make = cloudpickle.loads(self._work.loop), cloudpickle.loads(self._work.make)
        payload = make(self.config["payload"].unpack(), values, until)
        fit(loop, payload, name=self.config["name"], on_report=on_report, **self._work.how)

    def release(self) -> None:
        """End what trains, and give its workers back; Tune keeps the process for another trial."""
        thread, self._stopping = self._thread, True
        self._go.release()
        if thread is not None:
            thread.join(_END_S)

    def cleanup(self) -> None:
        """Leave nothing behind."""
        self.release()

    def reset_config(self, new_config: Row) -> bool:
        """Agree to serve another trial, or the same one with other values."""
        self.release()
        stuck = self._thread is not None and self._thread.is_alive()
        self._begin()
        return not stuck

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Copy the newest checkpoint of the training: another trial may go on from it."""
        store, target = self._store(), Path(checkpoint_dir)
        newest = store.newest()
        if newest is not None:
            with store.local(newest.name) as folder:
                shutil.copytree(folder, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
        epoch = newest.metrics.get("epoch", 0) if newest is not None else 0
        (target / _EPOCH).write_text(json.dumps({"epoch": epoch}), encoding="utf-8")

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Make a checkpoint, its own or another trial's, the newest one of the training."""
        source, store = Path(checkpoint), self._store()
        epoch = int(json.loads((source / _EPOCH).read_text(encoding="utf-8"))["epoch"])
        newest = store.newest()
        with tempfile.TemporaryDirectory(prefix="faculty-trial-") as scratch:
            folder = Path(scratch) / "state"
            shutil.copytree(source, folder, ignore=shutil.ignore_patterns(_EPOCH, ".*"))
            if any(folder.iterdir()):
                store.save(folder, {"epoch": epoch}, 0 if newest is None else newest.index + 1)

    def _store(self) -> CheckpointStore:
        return CheckpointStore(self._work.how["storage"], self.config["name"])


def _failure(error: Exception) -> Row:
    text = "".join(traceback.format_exception(error))
    return {"error": one_line(error), "error_type": type(error).__name__, "traceback": text}


def _set_threads() -> None:
    """Let torch use the processors given to this trial, which trains in its own process."""
    import torch

    with contextlib.suppress(RuntimeError):
        given = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
        torch.set_num_threads(max(1, int(given)))
