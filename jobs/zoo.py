"""Command `zoo`: look at the teachers of a zoo, or prepare it. Also `python -m jobs.zoo check zoo.yaml`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.shell import main

zoo = typer.Typer(
    help="List or check the teachers of a zoo, pack it into a catalogue, make its teachers' cards.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

File = Annotated[Path, typer.Argument(help="The zoo file (YAML, or a Parquet catalogue).", show_default=False)]
Trusted = Annotated[
    list[str] | None,
    typer.Option("--trust", help="Module prefix that a `factory` may come from, besides the built-in ones."),
]


@zoo.command("list")
def list_(
    file: File, everything: Annotated[bool, typer.Option("--all", help="List every teacher, not the first 50.")] = False
) -> None:
    """List the teachers of a zoo file without loading them."""
    from pipeline.stages.zoo import list_zoo

    raise typer.Exit(list_zoo(file, everything=everything))


@zoo.command("check")
def check(file: File, trust: Trusted = None) -> None:
    """Load every teacher, run a probe batch and print what is wrong with each."""
    from pipeline.stages.zoo import check_zoo

    raise typer.Exit(check_zoo(file, tuple(trust or ())))


@zoo.command("pack")
def pack(
    file: File,
    out: Annotated[Path, typer.Option("--out", "-o", help="The catalogue to write (.parquet).", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="Overwrite a catalogue that is there.")] = False,
) -> None:
    """Write a zoo as a Parquet catalogue, which opens at once however many teachers it names."""
    from pipeline.stages.zoo import pack_zoo

    pack_zoo(file, out, force=force)


@zoo.command("cards")
def cards(
    file: File,
    reference: Annotated[
        str | None,
        typer.Option(
            help="The teacher whose features the class centres are taken in; without it, the pixels.",
            show_default=False,
        ),
    ] = None,
    trust: Trusted = None,
) -> None:
    """Make the cards that teachers lack: size, accuracy and class centres of each on its own examples."""
    from pipeline.stages.zoo import make_cards

    raise typer.Exit(make_cards(file, reference, tuple(trust or ())))


if __name__ == "__main__":
    main(zoo)
