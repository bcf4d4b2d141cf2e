"""Plan against actual: what was planned for a run folder, beside what its stages say they took. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = "plan.json"
WITHIN_SECONDS, WITHIN_MEMORY = 0.30, 0.15  # how far a plan may be off

_MIB = 2**20


def against(run_dir: str | Path) -> list[dict[str, Any]]:
    """Return plan and actual, stage by stage.

    Of each stage the latest record counts that was finished after the plan was made; what was fresh then, or has not
    run since, has no row.

    Returns
    -------
    list of dict
        ``stage``; ``what``: ``seconds`` or ``memory`` (peak of a process [MiB], where it was recorded); ``planned``,
        ``actual``, ``ratio`` (planned / actual), and ``within``: whether the plan is within 30 % of the time, 15 % of
        the memory. Empty where no plan was made, or it can't be read.
    """
    folder = Path(run_dir)
    try:
        plan = json.loads((folder / FILE).read_text(encoding="utf-8"))
        made, stages = float(plan["made"]), plan["stages"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    rows = []
    for one in stages:
        record = _record(folder / one["stage"], made)
        if record is None or one["state"] == "fresh":
            continue
        rows += _row(one["stage"], "seconds", one["seconds"], record["seconds"], WITHIN_SECONDS)
        rows += _memory(folder, plan, one["stage"], record)
    return rows


def _memory(folder: Path, plan: dict[str, Any], stage: str, record: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare the largest planned process with the largest recorded one, in main memory and on the GPU."""
    if stage != "assess":  # the others leave no record of it
        return []
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(folder / stage / record["key"] / "assessment.parquet", columns=["peak_mb", "peak_gpu_mb"])
    except (OSError, ValueError):
        return []
    rows = []
    for on, column in (("processor", "peak_mb"), ("GPU", "peak_gpu_mb")):
        planned = [one for one in plan.get("memory", []) if one["stage"] == stage and one["on"] == on]
        measured = [value for value in table.column(column).to_pylist() if value is not None]
        if planned and measured:
            # A device's context is none of torch's allocations, which are what was recorded.
            size = max(one["bytes"] - one["parts"].get("context", 0) for one in planned)
            rows += _row(stage, f"memory, {on}", size / _MIB, max(measured), WITHIN_MEMORY)
    return rows


def _row(stage: str, what: str, planned: float | None, actual: float, within: float) -> list[dict[str, Any]]:
    if planned is None or actual <= 0:
        return []
    ratio = planned / actual
    return [
        {
            "stage": stage,
            "what": what,
            "planned": planned,
            "actual": actual,
            "ratio": ratio,
            "within": abs(ratio - 1) <= within + 1e-9,
        }
    ]


def _record(folder: Path, since: float) -> dict[str, Any] | None:
    """Return the latest record of a stage that was finished after some time."""
    found = []
    for path in folder.glob("*/stage.json"):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if float(record["finished"]) >= since:
                found.append((float(record["finished"]), path.as_posix(), record))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # cut off by a crash: the stage is not finished
    return max(found, key=lambda one: one[:2])[2] if found else None
