"""Command `report`: a run as one HTML page, or several beside each other. Also `python -m jobs.report -c run.yaml`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.shell import Config, main

_WHAT = "Settings that override the files; with --compare the run folders."
Words = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE|RUN_DIR", help=_WHAT, show_default=False)]
Out = Annotated[Path | None, typer.Option(help="The file to write; default: in the run folder.", show_default=False)]
Compare = Annotated[bool, typer.Option("--compare", help="Compare run folders: comparison.html.")]


def report(words: Words = None, config: Config = None, out: Out = None, compare: Compare = False) -> None:
    """Write a run's page again from its folder, or compare runs."""
    from pipeline.stages.report import compare_runs, report_run

    if compare:
        compare_runs(words or [], out=out)
    else:
        report_run(config or [], words or [], out=out)


if __name__ == "__main__":
    main(report)
