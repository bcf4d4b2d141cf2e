"""Look at a zoo: list its teachers, or load and try each one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.markup import escape

from pipeline.report.console import Display
from pipeline.stages.tables import table


def list_zoo(path: Path, display: Display | None = None) -> None:
    """Print the teachers that a zoo file names, without loading any."""
    from pipeline.models.zoo import load_zoo

    display, zoo = display or Display(), load_zoo(path)
    found = table("teacher", "source", "classes", "licence", "notes", title=f"{len(zoo)} teachers in {path}")
    for name in zoo.names:
        spec = zoo[name]
        classes = spec.classes if isinstance(spec.classes, str) else ", ".join(spec.classes or ("from the source",))
        found.add_row(escape(name), spec.source.type, escape(_short(classes)), escape(spec.licence), escape(spec.notes))
    display.table(found)


def check_zoo(path: Path, trusted: tuple[str, ...] = (), display: Display | None = None) -> int:
    """Load every teacher and run a probe batch; return the exit code: 0 if all are well, 2 if one is not."""
    from pipeline.config import ZooSettings
    from pipeline.models.check import check_teacher
    from pipeline.models.zoo import load_zoo

    display, zoo = display or Display(), load_zoo(path)
    trusted = (*ZooSettings(path=str(path)).trusted_factories, *trusted)
    found = table("teacher", "ok", "classes", "params", "features", "MB", "s", "problem")
    for column in found.columns[2:7]:
        column.justify = "right"
    broken = 0
    with display.bar("teachers", len(zoo)) as advance:
        for name in zoo.names:
            check = check_teacher(zoo[name], trusted_factories=trusted, resolvers={"mlflow": _from_mlflow})
            broken += not check.ok
            numbers = [
                "-" if value is None else format(value, form)
                for value, form in (
                    (check.classes, "d"),
                    (check.parameters, ",d"),
                    (check.feature_dim, "d"),
                    (check.megabytes, ".1f"),
                    (check.seconds, ".2f"),
                )
            ]
            found.add_row(
                escape(name), "[green]yes[/]" if check.ok else "[red]no[/]", *numbers, escape(check.error or "")
            )
            advance(1, name)
    display.table(found)
    display.note(f"{len(zoo) - broken} of {len(zoo)} teachers can teach")
    return 2 if broken else 0


def _from_mlflow(uri: str) -> Any:
    from pipeline.tracking.resolve import load_mlflow_module

    return load_mlflow_module(uri)


def _short(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
