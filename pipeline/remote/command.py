"""What the commands `submit`, `jobs`, `logs` and `stop` do."""

from __future__ import annotations

import datetime
import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.errors import Interrupted, UserError
from pipeline.report.console import Display
from pipeline.tracking.redact import redact

if TYPE_CHECKING:
    from pipeline.cluster.job_request import Job, JobRequest
    from pipeline.cluster.jobs import JobServer
    from pipeline.remote.request import Options

_PATIENCE_S = 15.0
_MARGIN_S = 15.0  # beyond what a job has to end in
_FOR_EVER = float("inf")
_COLOURS = {"SUCCEEDED": "green", "FAILED": "red", "STOPPED": "yellow", "RUNNING": "cyan"}


def submit_run(
    config: Sequence[Path],
    overrides: Sequence[str],
    options: Options,
    *,
    address: str | None = None,
    detach: bool = False,
    resume: str | None = None,
    display: Display | None = None,
) -> int:
    """Submit a run as a job, or a former job again, and follow it; return the exit code.

    Parameters
    ----------
    config, overrides, options
        See `pipeline.remote.request.make_request`. With `resume` there are no settings: they are the former job's.
    address : str, optional
        See `pipeline.cluster.jobs.JobServer`.
    detach : bool
        Return as soon as the cluster has the job.
    resume : str, optional
        A former job, whose command, folder and environment are used again. Stages are keyed by what they depend on, so
        that it goes on where that one stopped.
    display : Display, optional

    Returns
    -------
    int
        The job's own exit code; 130 where it was stopped, or the user left it with Ctrl-C; with `detach` 0.

    Raises
    ------
    UserError
        For bad settings, files that do not travel, a cluster that does not answer.
    """
    display = display or Display()
    if resume is not None and (config or overrides):
        raise UserError("--resume takes the settings of the former job; leave -c and overrides out, or submit anew")
    try:
        if resume is None:
            request, size = _new(config, overrides, options, display)
            server = _connect(address, display)
        else:
            server = _connect(address, display)
            request, size = _again(server, resume, options, display)
        with display.working(f"uploading {size}"):
            job_id = server.submit(request)
    except KeyboardInterrupt:
        raise Interrupted(
            "interrupted before the job was known to be there; faculty jobs lists those that are"
        ) from None
    about = request.metadata
    named = f"{about.get('faculty.run', '')} {about.get('faculty.stage', '')}".strip() or request.entrypoint
    display.note(f"submitted [bold]{job_id}[/]  {escape(named)}  ({size})")
    if detach:
        for line in _ways(job_id, address):
            display.note(line)
        return 0
    return follow(server, job_id, display, address)


def follow(server: JobServer, job_id: str, display: Display, address: str | None = None) -> int:
    """Show what a job prints until it ends; return its exit code. Ctrl-C leaves it running."""
    shown = display.console

    def show(text: str) -> None:
        shown.print(text, end="", markup=False, highlight=False, soft_wrap=True)

    try:
        with display.working("waiting for the cluster to start the job"):
            job = server.wait(job_id, lambda job: job.status != "PENDING", _PATIENCE_S)
        if job.status == "PENDING":
            display.note(f"not started yet: {escape(job.last_line or 'pending')}")
            with display.working("waiting for the cluster to start the job"):
                server.wait(job_id, lambda job: job.status != "PENDING", _FOR_EVER)
        job = server.follow(job_id, show)
    except KeyboardInterrupt:
        display.note(f"detached, job {job_id} goes on; {' · '.join(_ways(job_id, address)[:2])}")
        return 130
    _say_end(job, display, address)
    return job.code


def show_jobs(address: str | None, as_json: bool, display: Display | None = None) -> None:
    """List the submitted jobs of a cluster, the newest first."""
    display = display or Display(Console(stderr=True, highlight=False) if as_json else None)
    found = _connect(address, display).jobs()
    if as_json:
        print(json.dumps([_plain(job) for job in found], indent=1, ensure_ascii=False))
        return
    if not found:
        display.note("no job has been submitted to this cluster")
        return
    shown = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    shown.add_column("job", no_wrap=True)
    shown.add_column("run")
    shown.add_column("stage")
    shown.add_column("status", no_wrap=True)
    shown.add_column("began", no_wrap=True)
    shown.add_column("took", justify="right", no_wrap=True)
    shown.add_column("last line", overflow="ellipsis", no_wrap=True)
    for job in found:
        about = job.metadata
        failed = job.last_line if job.status == "FAILED" else ""
        status = f"[{_COLOURS.get(job.status, 'default')}]{job.status.lower()}[/]"
        run, stage = about.get("faculty.run", ""), about.get("faculty.stage", "")
        shown.add_row(job.id, escape(run), escape(stage), status, _when(job.started), _took(job), escape(failed))
    display.table(shown)


