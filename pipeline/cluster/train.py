"""Data-parallel training: one call, in this process or on the workers of a cluster. Imports ray only for the latter."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pipeline.cluster.inline import FitOutcome, bounds, fit_inline

if TYPE_CHECKING:
    from pipeline.cluster.inline import Loop

__all__ = ["FitOutcome", "fit"]


def fit(
    loop: Loop,
    payload: Any,
    *,
    num_workers: int | tuple[int, int],
    storage: str,
    name: str,
    use_gpu: bool = False,
    resources_per_worker: dict[str, float] | None = None,
    max_failures: int = 0,
    on_report: Callable[[dict[str, Any]], None] | None = None,
    on_term: bool = False,
    verbose: bool = False,
) -> FitOutcome:
    """Run a training loop on `num_workers` workers, continuing from the newest checkpoint of `storage`/`name`.

    Parameters
    ----------
    loop : callable
        ``loop(context, payload)``, importable by name on the workers. Every rank calls ``context.report`` equally
        often; about ten checkpoints a second are the most that the cluster takes, the loop waits beyond that.
    payload : object
        Pickled once and sent to every worker: references to data and teachers, not the things themselves.
    num_workers : int or (int, int)
        0 trains in this process without a cluster; n > 0 starts n processes in one DDP group (gloo, or nccl on GPUs).
        ``(fewest, most)`` starts as many as the cluster has room for: when a node is lost, the rest goes on from the
        newest checkpoint, and when one has come, the run starts anew with it, from there too (looked for once a
        minute). On a Ray of this machine alone, the number is chosen once.
    storage, name : str
        A folder or URI that every worker reaches, and the run's folder inside it. The same pair resumes: a killed
        driver, or a changed number of workers, continues from the newest whole checkpoint. The newest two are kept.
    use_gpu : bool
        One GPU for each worker.
    resources_per_worker : dict of str to float, optional
        Ray's resources of each worker, e.g. ``{"CPU": 4}``; default one CPU.
    max_failures : int
        How often the workers are restarted from the newest checkpoint after a worker died, lost its peers or ran out of
        memory; a node that was drained does not count. An error that would only repeat itself (a ValueError, a full
        disk, …) ends the run at once.
    on_report : callable, optional
        Called in this thread with rank 0's metrics while training goes on, whether or not their checkpoint is stored
        yet. After a restart the reports since the restored checkpoint come a second time.
    on_term : bool
        Without a cluster: take SIGTERM as a notice, see :class:`pipeline.engine.context.LocalContext`.
    verbose : bool
        Put the worker's whole traceback into the error instead of its log's place.

    Returns
    -------
    FitOutcome

    Raises
    ------
    UserError
        When the cluster can't hold that many workers, or the fewest of them; nothing has been started.
    StageError
        When training failed, with the worker's error in one line, or when the storage does not take a checkpoint.
    """
    bounds(num_workers)
    if num_workers == 0:
        return fit_inline(loop, payload, storage=storage, name=name, on_report=on_report, on_term=on_term)
    from pipeline.cluster.launch import fit_on_cluster

    return fit_on_cluster(
        loop,
        payload,
        num_workers=num_workers,
        storage=storage,
        name=name,
        use_gpu=use_gpu,
        resources_per_worker=resources_per_worker,
        max_failures=max_failures,
        on_report=on_report,
        verbose=verbose,
    )
