"""Jobs of a Ray cluster, through Ray's Jobs SDK: submit, list, follow, stop, submit again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import aiohttp
import requests
from ray._private import ray_constants
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.runtime_env import packaging
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient, JobType

from pipeline.cluster.causes import another_token
from pipeline.cluster.job_request import STOP_WAIT, Job, JobRequest
from pipeline.errors import FacultyError, UserError
from pipeline.tracking.redact import one_line, redact

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # Ray lets them override what it is given
_KNOCK_S = 5.0
_POLL_S = 0.5
_RECONNECTS = 10
_RAYS_STOP_WAIT_S = 3.0
_KEPT = ("entrypoint_num_cpus", "entrypoint_num_gpus", "entrypoint_memory")  # the cluster does not tell them again
_LOST = (requests.RequestException, aiohttp.ClientError, OSError, RuntimeError, AuthenticationError)


class JobServer:
    """The dashboard of a cluster, which takes jobs.

    Parameters
    ----------
    address : str, optional
        ``http(s)://host:port`` of the dashboard, ``auto``, ``host:port`` of the cluster or ``ray://host:port``.
        Default: ``RAY_API_SERVER_ADDRESS``, ``RAY_ADDRESS``, else the dashboard of this machine.

    Raises
    ------
    UserError
        When nothing answers there, or it asks for another token than that of this environment.
    """

    def __init__(self, address: str | None = None) -> None:
        given = address or next(filter(None, map(os.environ.get, _ADDRESSES)), DEFAULT_ADDRESS)
        self.address = redact(given)
        try:
            url = _with_scheme(given)
            _knock(url)
            with _without(_ADDRESSES), _quiet():
                self._client = _open(url)
        except AuthenticationError:
            raise another_token(self.address) from None
        except Exception as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
            raise UserError(
                f"no Ray dashboard answers at {self.address} ({why}); give --address http://HEAD:8265, or set "
                "RAY_API_SERVER_ADDRESS"
            ) from None

    def submit(self, request: JobRequest) -> str:
        """Upload the working folder, unless the cluster has this very content already, and submit; return the id.

        Raises
        ------
        FacultyError
            When the cluster refuses it.
        """
        given = (request.num_cpus, request.num_gpus, request.memory)
        own: dict[str, Any] = {key: value for key, value in zip(_KEPT, given, strict=True) if value}
        try:
            with _without(_ADDRESSES), _quiet():
                return self._client.submit_job(
                    entrypoint=request.entrypoint,
                    runtime_env=request.runtime_env,
                    metadata=request.metadata | {f"faculty.{key}": str(value) for key, value in own.items()},
                    **own,
                )
        except (*_LOST, ValueError, TypeError) as error:
            raise FacultyError(f"{self.address} does not take the job: {_told(error)}") from None

    def job(self, job_id: str) -> Job:
        """Return what the cluster says of a job.

        Raises
        ------
        UserError
            When there is no such job, or it was not submitted as one.
        """
        return _job(self._details(job_id))

    def jobs(self) -> list[Job]:
        """Return all submitted jobs, the newest first."""
        try:
            found = self._client.list_jobs()
        except _LOST as error:
            self._fail(error)
        return sorted(
            (_job(item) for item in found if item.type == JobType.SUBMISSION),
            key=lambda item: item.started or 0,
            reverse=True,
        )

    def log(self, job_id: str) -> str:
        """Return what a job has printed up to now, without credentials in its URIs."""
        self._details(job_id)
        try:
            return redact(self._client.get_job_logs(job_id))
        except _LOST as error:
            self._fail(error)

    def stop(self, job_id: str) -> None:
        """Ask a job to end: it gets SIGTERM, and SIGKILL where it has not ended after its `stop_wait`."""
        try:
            self._client.stop_job(job_id)
        except _LOST as error:
            self._fail(error)

    def wait(self, job_id: str, reached: Callable[[Job], bool], seconds: float) -> Job:
        """Return the job as soon as a condition holds, or as it is after some seconds."""
        deadline = time.monotonic() + seconds
        while True:
            job = self.job(job_id)
            if reached(job) or time.monotonic() > deadline:
                return job
            time.sleep(_POLL_S)

    def follow(self, job_id: str, show: Callable[[str], None]) -> Job:
        """Hand on what a job prints, from its first line on, until it has ended; return how it ended.

        A connection that breaks is made anew, and nothing is shown twice.

        Raises
        ------
        FacultyError
            When the cluster stays away. The job may go on.
        """
        shown, failures = 0, 0
        while True:
            before = shown
            try:
                with _without(_ADDRESSES), _quiet():
                    shown = asyncio.run(self._tail(job_id, shown, show))
                job = self.job(job_id)
                if job.over:
                    return job
            except UserError:
                raise
            except (*_LOST, _Away, FacultyError) as error:
                shown = max(shown, getattr(error, "shown", 0))
                failures = 0 if shown > before else failures + 1
                if failures == _RECONNECTS:
                    raise FacultyError(
                        f"{self.address} does not answer any more ({_told(error)}); the job may go on: "
                        f"faculty logs {job_id} --follow"
                    ) from None
            time.sleep(1)

    def former(self, job_id: str, folder: Path) -> tuple[JobRequest, bool]:
        """Return the request to run a job again, and whether the folder it was uploaded with is still there.

        Parameters
        ----------
        job_id : str
            Of a job that is over.
        folder : Path
            The working folder that takes the place of the uploaded one where the cluster has deleted that.

        Raises
        ------
        UserError
            When there is no such job, or it is not over.
        """
        details = self._details(job_id)
        if not details.status.is_terminal():
            raise UserError(
                f"job {job_id} is {str(details.status).lower()}; follow it with faculty logs {job_id} --follow, or end "
                f"it with faculty stop {job_id}"
            )
        runtime_env = {key: value for key, value in (details.runtime_env or {}).items() if not key.startswith("_")}
        there = self._has(runtime_env.get("working_dir"))
        if not there:
            runtime_env["working_dir"] = str(folder)
        metadata = dict(details.metadata or {})
        own = [float(metadata.pop(f"faculty.{key}", 0)) for key in _KEPT]
        metadata = {key: value for key, value in metadata.items() if not key.startswith("job_")}  # Ray sets these anew
        request = JobRequest(
            entrypoint=details.entrypoint,
            runtime_env=runtime_env,
            metadata=metadata | {"faculty.resumes": job_id},
            num_cpus=own[0],
            num_gpus=own[1],
            memory=int(own[2]),
        )
        return request, there

    def _has(self, uri: str | None) -> bool:
        if uri is None or not uri.startswith("gcs://"):
            return True  # nothing was uploaded
        try:
            return self._client._package_exists(uri)
        except _LOST as error:
            self._fail(error)

    async def _tail(self, job_id: str, shown: int, show: Callable[[str], None]) -> int:
        position = 0
        try:
            async for text in self._client.tail_job_logs(job_id):
                start, position = position, position + len(text)
                if position > shown:
                    show(redact(text[max(shown - start, 0) :]))
                    shown = position
        except _LOST as error:
            raise _Away(_told(error), shown) from None
        return shown

    def _details(self, job_id: str) -> JobDetails:
        try:
            details = self._client.get_job_info(job_id)
        except _LOST as error:
            self._fail(error, job_id)
        if details.type != JobType.SUBMISSION:
            raise UserError(f"{job_id} was not submitted as a job; faculty jobs lists those that were")
        return details

    def _fail(self, error: Exception, job_id: str = "") -> NoReturn:
        if "does not exist" in str(error):
            raise UserError(f"there is no job {job_id} on {self.address}; faculty jobs lists them") from None
        raise FacultyError(f"{self.address}: {_told(error)}") from None


class _Away(Exception):
    """The connection broke after so many characters."""

    def __init__(self, message: str, shown: int) -> None:
        super().__init__(message)
        self.shown = shown


def packed(folder: Path, excludes: list[str]) -> dict[str, int]:
    """Return the files that Ray would upload, by their path in the folder, and their sizes in bytes.

    Parameters
    ----------
    folder : Path
    excludes : list of str
        In the syntax of ``.gitignore``; the folder's own ``.gitignore`` and ``.rayignore`` files count, too.
    """
    files: dict[str, int] = {}

    def take(path: Path) -> None:
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = path.stat().st_size

    left_out = packaging._get_excludes(folder, [*ray_constants.get_runtime_env_default_excludes(), *excludes])
    gitignore = os.environ.get(ray_constants.RAY_RUNTIME_ENV_IGNORE_GITIGNORE) != "1"
    with _quiet():
        packaging._dir_travel(folder, [left_out], take, include_gitignore=gitignore)
    return files


def most_bytes() -> int:
    """Return how much a working folder may hold, packed, for the cluster to take it."""
    return packaging.GCS_STORAGE_MAX_SIZE


def _job(details: JobDetails) -> Job:
    environment = (details.runtime_env or {}).get("env_vars") or {}
    try:
        stop_wait = float(environment.get(STOP_WAIT, _RAYS_STOP_WAIT_S))
    except ValueError:
        stop_wait = _RAYS_STOP_WAIT_S
    started, ended = (None if at is None else at / 1000 for at in (details.start_time, details.end_time))
    return Job(
        id=details.submission_id or "",
        status=str(details.status),
        entrypoint=redact(details.entrypoint),
        metadata={key: redact(value) for key, value in (details.metadata or {}).items()},
        started=started,
        ended=ended,
        exit_code=details.driver_exit_code,
        message=redact(details.message or ""),
        stop_wait=stop_wait,
    )


def _told(error: Exception) -> str:
    """Return what the server said: the last line of its traceback, where it sent one."""
    text = str(error).removeprefix("Request failed with status code ").rstrip(". \n")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return one_line(RuntimeError(lines[-1])) if lines else type(error).__name__


def _with_scheme(address: str) -> str:
    """Take ``host:port`` for the dashboard's where one answers; Ray takes it for that of the cluster itself."""
    if "://" in address or address == "auto":
        return address
    with contextlib.suppress(requests.RequestException):
        requests.get(f"http://{address}/api/version", timeout=_KNOCK_S)  # whatever it says, it speaks HTTP
        return f"http://{address}"
    return address


def _open(url: str) -> JobSubmissionClient:
    """Connect; the token of this environment is handed over only to a cluster that asks for one."""
    try:
        return JobSubmissionClient(url)
    except AuthenticationError:
        if not maybe_enable_token_auth_if_token_available(warn_if_disabled=False):
            raise
        return JobSubmissionClient(url)


def _knock(address: str) -> None:
    """Try the port first: Ray would wait for a minute and more."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    if address != "auto" and parts.hostname:
        port = parts.port or {"https": 443, "http": 80}.get(parts.scheme)
        if port is not None:
            socket.create_connection((parts.hostname, port), timeout=_KNOCK_S).close()


@contextlib.contextmanager
def _without(names: tuple[str, ...]) -> Iterator[None]:
    """Take variables out of the environment for the length of the block."""
    before: Mapping[str, Any] = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what Ray logs of uploads and addresses off the terminal; what matters comes back as an error."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