def show_logs(job_id: str, address: str | None, following: bool, display: Display | None = None) -> int:
    """Print what a job has printed; with `following` until it ends, and return its exit code."""
    display = display or Display()
    server = _connect(address, display)
    if following:
        server.job(job_id)
        return follow(server, job_id, display, address)
    text = server.log(job_id)
    if text:
        display.console.print(text, end="", markup=False, highlight=False, soft_wrap=True)
    else:
        display.note(f"job {job_id} has printed nothing yet ({server.job(job_id).status.lower()})")
    return 0


def stop_job(job_id: str, address: str | None, display: Display | None = None) -> None:
    """End a job so that it can go on later, and wait until it has ended.

    Raises
    ------
    UserError
        When there is no such job, or it is over already.
    """
    display = display or Display()
    server = _connect(address, display)
    job = server.job(job_id)
    if job.over:
        raise UserError(f"job {job_id} is over already ({job.status.lower()}); there is nothing to stop")
    server.stop(job_id)
    with display.working(f"waiting for the job to end, {job.stop_wait:.0f} s at most"):
        job = server.wait(job_id, lambda job: job.over, job.stop_wait + _MARGIN_S)
    if not job.over:
        display.warn(f"job {job_id} was asked to stop and has not ended yet; faculty jobs shows when it has")
        return
    _say_end(job, display, address)


def _new(
    config: Sequence[Path], overrides: Sequence[str], options: Options, display: Display
) -> tuple[JobRequest, str]:
    from pipeline.remote.request import make_request

    with display.working("checking the settings and what travels"):
        request, folder = make_request(config, overrides, options)
    _warn_of_tracking(request, display)
    return request, f"{len(folder.files)} files, {sum(folder.files.values()) / 1e6:.1f} MB"


def _again(server: JobServer, job_id: str, options: Options, display: Display) -> tuple[JobRequest, str]:
    from pipeline.remote.request import pack, with_variables

    root = options.working_dir.resolve()
    request, there = server.former(job_id, root)
    size = f"goes on from {job_id}"
    if not there:
        folder = pack(root, request.runtime_env)
        size = f"{len(folder.files)} files, {sum(folder.files.values()) / 1e6:.1f} MB"
        display.warn(
            f"the cluster has deleted the folder of {job_id}; {escape(str(root))} as it is now takes its place"
        )
    return replace(request, runtime_env=with_variables(request.runtime_env, options.env)), size


def _warn_of_tracking(request: JobRequest, display: Display) -> None:
    """Say that a tracking server of this environment does not travel by itself."""
    name = "MLFLOW_TRACKING_URI"
    given = name in request.runtime_env.get("env_vars", {}) or "tracking.uri=" in request.entrypoint
    if os.environ.get(name) and not given:
        display.warn(f"{name} is set here and does not travel; pass it with --env {name}, unless tracking.uri is set")


def _connect(address: str | None, display: Display) -> JobServer:
    with display.working("connecting to the cluster"):
        from pipeline.cluster.jobs import JobServer

        return JobServer(address)


def _ways(job_id: str, address: str | None) -> list[str]:
    """Say how to follow, stop and resume a job."""
    place = f" --address {redact(address)}" if address else ""
    return [
        f"follow: faculty logs {job_id} --follow{place}",
        f"stop: faculty stop {job_id}{place}",
        f"go on after a stop: faculty submit --resume {job_id}{place}",
    ]


def _say_end(job: Job, display: Display, address: str | None) -> None:
    if job.status == "SUCCEEDED":
        display.note(f"[green]job {job.id} succeeded[/] after {_took(job)}")
    elif job.status == "STOPPED":
        display.warn(f"job {job.id} was stopped; {_ways(job.id, address)[2]}")
    elif job.exit_code is None:
        display.warn(f"job {job.id} failed: {escape(job.last_line)}")
    else:
        display.warn(f"job {job.id} failed with exit code {job.exit_code}; {_ways(job.id, address)[2]}")


def _plain(job: Job) -> dict[str, Any]:
    return {
        "id": job.id,
        "status": job.status,
        "run": job.metadata.get("faculty.run"),
        "stage": job.metadata.get("faculty.stage"),
        "metadata": job.metadata,
        "started": _iso(job.started),
        "ended": _iso(job.ended),
        "exit_code": job.exit_code,
        "entrypoint": job.entrypoint,
        "last_line": job.last_line,
    }


def _iso(at: float | None) -> str | None:
    return None if at is None else datetime.datetime.fromtimestamp(at, datetime.UTC).isoformat(timespec="seconds")


def _when(at: float | None) -> str:
    return "" if at is None else datetime.datetime.fromtimestamp(at).strftime("%d %b %H:%M")


def _took(job: Job) -> str:
    if job.started is None:
        return ""
    seconds = round((job.ended or time.time()) - job.started)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
