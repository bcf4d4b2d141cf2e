"""Command `jobs`: the submitted jobs of a cluster. Also `python -m jobs.jobs`."""

from __future__ import annotations

from jobs.options import Address, AsJson
from jobs.shell import main


def jobs(address: Address = None, as_json: AsJson = False) -> None:
    """List the jobs of a cluster, the newest first."""
    from pipeline.remote.command import show_jobs

    show_jobs(address, as_json)


if __name__ == "__main__":
    main(jobs)
