"""Plan against actual: the demo planned, run, and compared stage by stage: seven minutes a round on two cores.

    python -m benchmarks.plan [--run conf/demo/run.yaml] [--rounds N] [--work FOLDER] [--first]

A round is a calibration, a run in an empty folder, and a second run of twice the epochs that is planned from what the
first one recorded; each of these is a command of its own, as a user gives it. The first round finds no former run
beside it; the calibrations of the others know what starting took in the rounds before. Writes
benchmarks/results/plan.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.results import RESULTS, ROOT, goal, write
from pipeline.planning.against import FILE, WITHIN_MEMORY, WITHIN_SECONDS, against
from pipeline.settings_files import load_settings

COLUMNS = {
    "origin": "throughputs",
    "stage": "stage",
    "what": "what",
    "planned": "planned",
    "actual": "actual",
    "ratio": "plan / actual",
    "rounds": "each round",
    "start": "of which start-up, planned",
}
FIRST, LATER, RECORDED = "calibrated, first run", "calibrated, runs before", "recorded"


def measure(origin: str, file: Path, folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """Plan, run, compare; and say what the plan itself took."""
    places = [f"run_dir={folder}", f"cache.path={folder / 'outputs-of-teachers'}", *overrides]
    faculty("plan", file, "--no-calibrate" if origin == RECORDED else "--calibrate", *places)
    plan = json.loads((folder / FILE).read_text(encoding="utf-8"))
    faculty("run", file, *places)
    starts = {one["stage"]: one["parts"].get("start") for one in plan["stages"]}
    return [
        row | {"origin": origin, "start": starts[row["stage"]] if row["what"] == "seconds" else None}
        for row in against(folder)
    ]


def faculty(command: str, file: Path, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "jobs.cli", command, "-c", str(file), *arguments], cwd=ROOT, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--run", type=Path, default=ROOT / "conf" / "demo" / "run.yaml")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--first", action="store_true", help="the first run alone; keep the other rows")
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp(prefix="faculty-bench-"))
    longer = f"distill.loop.epochs={2 * load_settings([arguments.run]).distill.loop.epochs}"
    if arguments.first:
        kept = json.loads((RESULTS / "plan.json").read_text(encoding="utf-8"))["rows"]
        publish(measure(FIRST, arguments.run, work / "first") + [row for row in kept if row["origin"] != FIRST])
        return
    found: list[dict[str, Any]] = []
    for number in range(arguments.rounds):
        folder = work / f"round{number}"
        found += measure(FIRST if number == 0 else LATER, arguments.run, folder)
        found += measure(RECORDED, arguments.run, folder, longer)
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in found:
        groups.setdefault((row["origin"], row["stage"], row["what"]), []).append(row)
    publish([_median(group) for group in groups.values()])


def publish(found: list[dict[str, Any]]) -> None:
    order = [FIRST, LATER, RECORDED]
    rows = [_told(row) for row in sorted(found, key=lambda row: order.index(row["origin"]))]
    rounds = max(len(row["ratios"]) for row in rows)
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
        f"{rounds} rounds, their medians. Calibrated: an empty run folder, half a minute of measuring before it; once "
        "where no former run on the machine is known, in the other rounds beside those that are. Recorded: the same "
        "folder with twice the epochs, from what its first run left; stages that were fresh have no row. Each plan and "
        "each run is a process of its own. Seconds; memory is the peak of a process, in MiB."
    )
    write("plan", rows, goals, COLUMNS, note)


def _median(group: list[dict[str, Any]]) -> dict[str, Any]:
    numbers = {
        key: statistics.median(row[key] for row in group) if group[0][key] is not None else None
        for key in ("planned", "actual", "ratio", "start")
    }
    return group[0] | numbers | {"ratios": [row["ratio"] for row in group]}


def _told(row: dict[str, Any]) -> dict[str, Any]:
    ratios = row.get("ratios", [row["ratio"]])
    return row | {"ratios": ratios, "rounds": " ".join(f"{ratio:.2f}" for ratio in ratios)}


if __name__ == "__main__":
    main()
