"""The one seam between the training loop and whatever runs it: a process of its own, or a worker of a cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from pipeline.engine.checkpoint import KEPT, CheckpointStore, plain


class WorkerContext(Protocol):
    """What a training loop may ask of the place it runs in.

    Attributes
    ----------
    rank, world_size : int
        This worker's number and the number of workers.
    device : torch.device
        Where this worker computes.
    """

    rank: int
    world_size: int
    device: torch.device

    def prepare(self, model: nn.Module) -> nn.Module:
        """Move a module to the device and wrap it for data-parallel training where there are several workers."""
        ...

    def report(self, metrics: dict[str, float], checkpoint: Path | None = None) -> None:
        """Report metrics; every rank calls this equally often.

        Parameters
        ----------
        metrics : dict of str to float
            Only rank 0's are kept.
        checkpoint : Path, optional
            A local folder to persist as the newest checkpoint; given by rank 0 alone. It may be deleted after the call.
        """
        ...

    def restore(self) -> contextlib.AbstractContextManager[Path | None]:
        """Give the newest checkpoint as a local folder, or None when this is the first start."""
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
        Where checkpoints go; without it they are dropped and nothing is restored.
    on_report : callable, optional
        Called with every metrics dict.
    device : torch.device, optional
        Default: the first CUDA device if there is one, else the CPU.
    """

    rank = 0
    world_size = 1

    def __init__(
        self,
        store: CheckpointStore | None = None,
        on_report: Callable[[dict[str, Any]], None] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.last: dict[str, Any] | None = None
        self._store = store
        self._on_report = on_report
        newest = store.newest() if store is not None else None
        self._next = newest.index + 1 if newest else 0

    def prepare(self, model: nn.Module) -> nn.Module:
        """Move the module to the device."""
        return model.to(self.device)

    def report(self, metrics: dict[str, float], checkpoint: Path | None = None) -> None:
        """Persist the checkpoint, drop all but the newest two, pass the metrics on."""
        self.last = plain(metrics)
        if checkpoint is not None and self._store is not None:
            self._store.save(Path(checkpoint), self.last, self._next)
            self._store.tidy(KEPT)
            self._next += 1
        if self._on_report is not None:
            self._on_report(self.last)

    def restore(self) -> contextlib.AbstractContextManager[Path | None]:
        """Give the newest whole checkpoint."""
        newest = self._store.newest() if self._store is not None else None
        if self._store is None or newest is None:
            return contextlib.nullcontext(None)
        return self._store.local(newest.name)

    def barrier(self) -> None:
        """Return at once: there is no other worker."""
