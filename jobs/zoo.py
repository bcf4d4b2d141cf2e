"""Command `zoo`: look at the teachers of a zoo. Also `python -m jobs.zoo check zoo.yaml`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.shell import main

zoo = typer.Typer(
    help="List or check the teachers of a zoo.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

File = Annotated[Path, typer.Argument(help="The zoo file (YAML).", show_default=False)]
Trusted = Annotated[
    list[str] | None,
    typer.Option("--trust", help="Module prefix that a `factory` may come from, besides the built-in ones."),
]


@zoo.command("list")
def list_(file: File) -> None:
    """List the teachers of a zoo file without loading them."""
    from pipeline.stages.zoo import list_zoo

    list_zoo(file)


@zoo.command("check")
def check(file: File, trust: Trusted = None) -> None:
    """Load every teacher, run a probe batch and print what is wrong with each."""
    from pipeline.stages.zoo import check_zoo

    raise typer.Exit(check_zoo(file, tuple(trust or ())))


if __name__ == "__main__":
    main(zoo)
