"""Several training runs side by side: one call, in this process or on a cluster. Imports ray only for the latter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.cluster.causes import one_line
from pipeline.cluster.inline import FitOutcome, bounds, fit_inline
from pipeline.errors import FacultyError, Interrupted

if TYPE_CHECKING:
    from pipeline.cluster.inline import Loop

__all__ = ["FitJob", "FitOutcome", "fit_many"]

Result = tuple[FitOutcome | None, str | None]


@dataclass(frozen=True)
class FitJob:
    """One training run.

    Attributes
    ----------
    name : str
        The run's folder inside the storage; unique among the jobs of a call.
    payload : object
        What the loop gets; small and picklable.
    """

    name: str
    payload: Any


def fit_many(
    loop: Loop,
    jobs: Sequence[FitJob],
    *,
    num_workers: int | tuple[int, int],
    storage: str,
    use_gpu: bool = False,
    resources_per_worker: dict[str, float] | None = None,
    max_concurrent: int | None = None,
    max_failures: int = 0,
    on_report: Callable[[str, dict[str, Any]], None] | None = None,
    on_term: bool = False,
    verbose: bool = False,
) -> list[Result]:
    """Run a training loop once for every job, each run as :func:`pipeline.cluster.train.fit` does it.

    On a cluster every job is a trial of Ray Tune whose process starts the workers of that run and takes no processor
    itself. As many jobs run side by side as the cluster has room for all of their workers, so that no run waits for
    workers that another one holds while it waits itself.

    Parameters
    ----------
    loop : callable
        ``loop(context, payload)``, importable by name on the workers.
    jobs : sequence of FitJob
        The runs.
    num_workers : int or (int, int)
        Of each run, or the fewest and the most; the most count for how many runs fit side by side. 0 trains one job
        after the other in this process, without a cluster.
    storage : str
        A folder or URI that every worker reaches. A job continues from the newest whole checkpoint of its folder in it;
        one that had ended before ends at once, with that checkpoint's metrics.
    use_gpu, resources_per_worker
        Of each worker; see :func:`pipeline.cluster.train.fit`.
    max_concurrent : int, optional
        How many jobs run side by side at most; never more than the cluster holds now.
    max_failures : int
        How often the workers of a run, or the process that started them, are restarted after one of them died.
    on_report : callable, optional
        ``on_report(name, metrics)`` in this thread while training goes on. If it raises, all runs end, and what it
        raised reaches the caller.
    on_term : bool
        Without a cluster: take SIGTERM as a notice, see :class:`pipeline.engine.context.LocalContext`. It ends the
        whole call; the same call continues.
    verbose : bool
        Show Tune's progress table; put whole tracebacks into the errors.

    Returns
    -------
    list of (FitOutcome, None) or (None, str)
        In the order of `jobs`: the outcome, or the error in one line. A job that fails leaves the others alone.

    Raises
    ------
    ConfigError
        When `num_workers` is negative, or no range.
    Interrupted
        With `on_term`, when SIGTERM has come.
    UserError
        When the cluster can't hold the workers of a single job; nothing has been started.
    ValueError
        When two jobs have one name.
    """
    bounds(num_workers)
    names = [job.name for job in jobs]
    if len(set(names)) != len(names):
        raise ValueError(f"job names must be unique, got {sorted({n for n in names if names.count(n) > 1})} twice")
    if num_workers == 0:
        return [_fit_here(loop, job, storage, on_report, on_term) for job in jobs]
    if not jobs:
        return []
    from pipeline.cluster.fleet import fit_side_by_side

    return fit_side_by_side(
        loop,
        jobs,
        num_workers=num_workers,
        storage=storage,
        use_gpu=use_gpu,
        resources_per_worker=resources_per_worker,
        max_concurrent=max_concurrent,
        max_failures=max_failures,
        on_report=on_report,
        verbose=verbose,
    )


def _fit_here(
    loop: Loop,
    job: FitJob,
    storage: str,
    on_report: Callable[[str, dict[str, Any]], None] | None,
    on_term: bool,
) -> Result:
    refused: list[Exception] = []

    def tell(metrics: dict[str, Any]) -> None:
        if on_report is None:
            return
        try:
            on_report(job.name, metrics)
        except Exception as error:  # the caller's, not the run's
            refused.append(error)
            raise

    try:
        outcome = fit_inline(loop, job.payload, storage=storage, name=job.name, on_report=tell, on_term=on_term)
        return outcome, None
    except Interrupted:
        raise
    except FacultyError as error:
        if refused:
            raise refused[0] from None
        return None, one_line(error)
