"""Command `run`: all stages. Also `python -m jobs.run -c run.yaml`."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.shell import Config, Overrides, Verbose, execute, main

Status = Annotated[bool, typer.Option("--status", help="Only show which stages are fresh, stale (and why) or missing.")]
AsJson = Annotated[bool, typer.Option("--json", help="With --status, for machines.")]


def run(
    overrides: Overrides = None, config: Config = None, verbose: Verbose = False, status: Status = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Run every stage that is not fresh, from the images to the registered student."""
    execute("register", config, overrides, verbose, status, as_json)


if __name__ == "__main__":
    main(run)
