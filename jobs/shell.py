"""What every command shares: its options, and how an error ends the process."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.errors import FacultyError, Interrupted
from pipeline.tracking.redact import redact

Config = Annotated[
    list[Path] | None,
    typer.Option("--config", "-c", help="Settings file (YAML). Several are merged in order.", show_default=False),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="SECTION.KEY=VALUE", help="Settings that override the files.", show_default=False),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show Ray's and MLflow's logs, and tracebacks.")]


def execute(
    until: str, config: list[Path] | None, overrides: list[str] | None, verbose: bool, status: bool = False
) -> None:
    """Load the settings and run the pipeline up to a stage, or only show where each stage stands."""
    from pipeline.config import load_settings

    if verbose:
        os.environ["FACULTY_VERBOSE"] = "1"
    settings = load_settings(config or [], overrides or [])
    from pipeline.stages.run import run_pipeline, show_status

    try:
        if status:
            show_status(settings, until=until)
        else:
            run_pipeline(settings, until=until, verbose=verbose)
    except KeyboardInterrupt:
        raise Interrupted("interrupted; the same command continues where it stopped") from None


def main(command: Callable[..., Any] | typer.Typer) -> None:
    """Run a command; turn an error into one line and an exit code (2: bad input, 1: failure, 130: interrupted)."""
    app = command if isinstance(command, typer.Typer) else _alone(command)
    try:
        app()
    except FacultyError as error:
        _trace()
        _end(str(error), error.exit_code)
    except Exception as error:
        _trace()
        text = " ".join(str(error).split()) or "no message"
        _end(f"{type(error).__name__}: {text[:500]} (run again with -v for the traceback)", 1)


def _alone(command: Callable[..., Any]) -> typer.Typer:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    return app


def _trace() -> None:
    if os.environ.get("FACULTY_VERBOSE"):
        traceback.print_exc()


def _end(message: str, code: int) -> None:
    for line in redact(message).splitlines():
        print(f"error: {line}", file=sys.stderr)
    sys.exit(code)
