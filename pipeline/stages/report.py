"""Stage report: one HTML page of a run, written at its end or again from its folder; and one that compares runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.data.mirror import share
from pipeline.errors import UserError
from pipeline.report.console import Display
from pipeline.settings_files import load_settings
from pipeline.stages import report_facts, report_images, report_training
from pipeline.stages.artefacts import digest_of, write_text
from pipeline.stages.base import Run
from pipeline.stages.recording import optional, version
from pipeline.stages.report_facts import Part, parts
from pipeline.stages.report_folder import kept_run, records_of
from pipeline.stages.report_sizes import sizes
from pipeline.tracking.redact import one_line
from pipeline.tracking.tracker import NoTracker

FILE = "report.html"
VERSION = 1  # raised when the page tells the same results otherwise

PARTS: dict[str, Part] = {
    "verdict": report_facts.verdict,
    "size": sizes,
    "ranking": report_facts.ranking,
    "agreement": report_facts.agreement,
    "transport": report_facts.transport,
    "classes": report_training.by_class,
    "teaching": report_training.teaching,
    "examples": report_images.examples,
    "flow": report_training.flow,
    "training": report_training.training,
    "confusion": report_images.confusion,
    "calibration": report_images.calibration,
    "mistakes": report_images.mistakes,
    "cost": report_facts.cost,
    "lineage": report_facts.lineage,
    "settings": report_facts.settings,
}
_COMPARED = ("verdict", "size", "ranking", "classes", "training", "calibration", "cost", "lineage", "settings")


def gather(run: Run, names: Sequence[str] = tuple(PARTS)) -> dict[str, Any]:
    """Return all that a page tells of a run, as plain values: ``head`` and ``parts`` by name, see `PARTS`."""
    found = report_facts.head(run) | {"key": key_of(run)}
    return {"head": found, "parts": parts(run, {name: PARTS[name] for name in names})}


def key_of(run: Run) -> str:
    """Return what a page is out of date by: the results that it tells of, and how it tells them."""
    return digest_of([VERSION, version(), {name: one.key for name, one in run.records.items()}])[:16]


def write_page(run: Run, path: Path) -> None:
    """Write the page of a run."""
    from pipeline.report.page import render

    write_text(path, render(gather(run)))


def add_report(run: Run) -> None:
    """Write the run's page and record it; called at the end of every run. What goes wrong is one warning.

    Where the run stopped early, later results that were made from the same ones are told of, too. A page that tells of
    these very results stays as it is.
    """
    path = run.files.root / FILE
    try:
        whole = replace(run, records=records_of(run.files, run.records))
        if not run.records or _is_current(path, key_of(whole)):
            return
        with run.display.working("writing the report"):
            write_page(whole, path)
    except Exception as error:  # hours of compute don't end for a page
        run.display.warn(f"no report: {type(error).__name__}: {one_line(error)}".replace("[", r"\["))
        return
    with optional("the report"):
        if isinstance(run.root, NoTracker):
            run.open_tracker()  # results of former runs, whose page is new
        run.root.artifact(path)


def _is_current(path: Path, key: str) -> bool:
    try:
        with path.open(encoding="utf-8") as handle:
            return f'name="faculty-key" content="{key}"' in handle.read(2000)
    except (OSError, UnicodeDecodeError):
        return False


def report_run(
    config: Sequence[Path],
    overrides: Sequence[str] = (),
    *,
    out: Path | None = None,
    display: Display | None = None,
) -> Path:
    """Write the page of a run again, from its folder; return the file.

    Raises
    ------
    UserError
        When the folder holds no run, or the file can't be written.
    """
    display = display or Display()
    settings = load_settings(list(config), list(overrides))
    run = kept_run(settings.run_dir, display)
    path = Path(out) if out is not None else run.files.root / FILE
    with display.working("writing the report"):
        _written(path, lambda: write_page(run, path))
    for name, why in _left_out(run, path):
        display.note(f"left out: {name}, {why}".replace("[", r"\["))
    display.note(f"report      {path}")
    return path


def compare_runs(folders: Sequence[str | Path], *, out: Path | None = None, display: Display | None = None) -> Path:
    """Write a page that compares runs; return the file, ``comparison.html`` in the current folder by default.

    Raises
    ------
    UserError
        For fewer than two run folders, for one that is none, or when the file can't be written.
    """
    display = display or Display()
    if len(folders) < 2:
        raise UserError(f"report --compare: takes two run folders or more, got {len(folders)}")
    from pipeline.report.page_compare import render_comparison
    from pipeline.stages.report_pairs import pairs

    runs = [kept_run(folder, display) for folder in folders]
    path = Path(out) if out is not None else Path("comparison.html")
    with display.bar("runs", len(runs)) as advance:
        found = []
        for run in runs:
            found.append(gather(run, _COMPARED))
            advance(1, run.settings.name)
    _written(path, lambda: write_text(path, render_comparison(found, pairs(runs))))
    display.note(f"comparison  {path}")
    return path


def _written(path: Path, write: Any) -> None:
    try:
        write()
        share(path)
    except OSError as error:
        raise UserError(f"--out {path}: can't be written ({error.strerror or error}); choose another file") from None


def _left_out(run: Run, path: Path) -> list[tuple[str, str]]:
    """Return what the page that was just written leaves out, and why, from its own list."""
    text = path.read_text(encoding="utf-8")
    start, end = '<script type="application/json" id="left-out">', "</script>"
    body = text.partition(start)[2].partition(end)[0]
    return list(dict(json.loads(body or "{}")).items())
