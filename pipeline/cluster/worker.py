"""What runs on a training worker."""

from __future__ import annotations

import contextlib
import functools
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import ray
import torch
from ray import train
from ray._private.ray_constants import env_bool
from ray.train import collective
from ray.train.v2._internal.constants import ENABLE_PREEMPTION_WATCHER_ENV_VAR
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.cluster.causes import is_memory, memory_failures, note_memory_failure, told_attempt, training_line
from pipeline.cluster.nodes import answer_here
from pipeline.engine.checkpoint import CheckpointStore, index_of, plain
from pipeline.engine.context import store_checkpoint, take_over
from pipeline.errors import StageError

if TYPE_CHECKING:
    from pipeline.cluster.inline import Loop
    from pipeline.cluster.relay import Relay

# These may pass when tried again (a peer died, the network or the memory was short); anything else would only repeat.
RETRIED = (RuntimeError, OSError, MemoryError)
# How long a worker that fails waits for its last checkpoint.
_LAST_S = 300.0


@dataclass(frozen=True)
class Job:
    """What every worker of a run gets.

    Attributes
    ----------
    loop, payload
        What to run, and on what.
    storage, name : str
        Where the run's checkpoints lie.
    relay : Relay
        The line to the driver.
    """

    loop: Loop
    payload: Any
    storage: str
    name: str
    relay: Relay


class RayContext:
    """The :class:`pipeline.engine.context.WorkerContext` of a Ray Train worker."""

    def __init__(self, job: Job) -> None:
        context = train.get_context()
        self.rank: int = context.get_world_rank()
        self.world_size: int = context.get_world_size()
        self.device = _device()
        self._store = CheckpointStore(job.storage, job.name)
        self._relay = job.relay
        start: tuple[str | None, int, int] | None = None
        if self.rank == 0:
            # Not Ray's list of checkpoints: it begins anew with each driver, and lacks one that was stored a moment
            # before a worker died.
            newest = self._store.newest()
            start = (newest.name if newest else None, told_attempt(), memory_failures(self._store))
        self._restored, self.attempt, self.memory_failures = collective.broadcast_from_rank_zero(start)
        self.last_failure = "memory" if self.memory_failures else None
        self._next = (index_of(self._restored) or 0) + 1 if self._restored else 0
        self._stored = Event()  # no checkpoint is on its way
        self._stored.set()
        self.refused: Exception | None = None

    def prepare(self, model: nn.Module) -> nn.Module:
        """Move the module to the device; wrap it where several workers train it (frozen ones have nothing to share).

        Buffers are not sent around before every step: running statistics take no part in training, and rank 0's are
        those that are kept; all others (costs, former weights) are the same on every rank anyway.
        """
        model = model.to(self.device)
        if self.world_size == 1 or not any(parameter.requires_grad for parameter in model.parameters()):
            return model
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(
            model,
            device_ids=device_ids,
            find_unused_parameters=False,
            forward_sync_buffers=False,
            gradient_as_bucket_view=True,
        )

    def report(self, metrics: dict[str, float], checkpoint: Path | None = None) -> None:
        """Tell the driver; rank 0's checkpoint is copied to the storage while the loop goes on."""
        metrics = plain(metrics)
        # Only checkpoints go through Ray: it takes one report for each of its looks at the workers.
        keeps = collective.broadcast_from_rank_zero(checkpoint is not None)
        if self.rank == 0:
            self._relay.push("report", metrics)
        if not keeps:
            return
        local = None
        if checkpoint is not None:
            self.wait()
            local = train.Checkpoint.from_directory(take_over(checkpoint))
            self._stored.clear()
        try:
            train.report(
                metrics,
                checkpoint=local,
                checkpoint_upload_mode=train.CheckpointUploadMode.ASYNC,
                # The upload does that, also where the storage fails.
                delete_local_checkpoint_after_upload=False,
                checkpoint_upload_fn=functools.partial(self._upload, metrics, self._next),
            )
        except BaseException:
            self._stored.set()  # the upload has not begun
            raise
        self._next += 1

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the checkpoint that is on its way, at most `timeout` seconds.

        Raises
        ------
        StageError
            When it could not be stored.
        """
        self._stored.wait(timeout)
        if self.refused is not None:
            raise self.refused

    @contextlib.contextmanager
    def restore(self) -> Iterator[Path | None]:
        """Give the newest checkpoint at this worker's start, once; None afterwards, and where there is none.

        A loop that trains one model after another restores the one that was interrupted. By the next one the checkpoint
        has been replaced by newer ones.
        """
        restored, self._restored = self._restored, None
        if restored is None:
            yield None
            return
        with self._store.local(restored) as folder:
            yield folder

    def leaving(self) -> bool:
        """Tell whether the node of any worker is being drained; Ray starts the workers anew when it is gone."""
        # Without a watcher, as on a Ray of this machine alone, the answer is known: no round trip for it.
        return env_bool(ENABLE_PREEMPTION_WATCHER_ENV_VAR, True) and train.get_preemption_info() is not None

    def barrier(self) -> None:
        """Wait for every worker."""
        if distributed.is_initialized():
            distributed.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def _upload(self, metrics: dict[str, Any], index: int, local: train.Checkpoint, name: str) -> train.Checkpoint:
        """Store a checkpoint, its manifest last; Ray's own copy would write the files in any order."""
        try:
            saved = store_checkpoint(self._store, Path(local.path), metrics, index)
        except Exception as error:
            self.refused = error
            # Ray ends the workers when it sees the error; the loop may not come to raise it.
            self._relay.push("failure", _failure(self.rank, error))
            raise
        finally:
            self._stored.set()
        storage = train.get_context().get_storage()
        return train.Checkpoint(storage.build_checkpoint_path_from_name(saved.name), storage.storage_filesystem)


def run_worker(job: Job) -> None:
    """Run the loop on this worker; what it raises reaches the driver as text, whether or not it can be pickled."""
    rank = train.get_context().get_world_rank()
    _set_threads()
    if rank == 0:
        job.relay.push("start", told_attempt())
    context: RayContext | None = None
    try:
        answer_here()
        context = RayContext(job)
        job.loop(context, job.payload)
        context.wait()
    except Exception as error:
        if context is not None:
            if is_memory(error):
                note_memory_failure(CheckpointStore(job.storage, job.name), context.memory_failures + 1)
            with contextlib.suppress(StageError):
                context.wait(_LAST_S)  # once stored, it counts
        failure = _failure(rank, error)
        if context is None or error is not context.refused:
            job.relay.push("failure", failure)
        raise StageError(failure["line"]) from None


def _failure(rank: int, error: Exception) -> dict[str, Any]:
    return {
        "rank": rank,
        "line": training_line(error),
        "traceback": "".join(traceback.format_exception(error)),
        "final": not isinstance(error, RETRIED),
    }


def _device() -> torch.device:
    if torch.cuda.is_available() and ray.get_gpu_ids():
        from ray.train.torch import get_device

        return get_device()
    return torch.device("cpu")


def _set_threads() -> None:
    """Let torch use the processors given to this worker; the process may have been started for something smaller."""
    with contextlib.suppress(RuntimeError):
        given = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
        torch.set_num_threads(max(1, int(given)))
