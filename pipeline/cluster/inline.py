"""The same work without a cluster: training and tasks in this process. Imports no ray."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.cluster.causes import one_line
from pipeline.engine.checkpoint import KEPT, CheckpointStore
from pipeline.errors import FacultyError, StageError

if TYPE_CHECKING:
    from pipeline.engine.context import WorkerContext

    Loop = Callable[[WorkerContext, Any], None]

Item = TypeVar("Item")
Result = TypeVar("Result")


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
    from pipeline.engine.context import LocalContext

    store = CheckpointStore(storage, name)
    store.tidy(KEPT)
    context = LocalContext(store, on_report)
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
