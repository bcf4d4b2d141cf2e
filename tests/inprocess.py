"""The pipeline without Ray: tasks and trials that would go to workers are called here, one after the other."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pipeline.assessment.halving import Standing
from pipeline.cluster import tasks, trials
from pipeline.engine.checkpoint import plain
from pipeline.stages.base import Run


@contextlib.contextmanager
def without_ray() -> Iterator[pytest.MonkeyPatch]:
    """Let stages call in this process what Ray's workers would; trainings with `num_workers: 0` do so anyway."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials, "run_trials", run_trials)
        patch.setattr(tasks, "map_tasks", map_tasks)
        patch.setattr(Run, "open_cluster", lambda self: None)
        yield patch


def run_trials(function: Callable[..., Any], items: Any, **how: Any) -> dict[str, Any]:
    """Climb rung by rung as Tune's trials do, in this process."""
    payloads = {item.name: item.payload for item in items}
    standing, rows, waiting = Standing(len(payloads), how["climbing"]), {}, dict.fromkeys(payloads, 0)

    def deliver(name: str, row: dict[str, Any]) -> None:
        rows[name] = row | {"seconds": 1.0, "peak_mb": 2.0, "trial_id": f"trial_{len(rows)}"}
        how["on_result"](name, dict(rows[name]))

    found: dict[str, dict[str, Any]] = {}
    while waiting:
        name, rung = waiting.popitem()
        try:
            found[name] = plain(function(payloads[name], rung=rung, shared=how["shared"])) | {"rung": rung}
        except Exception as error:
            deliver(name, {"error": str(error).splitlines()[0], "error_type": type(error).__name__})
            standing.leave(name)
        else:
            if rung < len(how["climbing"]):
                standing.enter(name, rung, found[name]["score"])
            else:
                deliver(name, found[name])
                standing.leave(name)
        for decision in standing.settle():
            if decision.climbs:
                waiting[decision.name] = found[decision.name]["rung"] + 1
            else:
                deliver(decision.name, found[decision.name] | {"dropped": decision.reason})
    return rows


def map_tasks(function: Callable[..., Any], items: Any, *, on_result: Callable[..., None], **how: Any) -> list[Any]:
    """Call the function for every item, in this process."""
    results = []
    for index, item in enumerate(items):
        results.append((function(item), None))
        on_result(index, *results[-1])
    return results
