"""Command `init`: settings for a folder of images and a zoo. Also `python -m jobs.init --images DIR --zoo zoo.yaml`."""

from pathlib import Path

import typer

from jobs import init_options as o
from jobs.shell import main


def init(
    images: o.Images = None, zoo: o.Zoo = None, teachers: o.Teachers = None, out: o.Out = Path("run.yaml"),
    name: o.Name = None, labels: o.Labels = None, unlabelled: o.Unlabelled = None,
    architecture: o.Architecture = None, classes: o.Classes = None, force: o.Force = False,
) -> None:  # fmt: skip
    """Write a run.yaml with comments for your images and teachers; on a terminal it asks for what is not given."""
    from pipeline.start.command import Wanted, initialise

    given = (images, zoo, teachers or (), out, name, labels, unlabelled, architecture or (), classes or (), force)
    raise typer.Exit(initialise(Wanted(*given)))


if __name__ == "__main__":
    main(init)
