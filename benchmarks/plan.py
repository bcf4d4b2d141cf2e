"""Plan against actual: the demo planned, run, and compared stage by stage: about four minutes on two cores.

    python -m benchmarks.plan [--run conf/demo/run.yaml] [--rounds N] [--work FOLDER]

A round is a calibration, a run in an empty folder, and a second run of twice the epochs that is planned from what the
first one recorded. Writes benchmarks/results/plan.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.results import ROOT, goal, write
from pipeline.config import Settings
from pipeline.planning.against import WITHIN_MEMORY, WITHIN_SECONDS, against
from pipeline.planning.plan import keep, make_plan
from pipeline.report.console import Display
from pipeline.settings_files import load_settings
from pipeline.stages.run import run_pipeline

COLUMNS = {
    "origin": "throughputs",
    "stage": "stage",
    "what": "what",
    "planned": "planned",
    "actual": "actual",
    "ratio": "plan / actual",
    "start": "of which start-up, planned",
}


def measure(settings: Settings, calibration: bool, display: Display) -> list[dict[str, Any]]:
    """Plan, run, compare."""
    plan = make_plan(settings, calibration=calibration, display=display)
    keep(plan)
    run_pipeline(settings, display=display)
    starts = {one.stage: one.parts.get("start") for one in plan.stages}
    rows = against(settings.run_dir)
    return [
        row | {"origin": plan.rates.origin, "start": starts[row["stage"]] if row["what"] == "seconds" else None}
        for row in rows
    ]


def settings_of(file: Path, folder: Path, *overrides: str) -> Settings:
    places = [f"run_dir={folder}", f"cache.path={folder / 'outputs-of-teachers'}"]
    return load_settings([file], [*places, *overrides])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--run", type=Path, default=ROOT / "conf" / "demo" / "run.yaml")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path)
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp(prefix="faculty-bench-"))
    display, found = Display(), []
    for number in range(arguments.rounds):
        folder = work / f"round{number}"
        settings = settings_of(arguments.run, folder)
        found += measure(settings, True, display)
        longer = f"distill.loop.epochs={2 * settings.distill.loop.epochs}"
        found += measure(settings_of(arguments.run, folder, longer), False, display)
    publish(found, arguments.rounds)


def publish(found: list[dict[str, Any]], rounds: int) -> None:
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in found:
        groups.setdefault((row["origin"], row["stage"], row["what"]), []).append(row)
    rows = [_median(group) for group in groups.values()]
    goals = [
        goal(
            f"{row['origin']}: {row['stage']}, {row['what']}: how far the plan is off",
            abs(row["ratio"] - 1),
            WITHIN_SECONDS if row["what"] == "seconds" else WITHIN_MEMORY,
            "",
            at_most=True,
        )
        for row in rows
    ]
    note = (
        f"Median of {rounds} rounds. Calibrated: an empty run folder, half a minute of measuring before it. Recorded: "
        "the same folder with twice the epochs, from what the first run left; stages that were fresh have no row. "
        "Seconds; memory is the peak of a process, in MiB."
    )
    write("plan", rows, goals, COLUMNS, note)


def _median(group: list[dict[str, Any]]) -> dict[str, Any]:
    numbers = {
        key: statistics.median(row[key] for row in group) if group[0][key] is not None else None
        for key in ("planned", "actual", "ratio", "start")
    }
    return group[0] | numbers | {"ratios": [row["ratio"] for row in group]}


if __name__ == "__main__":
    main()
