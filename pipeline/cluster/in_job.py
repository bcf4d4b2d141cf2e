"""What a process can know of the cluster job that it runs in. Imports no ray."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError

_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray names the variable like its own constant
_COPY = ("runtime_resources", "working_dir_files")  # where Ray unpacks an uploaded folder


def job_id() -> str | None:
    """Return the id that the job was submitted under; None outside of a job."""
    return _config().get("metadata", {}).get("job_submission_id")


def job_environment() -> dict[str, Any]:
    """Return the runtime environment that the job gave to all of its processes; empty outside of a job."""
    return _config().get("runtime_env") or {}


def refuse_passing_folder(run_dir: str) -> None:
    """Refuse a run folder that goes away with the job.

    Raises
    ------
    ConfigError
        When it lies in the copy of the working folder that Ray unpacked for this job: no other node sees it, and Ray
        deletes it when the job has ended.
    """
    if not _config() or "://" in run_dir:
        return
    parts = Path(os.path.abspath(run_dir)).parts
    if any(parts[index : index + 2] == _COPY for index in range(len(parts))):
        raise ConfigError(
            f"run_dir {run_dir}: lies in the job's copy of the working folder, which is deleted when the job has "
            "ended; give an absolute path that every node sees, or a URI: run_dir=/shared/runs/NAME"
        )


def _config() -> dict[str, Any]:
    text = os.environ.get(_CONFIG)
    return json.loads(text) if text else {}
