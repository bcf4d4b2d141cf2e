"""Command `logs`: what a cluster job has printed. Also `python -m jobs.logs JOB_ID`."""

from __future__ import annotations

import typer

from jobs.options import Address, Follow, Job
from jobs.shell import main


def logs(job_id: Job, follow: Follow = False, address: Address = None) -> None:
    """Show what a job has printed; with --follow until it ends, and exit as it does."""
    from pipeline.remote.command import show_logs

    raise typer.Exit(show_logs(job_id, address, follow))


if __name__ == "__main__":
    main(logs)
