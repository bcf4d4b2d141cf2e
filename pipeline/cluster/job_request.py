"""What a cluster job is made of, and what the cluster says of it. Imports no ray."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

_OVER = ("SUCCEEDED", "FAILED", "STOPPED")

# Seconds between SIGTERM and SIGKILL when a job is stopped. Ray reads it from the job's own environment; its 3 s are
# too few for a training that stores a checkpoint first.
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
STOP_WAIT_S = 60


@dataclass(frozen=True)
class JobRequest:
    """A job to submit.

    Attributes
    ----------
    entrypoint : str
        A shell command.
    runtime_env : dict
        Ray's runtime environment: working folder, what is left out of it, environment variables. It may hold
        credentials and is never printed.
    metadata : dict of str to str
        What the job says of itself; everybody who sees the dashboard reads it.
    num_cpus, num_gpus : float
        What the command itself takes of the cluster, beside its workers. With 0 of both it runs on the head.
    memory : int
        Bytes, of the same.
    """

    entrypoint: str
    runtime_env: dict[str, Any] = field(repr=False)
    metadata: dict[str, str] = field(default_factory=dict)
    num_cpus: float = 0.0
    num_gpus: float = 0.0
    memory: int = 0


@dataclass(frozen=True)
class Job:
    """A job as the cluster tells of it.

    Attributes
    ----------
    id : str
    status : str
        PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.
    entrypoint : str
        Without credentials.
    metadata : dict of str to str
    started, ended : float or None
        Seconds since the epoch.
    exit_code : int or None
        Of the command; None where it did not end by itself.
    message : str
        What the cluster says of the status, of a failed job with the end of its log; without credentials.
    stop_wait : float
        Seconds that it has to end in when it is stopped.
    """

    id: str
    status: str
    entrypoint: str
    metadata: dict[str, str]
    started: float | None
    ended: float | None
    exit_code: int | None
    message: str
    stop_wait: float

    @property
    def over(self) -> bool:
        """Whether it has ended, one way or another."""
        return self.status in _OVER

    @property
    def code(self) -> int:
        """What a command that waited for the job exits with: 0, the job's own code, or 130 where it was stopped."""
        if self.status == "SUCCEEDED":
            return 0
        return 130 if self.status == "STOPPED" else self.exit_code or 1

    @property
    def last_line(self) -> str:
        """The last line of the message that says something."""
        lines = [line.strip() for line in self.message.splitlines() if line.strip()]
        return lines[-1] if lines else ""
