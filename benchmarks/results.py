"""Results of a benchmark: a JSON file, a table in Markdown beside it, and the same table where a document asks."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def environment() -> dict[str, Any]:
    """What the figures were measured with."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "ray", "mlflow", "faculty")}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"python": platform.python_version(), "machine": platform.machine(), "cores": cores} | versions


def goal(name: str, value: float, target: float, unit: str, *, at_most: bool = False) -> dict[str, Any]:
    """A goal that is met when the value is at least the target, or at most where that is said."""
    met = value <= target if at_most else value >= target
    return {"name": name, "value": value, "target": target, "unit": unit, "at_most": at_most, "met": met}


def write(
    name: str, rows: Sequence[dict[str, Any]], goals: Sequence[dict[str, Any]], columns: dict[str, str], note: str
) -> None:
    """Write `results/NAME.json`, `results/NAME.md`, and the table between the marks for it in README.md.

    Parameters
    ----------
    columns : dict
        From a row's key to the head of its column.
    note : str
        A sentence under the table: how it was measured.
    """
    RESULTS.mkdir(exist_ok=True)
    data = {"environment": environment(), "rows": list(rows), "goals": list(goals)}
    (RESULTS / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    lines = [f"| {' | '.join(columns.values())} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(_cell(row.get(key)) for key in columns)} |" for row in rows]
    text = "\n".join([*lines, "", note, ""])
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
    readme = ROOT / "README.md"
    marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    content = readme.read_text(encoding="utf-8")
    readme.write_text(marks.sub(lambda found: f"{found[1]}\n{text}\n{found[2]}", content), encoding="utf-8")


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
