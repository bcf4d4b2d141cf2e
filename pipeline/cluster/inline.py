"""Training without a cluster, in this process. Imports no ray."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.cluster.causes import (
    forget_failures,
    is_memory,
    memory_failures,
    note_memory_failure,
    storage_of,
    training_line,
    write_log,
)
from pipeline.engine.checkpoint import KEPT, CheckpointStore
from pipeline.errors import ConfigError, FacultyError, Interrupted, StageError

if TYPE_CHECKING:
    from pipeline.engine.context import WorkerContext

    Loop = Callable[[WorkerContext, Any], None]


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


def bounds(num_workers: int | tuple[int, int]) -> tuple[int, int]:
    """Return the fewest and the most workers.

    Raises
    ------
    ConfigError
        When they are negative, out of order, or none is the fewest of several.
    """
    if isinstance(num_workers, int):
        if num_workers < 0:
            raise ConfigError(f"num_workers must be >= 0, got {num_workers}")
        return num_workers, num_workers
    fewest, most = num_workers
    if not 1 <= fewest <= most:
        raise ConfigError(f"num_workers must be (fewest, most) with 1 <= fewest <= most, got {num_workers}")
    return fewest, most


def fit_inline(
    loop: Loop,
    payload: Any,
    *,
    storage: str,
    name: str,
    on_report: Callable[[dict[str, Any]], None] | None = None,
    on_term: bool = False,
) -> FitOutcome:
    """Train in this process; the parameters are those of :func:`pipeline.cluster.train.fit`.

    Raises
    ------
    StageError
        When the loop raises; the traceback lies in ``error.log`` beside the checkpoints.
    Interrupted
        With `on_term`, when SIGTERM has come.
    """
    from pipeline.engine.context import LocalContext

    store = CheckpointStore(storage, name)
    with storage_of(store):
        store.tidy(KEPT)
        times = memory_failures(store)
        context = LocalContext(store, on_report, memory_failures=times, on_term=on_term)
    try:
        with context:
            loop(context, payload)
    except FacultyError:
        raise
    except Exception as error:
        if is_memory(error):
            note_memory_failure(store, times + 1)
        log = write_log(store, traceback.format_exc())
        raise StageError(f"training {name!r} failed: {training_line(error)} ({log})") from error
    forget_failures(store)
    if context.leaving():
        raise Interrupted("ended by SIGTERM when the training was done; the same call finds it done")
    with storage_of(store):
        newest = store.newest()
    metrics = context.last if context.last is not None else newest.metrics if newest else {}
    return FitOutcome(metrics, store.path(newest.name) if newest else None)
