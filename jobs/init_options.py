"""Options of the command `init`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Images = Annotated[Path | None, typer.Option(help="A folder for each class in it; or train and test with such.")]
Zoo = Annotated[Path | None, typer.Option(help="The zoo, where there is one.")]
Teachers = Annotated[
    list[Path] | None, typer.Option(help="Weights, instead of a zoo: one is written. May be repeated.")
]
Out = Annotated[Path, typer.Option("--out", "-o", help="The settings file to write.")]
Name = Annotated[str | None, typer.Option(help="Of the run. Default: the image folder's.", show_default=False)]
Labels = Annotated[int | None, typer.Option(help="Labelled images a class to train on. Default: all that are left.")]
Unlabelled = Annotated[str | None, typer.Option(help="The folder whose images have no label. Default: unlabelled.")]
_NET = "torchvision:NAME, timm:NAME or module:callable, where the weights do not tell. May be repeated."
Architecture = Annotated[list[str] | None, typer.Option(metavar="[TEACHER=]NET", help=_NET)]
_NAMES = """In the order of the outputs: a,b,c, or a file with one a line. Default: TEACHER.classes.txt beside the
weights. May be repeated."""
Classes = Annotated[list[str] | None, typer.Option(metavar="[TEACHER=]NAMES", help=_NAMES)]
Force = Annotated[bool, typer.Option("--force", help="Overwrite files that are there.")]
