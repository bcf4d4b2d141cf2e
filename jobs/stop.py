"""Command `stop`: end a cluster job so that it can go on later. Also `python -m jobs.stop JOB_ID`."""

from __future__ import annotations

from jobs.options import Address, Job
from jobs.shell import main


def stop(job_id: Job, address: Address = None) -> None:
    """Ask a job to end, and wait until it has; `faculty submit --resume JOB_ID` goes on where it stopped."""
    from pipeline.remote.command import stop_job

    stop_job(job_id, address)


if __name__ == "__main__":
    main(stop)
