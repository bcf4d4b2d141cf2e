"""Command `schema`: the reference of the settings. Also `python -m jobs.schema --markdown`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.shell import main

Out = Annotated[Path | None, typer.Option("--out", "-o", help="A file; default: print it.", show_default=False)]
Markdown = Annotated[bool, typer.Option("--markdown", help="For people, as docs/settings.md, instead of JSON Schema.")]


def schema(out: Out = None, markdown: Markdown = False) -> None:
    """Print the JSON Schema of run.yaml, with which editors complete and check it."""
    from pipeline.reference.command import write_reference

    write_reference(out, markdown=markdown)


if __name__ == "__main__":
    main(schema)
