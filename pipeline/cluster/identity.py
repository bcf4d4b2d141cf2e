"""What this process is to the cluster that it is connected to: names to find it again by."""

from __future__ import annotations

import json
import os

import ray

_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def about_job() -> dict[str, str]:
    """Return the job's identifiers and the cluster's size.

    Returns
    -------
    dict of str to str
        ``ray.version``, ``ray.job_id``, ``ray.submission_id`` (of `ray job submit`), ``ray.nodes``, ``ray.cpus`` and
        ``ray.gpus``; empty outside of a session, and without those that do not apply.
    """
    if not ray.is_initialized():
        return {}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    found = {
        "ray.version": ray.__version__,
        "ray.job_id": ray.get_runtime_context().get_job_id(),
        "ray.submission_id": _submission_id(),
        "ray.nodes": str(len(nodes)),
        "ray.cpus": f"{sum(node.get('CPU', 0) for node in nodes):g}",
        "ray.gpus": f"{sum(node.get('GPU', 0) for node in nodes):g}",
    }
    return {name: value for name, value in found.items() if value}


def _submission_id() -> str:
    """Return what `ray job submit` calls the job; Ray hands it to the driver in its environment."""
    try:
        return str(json.loads(os.environ[_JOB_CONFIG])["metadata"]["job_submission_id"])
    except (KeyError, ValueError, TypeError):
        return ""
