"""The same work without a cluster: training and tasks in this process. Imports no ray."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.cluster.causes import one_line
from pipeline.cluster.checkpoints import CheckpointStore
from pipeline.errors import FacultyError, StageError

if TYPE_CHECKING:
    from torch import nn

    from pipeline.engine.context import WorkerContext

    Loop = Callable[[WorkerContext, Any], None]

Item = TypeVar("Item")
Result = TypeVar("Result")

KEPT_CHECKPOINTS = 2


@dataclass(frozen=True)
class FitOutcome:
    """What a training run ended with.

    Attributes
    ----------
    metrics : dict of str to float
        Rank 0's last report; where the run had already ended before, those of its newest checkpoint.
    checkpoint : str or None
        Where the newest checkpoint lies: a folder, or a URI.
    """

    metrics: dict[str, Any]
    checkpoint: str | None


class InlineContext:
    """A single worker in this process that keeps checkpoints just as the workers of a cluster do.

    The same storage therefore continues on a cluster what was begun here, and the other way round.

    Parameters
    ----------
    store : CheckpointStore
        Where checkpoints go.
    on_report : callable, optional
        Called with every metrics dict.
    """

    rank = 0
    world_size = 1

    def __init__(self, store: CheckpointStore, on_report: Callable[[dict[str, Any]], None] | None = None) -> None:
        import torch

        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.last: dict[str, Any] | None = None
        self._store = store
        self._on_report = on_report
        newest = store.newest()
        self._next = newest.index + 1 if newest else 0

    def prepare(self, model: nn.Module) -> nn.Module:
        """Move the module to the device."""
        return model.to(self.device)

    def report(self, metrics: dict[str, float], checkpoint: Path | None = None) -> None:
        """Persist the checkpoint, drop all but the newest two, pass the metrics on."""
        self.last = metrics = plain(metrics)
        if checkpoint is not None:
            self._store.save(Path(checkpoint), metrics, self._next)
            self._store.tidy(KEPT_CHECKPOINTS)
            self._next += 1
        if self._on_report is not None:
            self._on_report(metrics)

    def restore(self) -> contextlib.AbstractContextManager[Path | None]:
        """Give the newest whole checkpoint."""
        newest = self._store.newest()
        return self._store.local(newest.name) if newest else contextlib.nullcontext(None)

    def barrier(self) -> None:
        """Return at once: there is no other worker."""


def plain(metrics: dict[str, Any]) -> dict[str, Any]:
    """Turn one-element tensors and numpy scalars into Python numbers, so that metrics can be read without torch."""
    return {key: value.item() if hasattr(value, "item") else value for key, value in metrics.items()}


def fit_inline(
    loop: Loop,
    payload: Any,
    *,
    storage: str,
    name: str,
    on_report: Callable[[dict[str, Any]], None] | None = None,
) -> FitOutcome:
    """Train in this process; the parameters are those of :func:`pipeline.cluster.train.fit`.

    Raises
    ------
    StageError
        When the loop raises; the traceback lies in ``error.log`` beside the checkpoints.
    """
    store = CheckpointStore(storage, name)
    store.tidy(KEPT_CHECKPOINTS)
    context = InlineContext(store, on_report)
    try:
        loop(context, payload)
    except FacultyError:
        raise
    except Exception as error:
        log = store.write("error.log", traceback.format_exc().encode())
        raise StageError(f"training {name!r} failed: {one_line(error)} (traceback in {log})") from error
    newest = store.newest()
    metrics = context.last if context.last is not None else newest.metrics if newest else {}
    return FitOutcome(metrics, store.path(newest.name) if newest else None)


def map_inline(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    resources: dict[str, float] | None = None,
    max_concurrent: int | None = None,
    max_failures: int = 0,
    on_result: Callable[[int, Result | None, str | None], None] | None = None,
) -> list[tuple[Result | None, str | None]]:
    """Call the function on every item in turn; the parameters are those of :func:`pipeline.cluster.tasks.map_tasks`."""
    results: list[tuple[Result | None, str | None]] = []
    for index, item in enumerate(items):
        value: Result | None = None
        problem: str | None = None
        try:
            value = function(item)
        except Exception as error:
            problem = one_line(error)
        results.append((value, problem))
        if on_result is not None:
            on_result(index, value, problem)
    return results
