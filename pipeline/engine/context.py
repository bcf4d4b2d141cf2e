"""The one seam between the training loop and whatever runs it: a process of its own, or a worker of a cluster."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from pyarrow import fs
from torch import nn

from pipeline.engine.checkpoint import KEPT, CheckpointStore, SavedCheckpoint, index_of, plain
from pipeline.errors import Interrupted, StageError

# Pauses [s] between the tries to store a checkpoint: a network may be away for a moment, a full disk stays full.
_PAUSES = (1.0, 5.0, 15.0)
_LASTING = frozenset(
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "ENOENT", "ENOTDIR", "EISDIR")
)


class WorkerContext(Protocol):
    """What a training loop may ask of the place it runs in.

    Attributes
    ----------
    rank, world_size : int
        This worker's number and the number of workers.
    device : torch.device
        Where this worker computes.
    attempt : int
        How often this run's workers have been started before, by the driver that is running it; 0 the first time.
    last_failure : str or None
        ``"memory"`` where an attempt ran out of memory and none has ended well since, also one of an earlier driver.
    memory_failures : int
        How many attempts did so. A loop that halves its micro batch as many times fits in the end.
    """

    rank: int
    world_size: int
    device: torch.device
    attempt: int
    last_failure: str | None
    memory_failures: int

    def prepare(self, model: nn.Module) -> nn.Module:
        """Move a module to the device and wrap it for data-parallel training where there are several workers."""
        ...

    def report(self, metrics: dict[str, float], checkpoint: Path | None = None) -> None:
        """Report metrics; every rank calls this equally often.

        The metrics are told at once, in the order of the calls. The checkpoint is copied while the loop goes on, and
        counts as soon as it is stored as a whole. One is on its way at a time: a call with the next one waits. All have
        been stored when the run ends.

        Parameters
        ----------
        metrics : dict of str to float
            Only rank 0's are kept.
        checkpoint : Path, optional
            A local folder to persist as the newest checkpoint; given by rank 0 alone. The context takes it over: it is
            gone from its place when the call returns, and deleted once it is stored.

        Raises
        ------
        StageError
            When a checkpoint could not be stored: this one, or the one before.
        """
        ...

    def restore(self) -> contextlib.AbstractContextManager[Path | None]:
        """Give the newest checkpoint as a local folder, or None when this is the first start."""
        ...

    def leaving(self) -> bool:
        """Tell whether a worker's node is about to be taken away; every rank gets the same answer.

        Every rank calls this equally often; a call costs a round trip between the workers, so once in a few seconds is
        enough. A loop that hears True for the first time reports a checkpoint at once and goes on: where to end is the
        context's affair. The answer stays True. On a cluster the loop goes on until the node is
        gone: what it trains after its last checkpoint is repeated by the workers that come next.
        """
        ...

    def barrier(self) -> None:
        """Wait until every worker has come here."""
        ...


class LocalContext:
    """A single worker in this process.

    It keeps checkpoints just as the workers of a cluster do: the same store continues there what was begun here, and
    the other way round.

    Parameters
    ----------
    store : CheckpointStore, optional
        Where checkpoints go; without it they are dropped and nothing is restored. Whoever gives one calls `close` at
        the end, or uses the context in a ``with`` block.
    on_report : callable, optional
        Called with every metrics dict.
    device : torch.device, optional
        Default: the first CUDA device if there is one, else the CPU.
    memory_failures : int
        How many times the run has run out of memory before.
    on_term : bool
        Take SIGTERM as a notice: `leaving` says so, and the next checkpoint ends the run with `Interrupted` once it is
        stored. A second SIGTERM does what it did before. Without effect outside of the main thread, where no handler
        can be set.
    """

    rank = 0
    world_size = 1
    attempt = 0

    def __init__(
        self,
        store: CheckpointStore | None = None,
        on_report: Callable[[dict[str, Any]], None] | None = None,
        device: torch.device | None = None,
        *,
        memory_failures: int = 0,
        on_term: bool = False,
    ) -> None:
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.memory_failures = memory_failures
        self.last_failure = "memory" if memory_failures else None
        self.last: dict[str, Any] | None = None
        self._store = store
        self._on_report = on_report
        newest = store.newest() if store is not None else None
        self._next = newest.index + 1 if newest else 0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="faculty-checkpoint")
        self._upload: Future[None] | None = None
        self._leaving = False
        self._before: Any = None
        self._handles = on_term and threading.current_thread() is threading.main_thread()
        if self._handles:
            self._before = signal.signal(signal.SIGTERM, self._hear)

    def prepare(self, model: nn.Module) -> nn.Module:
        """Move the module to the device."""
        return model.to(self.device)

    def report(self, metrics: dict[str, float], checkpoint: Path | None = None) -> None:
        """Begin to persist the checkpoint, pass the metrics on; of the checkpoints the newest two stay."""
        self.last = plain(metrics)
        if checkpoint is not None:
            self.wait()
            self._take(take_over(checkpoint), self.last)
        if self._on_report is not None:
            self._on_report(self.last)
        if checkpoint is not None and self._leaving:
            self.wait()
            raise Interrupted("ended by SIGTERM; the same call continues from the checkpoint just stored")

    def restore(self) -> contextlib.AbstractContextManager[Path | None]:
        """Give the newest whole checkpoint."""
        self.wait()
        newest = self._store.newest() if self._store is not None else None
        if self._store is None or newest is None:
            return contextlib.nullcontext(None)
        return self._store.local(newest.name)

    def leaving(self) -> bool:
        """Tell whether SIGTERM has come."""
        return self._leaving

    def barrier(self) -> None:
        """Return at once: there is no other worker."""

    def wait(self) -> None:
        """Wait for the checkpoint that is on its way.

        Raises
        ------
        StageError
            When it could not be stored.
        """
        upload, self._upload = self._upload, None
        if upload is not None:
            upload.result()

    def close(self) -> None:
        """Wait for the last checkpoint and give SIGTERM back to whoever had it; what can't be stored is raised."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._give_back()

    def __enter__(self) -> LocalContext:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        # What ended the block says more than what became of its last checkpoint.
        with contextlib.nullcontext() if kind is None else contextlib.suppress(StageError):
            self.close()

    def _take(self, folder: Path, metrics: dict[str, Any]) -> None:
        if self._store is None:
            shutil.rmtree(folder, ignore_errors=True)
            return
        self._upload = self._thread.submit(_keep, self._store, folder, metrics, self._next)
        self._next += 1

    def _hear(self, number: int, frame: object) -> None:
        self._leaving = True
        self._give_back()

    def _give_back(self) -> None:
        if self._handles:
            self._handles = False
            # None: a handler that was not set from Python.
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self._before is None else self._before)


