"""What the terminal shows after each stage: read from the artefacts, so that a reused stage shows the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from pipeline.config import Settings
from pipeline.report.console import Display
from pipeline.stages.artefacts import Status
from pipeline.stages.base import Run
from pipeline.stages.own_scores import own_columns
from pipeline.stages.together import TOGETHER

# Scores that the table shows, where there are any, and what it calls them.
_COLUMNS = {
    "transport_cost": "cost",
    "transport_gain": "gain",
    "bridge_gain": "bridge gain",
    "knn": "k-NN",
    "leep": "LEEP",
    "information": "information",
    "certainty": "certainty",
    "agreement": "agreement",
    "class_level": "class level",
}


def after(stage: str, run: Run) -> None:
    """Show what a stage found."""
    show = _SHOW.get(stage)
    if show is not None:
        show(run)


def status(display: Display, settings: Settings, found: Iterable[Status]) -> None:
    """Show where each stage stands."""
    shown = table("stage", "state", "why", title=f"{settings.name}: {settings.run_dir}")
    colours = {"fresh": "green", "partial": "yellow", "stale": "yellow", "waiting": "dim", "missing": "dim"}
    for item in found:
        shown.add_row(item.stage, f"[{colours[item.state]}]{item.state}[/]", escape(item.why))
    display.table(shown)


def closing(run: Run) -> None:
    """Say where to look, after a whole run."""
    display, record = run.display, run.records.get("register")
    report = run.files.root / "report.html"  # of a folder in a store it lies there, too
    if run.until != "register":
        if report.is_file():
            display.note(f"report      {report}")
        return
    from pipeline.planning.against import against
    from pipeline.planning.show import show_against

    show_against(against(run.files.root), display)
    display.note(f"artefacts   {run.files.place}")
    if report.is_file():
        display.note(f"report      {report}")
    from pipeline.tracking.connect import find_store

    store = find_store(run.settings.tracking, run.files.root)
    if store.kind == "database" and store.uri.startswith("sqlite"):
        display.note(f"runs        mlflow ui --backend-store-uri {store.shown}")
    elif store.kind != "none":
        display.note(f"runs        {store.shown}")
    if record is not None and "uri" not in record.summary:
        display.note("student     not registered, see above")
    elif record is not None:
        display.note(f"student     {record.summary['uri']}  (version {record.summary['version']})")


def _ingest(run: Run) -> None:
    record = run.records["ingest"]
    parts = [f"{name} {record.summary[name]}" for name in _SPLITS if name in record.summary]
    run.display.note(f"{record.summary['rows']} images, {record.summary['classes']} classes: {', '.join(parts)}")
    if record.summary.get("skipped"):
        details = _read(run.folder("ingest") / "ingest.json")
        first = "; ".join(f"{origin} ({reason})" for origin, reason in details["skipped"][:3])
        run.display.warn(
            f"{record.summary['skipped']} unreadable images were skipped: {escape(first)}"
            f" … all in {run.folder('ingest') / 'ingest.json'}"
        )


def _assess(run: Run) -> None:
    if run.until == "assess":  # otherwise the same table follows, with the choice
        _teachers(run, None)


def _select(run: Run) -> None:
    choice = _read(run.folder("select") / "faculty.json")
    _teachers(run, choice)
    if choice["chosen"]:
        run.display.note(f"faculty: {', '.join(choice['chosen'])}")
    else:
        run.display.warn(f"do not transfer: {choice['verdict']}")


_SCORE, _REASON = 9, 30  # characters of a score's column, and those that a reason should have at least
_BESIDE = 47  # of classes, params, score and chosen, and the gaps
_SHOWN = 40  # teachers in a table: of thousands the best are enough, all are in the artefact


def _teachers(run: Run, choice: dict[str, Any] | None) -> None:
    from pipeline.stages.assess import rows_of

    rows = rows_of(run)
    thinned = any(row["dropped"] for row in rows)
    scores = [name for name in _COLUMNS if any(row[name] is not None for row in rows)]
    scores += own_columns(run.settings.assess)
    shown_rows = _worth_showing(rows, choice)
    left_out = _too_wide(run, shown_rows, scores) if choice else []
    scores = [name for name in scores if name not in left_out]
    heads = (_COLUMNS.get(name, name.removeprefix("own.")) for name in scores)
    numbers = ("classes", "params", *(["images"] if thinned else []), "score", *heads)
    shown = table("teacher", *numbers, *(("chosen", "why") if choice else ("s", "MB", "problem")))
    for column in shown.columns[1 : len(numbers) + (1 if choice else 3)]:
        column.justify = "right"
    for column in shown.columns[: len(numbers) + 1]:
        column.no_wrap = True
    for row in shown_rows:
        cells = [escape(row["teacher"]), _number(row["classes"], "d"), _number(row["parameters"], ",d")]
        cells += [_number(row["images"], "d")] * thinned
        cells += [_interval(row), *(_number(row[name], ".3f") for name in scores)]
        if choice is None:
            problem = row["error"] or row["dropped"] or ""
            cells += [_number(row["seconds"], ".2f"), _number(row["peak_mb"], ".0f"), escape(problem)]
        else:
            chosen = row["teacher"] in choice["chosen"]
            cells += ["[green]yes[/]" if chosen else "", escape(choice["reasons"][row["teacher"]])]
        shown.add_row(*cells)
    run.display.table(shown)
    if left_out:
        names = ", ".join(_COLUMNS.get(name, name.removeprefix("own.")) for name in left_out)
        run.display.note(f"not shown for want of room: {names}; a wider terminal and the report have them")
    if len(rows) > len(shown.rows):
        run.display.note(f"{len(rows) - len(shown.rows)} more in {run.folder('assess') / 'assessment.parquet'}")
    if not run.records["assess"].summary["labels"]:
        run.display.warn(
            "no labels: scores tell how sure and how versatile the teachers are, and how far they agree, not "
            "whether they are right"
        )


def _too_wide(run: Run, rows: list[dict[str, Any]], scores: list[str]) -> list[str]:
    """Return the scores that a terminal's table leaves out so that the reasons keep their room; the last go first."""
    console = run.display.console
    if not console.is_terminal:
        return []
    teacher = max(len("teacher"), *(len(row["teacher"]) for row in rows))
    room = console.width - teacher - _BESIDE - _REASON
    fitting = max(room // _SCORE, 1)
    return scores[fitting:]


def _worth_showing(rows: list[dict[str, Any]], choice: dict[str, Any] | None) -> list[dict[str, Any]]:
    chosen = set(choice["chosen"]) if choice else set()
    return [row for place, row in enumerate(rows) if place < _SHOWN or row["teacher"] in chosen]


def _interval(row: dict[str, Any]) -> str:
    if row["score"] is None:
        return ""
    width = (row["score_high"] - row["score_low"]) / 2
    return f"{row['score']:.3f}" + (f" ± {width:.3f}" if width else "")


def _amalgamate(run: Run) -> None:
    shares = run.records["amalgamate"].summary.get("shares", {})
    nested = {name: found for name, found in shares.items() if isinstance(found, dict)} or {"": shares}
    for subtask, counts in nested.items():
        total = sum(counts.values())
        if set(counts) == {TOGETHER}:
            names = json.loads((run.folder("select") / "faculty.json").read_text(encoding="utf-8"))["chosen"]
            run.display.note(f"who teaches: {', '.join(names)}, together")
        elif total:
            ordered = sorted(counts.items(), key=lambda item: -item[1])
            parts = [f"{name} {count / total:.0%}" for name, count in ordered]
            run.display.note(f"who teaches{' ' if subtask else ''}{subtask}: {', '.join(parts)}")


def _distill(run: Run) -> None:
    summary = run.records["distill"].summary
    text = f"student: {summary['parameters']:,} parameters, {summary['epochs']} epochs"
    if "validation_accuracy" in summary:
        text += f", validation accuracy {100 * summary['validation_accuracy']:.1f} %"
    run.display.note(text)
    if "flow_student_weight" in summary:
        beside = summary.get("validation_accuracy_with_teachers")
        run.display.note(
            f"flow: the student's own features weigh {summary['flow_student_weight']:.3f} at the end"
            + ("" if beside is None else f"; with its teachers it would be {100 * beside:.1f} %")
        )
    if summary.get("guard", {}).get("kept") == "no_teacher":
        run.display.warn(
            f"guard: taught, the student is {-100 * summary['guard']['advantage']:.1f} points worse on "
            f"{summary['guard']['images']} probe and validation images; the one without teachers is kept"
        )


def _evaluate(run: Run) -> None:
    found = _read(run.folder("evaluate") / "evaluation.json")
    shown = table("student taught by", "seeds", "test accuracy, %", "ECE", "difference, points", "± 2 SE")
    for column in shown.columns[1:]:
        column.justify = "right"
    for arm in found["arms"]:
        difference, error = arm.get("difference"), arm.get("difference_2se")
        shown.add_row(
            escape(arm["title"]),
            str(len(arm["accuracies"])),
            f"{100 * arm['mean']:.1f}" + (f" ± {100 * arm['std']:.1f}" if len(arm["accuracies"]) > 1 else ""),
            f"{arm['ece']:.3f}",
            "" if difference is None else f"{100 * difference:+.1f}",
            "" if error is None else f"{100 * error:.1f}",
        )
    run.display.table(shown)
    run.display.note(found["verdict"])


def _register(run: Run) -> None:
    summary, settings = run.records["register"].summary, run.settings.registration
    if "uri" not in summary:
        run.display.warn(escape(f"not registered: {summary['why']}; register.gate=false registers it nevertheless"))
        return
    aliases = (
        f"aliases {summary['alias']} and {settings.champion}" if summary["promoted"] else f"alias {summary['alias']}"
    )
    run.display.note(f"{summary['name']} version {summary['version']}, {aliases}: {summary['uri']}")
    tell = run.display.note if summary["gate"] == "passed" else run.display.warn
    tell(escape(f"gate {summary['gate']}: {summary['why']}"))
    for line in summary["warnings"]:
        run.display.warn(escape(f"licence of {line}"))
    if summary["gate"] == "passed" and not summary["promoted"]:
        from pipeline.tracking.connect import find_store

        store = find_store(run.settings.tracking, run.files.root)
        run.display.note(f"to serve it: faculty promote {summary['uri']} --tracking-uri {store.shown}")


_SPLITS = ("train_labelled", "train_unlabelled", "probe", "validation", "test")
_SHOW: dict[str, Callable[[Run], None]] = {
    "ingest": _ingest,
    "assess": _assess,
    "select": _select,
    "amalgamate": _amalgamate,
    "distill": _distill,
    "evaluate": _evaluate,
    "register": _register,
}


def table(*columns: str, title: str | None = None) -> Table:
    """Return an empty table in the product's style."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


def _number(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
