"""The demo on several splits of its images: `make bench-demo`. About two minutes a split on two cores."""

from __future__ import annotations

import json
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.results import ROOT, goal, write
from pipeline.settings_files import load_settings
from pipeline.stages.run import run_pipeline

SPLITS = 5
COLUMNS = {
    "split": "split",
    "faculty": "faculty",
    "student": "student",
    "best_single": "best single teacher",
    "no_teacher": "no teacher",
    "seconds": "seconds, all stages",
}


def measure(split: int, folder: Path) -> dict[str, Any]:
    """Run the demo with another seed: other splits, other initial weights."""
    run_dir = folder / f"seed{split}"
    overrides = [f"seed={split}", f"run_dir={run_dir}", f"cache.path={run_dir / 'outputs'}"]
    settings = load_settings([ROOT / "conf" / "demo" / "run.yaml"], overrides)
    records = run_pipeline(settings)
    evaluation = next((run_dir / "evaluate").glob("*/evaluation.json"))
    arms = {arm["name"]: arm for arm in json.loads(evaluation.read_text(encoding="utf-8"))["arms"]}
    row: dict[str, Any] = {"split": split, "faculty": ", ".join(records["select"].summary["chosen"]) or "none"}
    for name, arm in arms.items():
        row[name] = arm["mean"]
        row[f"{name}_runs"] = arm["accuracies"]
    row["seconds"] = round(sum(record.seconds for record in records.values()))
    return row


def gap(rows: list[dict[str, Any]], other: str) -> tuple[float, float]:
    """Mean paired difference between student and control over the splits, and twice its standard error."""
    differences = [row["student"] - row.get(other, row["student"]) for row in rows]
    return statistics.fmean(differences), 2 * statistics.stdev(differences) / math.sqrt(len(differences))


def points(rows: list[dict[str, Any]], other: str) -> str:
    mean, error = gap(rows, other)
    return f"{100 * mean:+.1f} ± {100 * error:.1f} points"


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="faculty-bench-"))
    publish([measure(split, folder) for split in range(SPLITS)])


def publish(rows: list[dict[str, Any]]) -> None:
    goals = []
    for other, title in (("no_teacher", "no teacher"), ("best_single", "the best single teacher")):
        mean, error = gap(rows, other)
        goals.append(goal(f"student minus {title}, in units of 2 SE", mean / error if error else 0.0, 1.0, "2 SE"))
        goals.append(goal(f"student minus {title}", mean, 0.0, "accuracy"))
    seeds = len(rows[0]["student_runs"])
    write(
        "demo",
        rows,
        goals,
        COLUMNS,
        f"Test accuracy on 2,000 images, mean of {seeds} trainings, last epoch. 10 labels a class to train on, 5 to "
        "score the teachers, 5 to choose the set, 3,000 images without labels. Each row draws its own splits from the "
        "same 6,500 images, so that rows are not independent. Split 0 is `make demo`. Student minus best single "
        f"teacher: {points(rows, 'best_single')} (2 SE over the splits); minus no teacher: "
        f"{points(rows, 'no_teacher')}.",
    )


if __name__ == "__main__":
    main()
