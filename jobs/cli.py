"""The `faculty` command."""

from __future__ import annotations

import typer

from jobs.amalgamate import amalgamate
from jobs.assess import assess
from jobs.cache import cache
from jobs.distill import distill
from jobs.evaluate import evaluate
from jobs.ingest import ingest
from jobs.init import init
from jobs.jobs import jobs
from jobs.lineage import lineage
from jobs.logs import logs
from jobs.plan import plan
from jobs.promote import promote
from jobs.register import register
from jobs.report import report
from jobs.run import run
from jobs.schema import schema
from jobs.select import select
from jobs.shell import main as run_app
from jobs.stop import stop
from jobs.submit import submit
from jobs.sweep import sweep
from jobs.zoo import zoo

_EPILOG = """
[bold]Examples[/bold]
  faculty init --images data/birds --zoo zoo.yaml   a run.yaml with comments
  faculty plan -c run.yaml                          what it will take
  faculty run -c run.yaml                           all that is not up to date
  faculty run -c run.yaml -c conf/recipes/kd.yaml distill.loop.epochs=60

[bold]Exit codes[/bold]
  0 done   1 failed   2 bad input   130 interrupted: the same command goes on
"""
app = typer.Typer(
    name="faculty",
    help="One small student from a repository of pre-trained teachers.",
    epilog=_EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
_PANELS = {
    "Start": (init, plan, schema),
    "Run": (run, ingest, assess, select, amalgamate, distill, evaluate, register, sweep),
    "Jobs on a cluster": (submit, jobs, logs, stop),
    "Results": (report, promote, lineage),
    "Teachers": (cache,),
}
for panel, commands in _PANELS.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)
app.add_typer(zoo, name="zoo", rich_help_panel="Teachers")


def main() -> None:
    """Run the command line."""
    run_app(app)


if __name__ == "__main__":
    main()
