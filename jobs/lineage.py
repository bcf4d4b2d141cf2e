"""Command `lineage`: where a registered student comes from. Also `python -m jobs.lineage models:/name@champion`."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.shell import Config, main

Model = Annotated[str, typer.Argument(help="models:/name@champion or models:/name/3.", show_default=False)]
Uri = Annotated[str | None, typer.Option(help="Default: that of -c, else MLFLOW_TRACKING_URI.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]


def lineage(model: Model, config: Config = None, tracking_uri: Uri = None, as_json: AsJson = False) -> None:
    """Show where a student comes from: data, settings, teachers, and theirs where they were students themselves."""
    from pipeline.stages.students import show_lineage

    show_lineage(model, tracking_uri, config or [], as_json=as_json)


if __name__ == "__main__":
    main(lineage)
