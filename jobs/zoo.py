"""Command `zoo`: look at the teachers of a zoo, or prepare it. Also `python -m jobs.zoo check zoo.yaml`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.shell import main

zoo = typer.Typer(
    help="List or check the teachers of a zoo, pack it, make their cards; push them to a model registry, or pull.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

File = Annotated[Path, typer.Argument(help="The zoo file (YAML, or a Parquet catalogue).", show_default=False)]
Trusted = Annotated[
    list[str] | None,
    typer.Option("--trust", help="Module prefix that a `factory` may come from, besides the built-in ones."),
]


TrackingUri = Annotated[
    str | None,
    typer.Option(help="MLflow's server or database; default: MLFLOW_TRACKING_URI.", show_default=False),
]
Pickle = Annotated[
    list[str] | None,
    typer.Option("--allow-pickle", help="Teacher whose registered model may be unpickled: runs its author's code."),
]
Reference = Annotated[
    str | None,
    typer.Option(
        help="The teacher whose features the class centres are taken in; without it, the pixels.", show_default=False
    ),
]


@zoo.command("list")
def list_(
    file: File,
    everything: Annotated[bool, typer.Option("--all", help="List every teacher, not the first 50.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Every teacher, for machines.")] = False,
) -> None:
    """List the teachers of a zoo file without loading them."""
    from pipeline.stages.zoo import list_zoo

    raise typer.Exit(list_zoo(file, everything=everything, as_json=as_json))


@zoo.command("check")
def check(
    file: File,
    trust: Trusted = None,
    tracking_uri: TrackingUri = None,
    allow_pickle: Pickle = None,
    as_json: Annotated[bool, typer.Option("--json", help="What was found, for machines.")] = False,
) -> None:
    """Load every teacher, run a probe batch and print what is wrong with each."""
    from pipeline.stages.zoo import Access, check_zoo

    access = Access(tuple(trust or ()), tracking_uri, tuple(allow_pickle or ()))
    raise typer.Exit(check_zoo(file, access, as_json=as_json))


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
    reference: Reference = None,
    trust: Trusted = None,
    tracking_uri: TrackingUri = None,
    allow_pickle: Pickle = None,
) -> None:
    """Make the cards that teachers lack: size, accuracy and class centres of each on its own examples."""
    from pipeline.stages.zoo import Access, make_cards

    raise typer.Exit(make_cards(file, reference, Access(tuple(trust or ()), tracking_uri, tuple(allow_pickle or ()))))


@zoo.command("push")
def push(
    file: File,
    only: Annotated[
        list[str] | None, typer.Option(help="Push this teacher alone; may be repeated.", show_default=False)
    ] = None,
    prefix: Annotated[str, typer.Option(help="Put before each teacher's name.", show_default=False)] = "",
    alias: Annotated[str | None, typer.Option(help="Alias to move to each version.", show_default=False)] = None,
    tag: Annotated[
        list[str] | None, typer.Option(help="key=value, for model and version; may be repeated.", show_default=False)
    ] = None,
    tracking_uri: TrackingUri = None,
    experiment: Annotated[str, typer.Option(help="Experiment that keeps the files.")] = "faculty-zoo",
    reference: Reference = None,
    trust: Trusted = None,
) -> None:
    """Register local teachers: weights without pickle, labels, preprocessing, card. What is there adds no version."""
    from pipeline.stages.push import Push, parse_tags, push_zoo

    asked = Push(
        only=only or None,
        prefix=prefix,
        alias=alias,
        tags=parse_tags(tag or ()),
        tracking_uri=tracking_uri,
        experiment=experiment,
        trusted=tuple(trust or ()),
        reference=reference,
    )
    raise typer.Exit(push_zoo(file, asked))


@zoo.command("pull")
def pull(
    out: Annotated[Path, typer.Option("--out", "-o", help="The zoo to write (.yaml or .parquet).", show_default=False)],
    filter_: Annotated[
        str | None, typer.Option("--filter", help="In MLflow's search syntax: \"tags.task = 'birds'\".")
    ] = None,
    alias: Annotated[str | None, typer.Option(help="Take the version that this alias names.")] = None,
    every: Annotated[bool, typer.Option("--all-versions", help="Take all versions, not the newest.")] = False,
    tracking_uri: TrackingUri = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a zoo that is there.")] = False,
) -> None:
    """Write a zoo of a model registry's teachers, with versions in the place of aliases, and their cards."""
    from pipeline.models.zoo_spec import RegistryQuery
    from pipeline.stages.registered import pull_zoo
    from pipeline.strict import validate

    query = {"filter": filter_, "alias": alias, "versions": "all" if every else "latest"}
    asked = validate(RegistryQuery, query, where="faculty zoo pull")
    raise typer.Exit(pull_zoo(asked, out, tracking_uri=tracking_uri, force=force))


if __name__ == "__main__":
    main(zoo)
