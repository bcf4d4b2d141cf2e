"""Results of a benchmark: a JSON file, a table in Markdown beside it, and the same table where a document asks.

`python -m benchmarks.results` fills the documents' marks from the files that are there, without measuring anything.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = ("README.md", "docs/benchmarks.md")
MARK = re.compile(r"(<!-- (?P<what>[a-z_]+(?: [a-z_]+)?) -->\n).*?(<!-- /(?P=what) -->)", re.DOTALL)


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
    """Write `results/NAME.json`, `results/NAME.md`, and what the documents show of them.

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
    (RESULTS / f"{name}.md").write_text("\n".join([*lines, "", note, ""]), encoding="utf-8")
    fill()


def fill() -> list[Path]:
    """Put tables, goals and claims between the documents' marks; return the documents that changed."""
    changed = []
    for path in (ROOT / name for name in DOCUMENTS):
        content = path.read_text(encoding="utf-8")
        filled = filled_in(content)
        if filled != content:
            path.write_text(filled, encoding="utf-8")
            changed.append(path)
    return changed


def filled_in(content: str) -> str:
    """Return a document with what the stored results say between its marks.

    ``NAME`` holds the table of that benchmark, ``NAME goals`` what became of its goals, ``claims`` the main claims and
    ``claims all`` every one (`benchmarks.claims`).
    """
    return MARK.sub(lambda found: f"{found[1]}\n{_between(found['what'])}\n\n{found[3]}", content)


def _between(what: str) -> str:
    from benchmarks import claims

    shown: dict[str, Callable[[], str]] = {
        "claims": lambda: claims.table(RESULTS, everything=False),
        "claims all": lambda: claims.table(RESULTS, everything=True),
    }
    if what in shown:
        return shown[what]()
    name, _, part = what.partition(" ")
    if part not in ("", "goals"):
        raise ValueError(f"<!-- {what} -->: write NAME, NAME goals, claims or claims all")
    if not (RESULTS / f"{name}.json").exists():
        return "" if part else "Not measured yet."
    if part:
        return claims.goals_told(json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["goals"])
    return (RESULTS / f"{name}.md").read_text(encoding="utf-8").strip()


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    for changed_path in fill() or ["nothing changed"]:
        print(changed_path)