def _keep(store: CheckpointStore, folder: Path, metrics: dict[str, Any], index: int) -> None:
    store_checkpoint(store, folder, metrics, index)
    store.tidy(KEPT)


def take_over(folder: Path) -> Path:
    """Move a folder aside, so that nothing its maker does with it reaches the copy; return where it is now."""
    return Path(folder).rename(f"{folder}.{uuid.uuid4().hex[:8]}")


def store_checkpoint(store: CheckpointStore, folder: Path, metrics: dict[str, Any], index: int) -> SavedCheckpoint:
    """Copy a folder into the store and delete it, also where the store fails.

    Raises
    ------
    StageError
        When the storage does not take it. No part of the checkpoint stays, and the ones before are as they were.
    """
    pauses = iter(_PAUSES)
    try:
        while True:
            try:
                return store.save(folder, metrics, index)
            except OSError as error:
                _discard(store, index)
                pause = next(pauses, None)
                if pause is None or error.errno in _LASTING:
                    raise StageError(_refused(store, index, error)) from error
                time.sleep(pause)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _refused(store: CheckpointStore, index: int, error: OSError) -> str:
    reason = os.strerror(error.errno) if error.errno else " ".join(str(error).split())[:300]
    return (
        f"checkpoint {index} can't be stored in {store.uri}: {reason}; the ones before it are whole: free space or "
        "mend the storage, and run again to go on from there"
    )


def _discard(store: CheckpointStore, index: int) -> None:
    """Delete what a copy cut short left under an index, as far as the storage lets us."""
    with contextlib.suppress(OSError):
        whole = {saved.name for saved in store.whole()}
        for info in store.filesystem.get_file_info(fs.FileSelector(store.root, allow_not_found=True)):
            if index_of(info.base_name) == index and info.base_name not in whole:
                store.filesystem.delete_dir(info.path)
