"""What every command shares: its options, and how an error ends the process."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.errors import FacultyError, Interrupted, UserError
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
_TYPES = {list[Path]: "<path>"}


def execute(
    until: str,
    config: list[Path] | None,
    overrides: list[str] | None,
    verbose: bool,
    status: bool = False,
    as_json: bool = False,
) -> None:
    """Load the settings and run the pipeline up to a stage, or only show where each stage stands."""
    if as_json and not status:
        raise UserError("--json goes with --status: a run itself says what it does line by line")
    from pipeline.settings_files import load_settings

    if verbose:
        os.environ["FACULTY_VERBOSE"] = "1"
    with stoppable():
        settings = load_settings(config or [], overrides or [])
        from pipeline.cluster.in_job import refuse_passing_folder
        from pipeline.stages.run import run_pipeline, show_status
        from pipeline.stages.status import print_status

        refuse_passing_folder(settings.run_dir)
        if as_json:
            print_status(settings, until=until)
        elif status:
            show_status(settings, until=until)
        else:
            run_pipeline(settings, until=until, verbose=verbose)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Turn Ctrl-C, and SIGTERM just as well, into one line that says how to go on.

    SIGTERM is how `faculty stop`, `ray job stop`, Kubernetes and batch systems end a process.

    Raises
    ------
    Interrupted
        When one of the two has come, whatever it broke off.
    """
    heard: list[int] = []

    def hear(number: int, frame: object) -> None:
        heard.append(number)
        raise KeyboardInterrupt

    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, hear) for number in numbers}
    try:
        yield
    except (KeyboardInterrupt, Exception) as error:
        if isinstance(error, Interrupted) or (isinstance(error, Exception) and not heard):
            raise
        raise Interrupted(_stopped(signal.SIGTERM in heard)) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _stopped(by_term: bool) -> str:
    from pipeline.cluster.in_job import job_id

    how, job = "ended by SIGTERM" if by_term else "interrupted", job_id()
    return f"{how}; {f'faculty submit --resume {job}' if job else 'the same command'} continues where it stopped"


def main(command: Callable[..., Any] | typer.Typer) -> None:
    """Run a command; turn an error into one line and an exit code (2: bad input, 1: failure, 130: interrupted)."""
    app = typer.main.get_command(command if isinstance(command, typer.Typer) else _alone(command))
    _plain_types(app)
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


def _plain_types(command: Any) -> None:
    """Say in the help what an option takes in words: nothing where it is a switch, else the type of one value.

    Typer would write ``--force <bool>``, which reads as if ``--force true`` were to be typed, and ``<list[Path]>``.
    """
    options = [*command.params, command.get_help_option(typer.Context(command))]
    for option in options:
        if getattr(option, "is_flag", False):
            option.metavar = ""
        elif getattr(option, "multiple", False) and option.metavar is None:
            option.metavar = _TYPES.get(option.type_descriptor.annotation, "<text>")
    for below in getattr(command, "commands", {}).values():
        _plain_types(below)


def _trace() -> None:
    if os.environ.get("FACULTY_VERBOSE"):
        traceback.print_exc()


def _end(message: str, code: int) -> None:
    for line in redact(message).splitlines():
        print(f"error: {line}", file=sys.stderr)
    sys.exit(code)
