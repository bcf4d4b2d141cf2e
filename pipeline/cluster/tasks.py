"""One function over many items on the cluster, as plain Ray tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import ray
from ray import cloudpickle

from pipeline.cluster.causes import one_line
from pipeline.cluster.nodes import answer_here
from pipeline.cluster.session import active, slots

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_tasks(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    resources: dict[str, float] | None = None,
    max_concurrent: int | None = None,
    max_failures: int = 1,
    on_result: Callable[[int, Result | None, str | None], None] | None = None,
) -> list[tuple[Result | None, str | None]]:
    """Call the function on every item, side by side.

    Parameters
    ----------
    function : callable
        Importable by name on the workers.
    items : sequence
        What it is called with; small and picklable.
    resources : dict of str to float, optional
        Of each call, e.g. ``{"CPU": 2, "GPU": 0.5}``; default one CPU.
    max_concurrent : int, optional
        How many run side by side at most; by default as many as the cluster holds.
    max_failures : int
        How often a call is repeated whose process died.
    on_result : callable, optional
        ``on_result(index, value, error)`` in this thread as soon as an item is done, in the order of completion.

    Returns
    -------
    list of (value, error)
        In the order of `items`; of the two one is None. An error is one line.

    Raises
    ------
    UserError
        When the cluster can't hold a single call.
    """
    wanted = {key: value for key, value in (resources or {"CPU": 1}).items() if value > 0}
    room = slots(wanted)
    width = min(len(items), max_concurrent or len(items), 1024 if active().autoscaling else 2 * room)
    options: dict[str, Any] = {"num_cpus": wanted.pop("CPU", 0), "num_gpus": wanted.pop("GPU", 0), "resources": wanted}
    call: Any = ray.remote(_guarded).options(**options, max_retries=max_failures)
    shared = ray.put(cloudpickle.dumps(function))  # unpickled under guard: a worker may lack the module
    results: list[tuple[Result | None, str | None]] = [(None, "not run")] * len(items)
    waiting = iter(enumerate(items))
    running: dict[Any, int] = {}
    try:
        while True:
            for index, item in waiting:
                running[call.remote(shared, item)] = index
                if len(running) >= width:
                    break
            if not running:
                return results
            ready, _ = ray.wait(list(running), num_returns=1)
            index = running.pop(ready[0])
            try:
                value, problem = ray.get(ready[0])
            except ray.exceptions.RayError as error:
                value, problem = None, one_line(error)
            results[index] = (value, problem)
            if on_result is not None:
                on_result(index, value, problem)
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def _guarded(function: bytes, item: Any) -> tuple[Any, str | None]:
    """Keep an exception on the worker: it need not be picklable, and a repetition would not help."""
    try:
        answer_here()
        return cloudpickle.loads(function)(item), None
    except Exception as error:
        return None, one_line(error)
