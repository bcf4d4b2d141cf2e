"""What runs on a training worker."""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import ray
import torch
from ray import train
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.cluster.causes import one_line
from pipeline.engine.checkpoint import CheckpointStore, index_of, new_name, plain, write_manifest
from pipeline.errors import StageError

if TYPE_CHECKING:
    from pipeline.cluster.inline import Loop
    from pipeline.cluster.relay import Relay

# These may pass when tried again (a peer died, the network or the memory was short); anything else would only repeat.
RETRIED = (RuntimeError, OSError, MemoryError)


@dataclass(frozen=True)
class Job:
    """What every worker of a run gets.

    Attributes
    ----------
    loop, payload
        What to run, and on what.
    storage, name : str
        Where the run's checkpoints lie.
    first : str or None
        The checkpoint to continue from that an earlier driver left.
    relay : Relay
        The line to the driver.
    """

    loop: Loop
    payload: Any
    storage: str
    name: str
    first: str | None
    relay: Relay


class RayContext:
    """The :class:`pipeline.engine.context.WorkerContext` of a Ray Train worker."""

    def __init__(self, job: Job) -> None:
        context = train.get_context()
        self.rank: int = context.get_world_rank()
        self.world_size: int = context.get_world_size()
        self.device = _device()
        self._store = CheckpointStore(job.storage, job.name)
        # Ray knows the checkpoints of this driver; before its first one, an earlier driver's newest counts.
        own = train.get_checkpoint()
        self._restored = PurePosixPath(own.path).name if own is not None else job.first
        self._next = (index_of(self._restored) or 0) + 1 if self._restored else 0

    def prepare(self, model: nn.Module) -> nn.Module:
        """Move the module to the device; wrap it where several workers train it (frozen ones have nothing to share)."""
        model = model.to(self.device)
        if self.world_size == 1 or not any(parameter.requires_grad for parameter in model.parameters()):
            return model
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=device_ids, find_unused_parameters=False)

    def report(self, metrics: dict[str, float], checkpoint: Path | None = None) -> None:
        """Report; rank 0's checkpoint is copied to the storage before the call returns."""
        metrics = plain(metrics)
        if checkpoint is None:
            train.report(metrics)
            return
        write_manifest(Path(checkpoint), metrics)
        train.report(
            metrics, checkpoint=train.Checkpoint.from_directory(checkpoint), checkpoint_dir_name=new_name(self._next)
        )
        self._next += 1

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

    def barrier(self) -> None:
        """Wait for every worker."""
        if distributed.is_initialized():
            distributed.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)


def run_worker(job: Job) -> None:
    """Run the loop on this worker; what it raises reaches the driver as text, whether or not it can be pickled."""
    rank = train.get_context().get_world_rank()
    _set_threads()
    if rank == 0:
        job.relay.push("start", {"pid": os.getpid()})
    try:
        job.loop(RayContext(job), job.payload)
    except Exception as error:
        failure = {
            "rank": rank,
            "line": one_line(error),
            "traceback": traceback.format_exc(),
            "final": not isinstance(error, RETRIED),
        }
        job.relay.push("failure", failure)
        raise StageError(failure["line"]) from None


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
