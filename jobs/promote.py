"""Command `promote`: which registered student is served. Also `python -m jobs.promote models:/name@challenger`."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.shell import Config, main

Model = Annotated[
    str, typer.Argument(help="models:/name/3, models:/name@alias; with --back a name.", show_default=False)
]
Uri = Annotated[str | None, typer.Option(help="Default: that of -c, else MLFLOW_TRACKING_URI.", show_default=False)]
Back = Annotated[bool, typer.Option("--back", help="Take the last promotion back.")]
Force = Annotated[bool, typer.Option("--force", help="Although it has not passed the gate.")]


def promote(
    model: Model, config: Config = None, tracking_uri: Uri = None, back: Back = False, force: Force = False
) -> None:
    """Move the alias champion to a student that has passed the gate."""
    from pipeline.stages.students import promote_student

    promote_student(model, tracking_uri, config or [], back=back, force=force)


if __name__ == "__main__":
    main(promote)
