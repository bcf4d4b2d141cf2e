"""Training without a cluster, in this process. Imports no ray."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.cluster.causes import one_line
from pipeline.engine.checkpoint import KEPT, CheckpointStore
from pipeline.errors import FacultyError, StageError

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
