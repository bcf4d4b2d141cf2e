"""How true the time left is that progress bars tell: `make bench-eta`. About two minutes a run of the demo.

    python -m benchmarks.eta [--runs N] [--keep FILE | --from FILE]

Every step of every bar of a demo run is recorded with what the bar told then. A bar is off by the difference between
the time at which it said that it would end and the time at which it ended, as a share of the whole time of the bar. The
bars of rich, which know steps alone and the speed of the last 30 seconds, get the very same steps.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from benchmarks.results import ROOT, goal, write
from pipeline.report.console import Advance, Display
from pipeline.report.pace import Pace
from pipeline.settings_files import load_settings
from pipeline.stages.run import run_pipeline

RUNS, SHORT, TARGET = 2, 5.0, 0.25  # runs; seconds of a bar that is not judged; how far off one may be
COLUMNS = {
    "run": "run",
    "bar": "bar",
    "steps": "steps",
    "seconds": "seconds",
    "start": "before the first step",
    "first": "off after a tenth",
    "worst": "off at worst later",
    "rich_first": "rich's, after a tenth",
    "rich_worst": "rich's, at worst later",
}


class Recorder(Display):
    """A display that keeps what its bars were told and what they told."""

    def __init__(self) -> None:
        super().__init__(Console(highlight=False))
        self.bars: list[dict[str, Any]] = []

    @contextlib.contextmanager
    def bar(
        self, title: str, total: int, unit: str = "", *, work: float | None = None, at_once: int = 1
    ) -> Iterator[Advance]:
        """Show progress as any display does, and keep it."""
        pace, began = Pace(total if work is None else work, at_once), time.monotonic()
        bar: dict[str, Any] = {"bar": title, "total": total, "steps": []}
        with super().bar(title, total, unit, work=work, at_once=at_once) as advance:

            def kept(done: int = 1, note: str = "", work: float | None = None, took: float | None = None) -> None:
                advance(done, note, work, took)
                pace.advance(done if work is None else work, took)
                at = time.monotonic() - began
                bar["steps"].append({"at": at, "done": done, "eta": pace.eta, "share": pace.share, "took": took})

            yield kept
        bar["seconds"] = time.monotonic() - began
        self.bars.append(bar)


def record(runs: int) -> list[list[dict[str, Any]]]:
    """Run the demo, every time from nothing with another seed; return the bars of each run."""
    found = []
    for seed in range(runs):
        with tempfile.TemporaryDirectory(prefix="faculty-eta-") as folder:
            overrides = [f"seed={seed}", f"run_dir={folder}/run", f"cache.path={folder}/outputs"]
            display = Recorder()
            run_pipeline(load_settings([ROOT / "conf" / "demo" / "run.yaml"], overrides), display=display)
            found.append(display.bars)
    return found


def off(bar: dict[str, Any], told: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Return by what share of its time a bar was off after the first tenth, and at worst from there on."""
    wrong = [
        None if eta is None else abs(step["at"] + eta - bar["seconds"]) / bar["seconds"]
        for step, eta in zip(bar["steps"], told, strict=True)
        if 0.1 <= step["share"] < 1
    ]
    known = [one for one in wrong if one is not None]
    return (wrong[0] if wrong else None), max(known, default=None)


def rich_told(bar: dict[str, Any]) -> list[float | None]:
    """Return what rich's column of the remaining time tells after each step."""
    now = 0.0
    progress = Progress(console=Console(quiet=True), get_time=lambda: now, auto_refresh=False)
    task = progress.add_task("", total=bar["total"])
    told = []
    for step in bar["steps"]:
        now = step["at"]
        progress.update(task, advance=step["done"])
        told.append(progress.tasks[0].time_remaining)
    return told


def rows_of(runs: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return a row for each bar that is long enough to be looked at."""
    rows = []
    for number, bars in enumerate(runs, 1):
        for bar in bars:
            if bar["seconds"] <= SHORT:
                continue
            began = next(step["at"] - (step["took"] or 0.0) for step in bar["steps"] if step["took"] != 0.0)
            first, worst = off(bar, [step["eta"] for step in bar["steps"]])
            rich_first, rich_worst = off(bar, rich_told(bar))
            row = {"run": number, "bar": bar["bar"], "steps": bar["total"], "seconds": round(bar["seconds"], 1)}
            row |= {"start": round(max(began, 0.0), 1), "first": first, "worst": worst}
            rows.append(row | {"rich_first": rich_first, "rich_worst": rich_worst})
    return rows


def publish(runs: Sequence[Sequence[dict[str, Any]]]) -> None:
    """Write the results."""
    rows = rows_of(runs)
    goals = [
        goal(f"run {row['run']}, {row['bar']}: time left, off at worst", row["worst"], TARGET, "", at_most=True)
        for row in rows
        if row["worst"] is not None
    ]
    count = "a run of the demo" if len(runs) == 1 else f"{len(runs)} runs of the demo with other seeds"
    note = (
        f"Bars of more than {SHORT:.0f} s in {count}, from nothing; seconds from "
        "the bar's appearance to its end, with the start of workers. Off: by how much the end that was told missed the "
        "one that came, as a share of all its seconds, after the first step with a tenth of the work behind it, and at "
        "the worst step from there on. rich's: the same steps, counted, at their speed in the last 30 s; empty where "
        "it told nothing yet."
    )
    write("eta", rows, goals, COLUMNS, note)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--keep", type=Path, help="write what was recorded here")
    parser.add_argument("--from", dest="kept", type=Path, help="what was recorded before, instead of runs")
    given = parser.parse_args()
    runs = record(given.runs) if given.kept is None else json.loads(given.kept.read_text(encoding="utf-8"))
    if given.keep is not None:
        given.keep.write_text(json.dumps(runs), encoding="utf-8")
    publish(runs)


if __name__ == "__main__":
    main()
