"""The `faculty` command."""

from __future__ import annotations

import typer

from jobs.amalgamate import amalgamate
from jobs.assess import assess
from jobs.cache import cache
from jobs.distill import distill
from jobs.evaluate import evaluate
from jobs.ingest import ingest
from jobs.lineage import lineage
from jobs.plan import plan
from jobs.promote import promote
from jobs.register import register
from jobs.run import run
from jobs.select import select
from jobs.shell import main as run_app
from jobs.zoo import zoo

app = typer.Typer(
    name="faculty",
    help="One small student from a repository of pre-trained teachers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in (run, plan, ingest, assess, select, amalgamate, distill, evaluate, register, promote, lineage, cache):
    app.command()(command)
app.add_typer(zoo, name="zoo")


def main() -> None:
    """Run the command line."""
    run_app(app)


if __name__ == "__main__":
    main()
