"""A Ray session: quiet, ended by whoever began it."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray

from pipeline.cluster.causes import another_token, one_line
from pipeline.cluster.in_job import job_environment
from pipeline.cluster.spec import ClusterSpec
from pipeline.errors import ConfigError, UserError

# Linux takes 107 bytes for a Unix socket's path; Ray adds up to 66 of its own (session name, process id, file name).
_LONGEST_TEMP_DIR = 40

_WATCH_S = 5.0  # between two looks at whether the head answers; the second in vain is told

_ALWAYS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # workers without a GPU see none; naming it silences a FutureWarning
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean the same on a worker as in the driver
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # Ray's 60 s are not enough for processes that import torch where the processors have other work to do.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON and TensorBoard copies of every row
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is the caller's
    "TUNE_GLOBAL_CHECKPOINT_S": "600",  # rows persist through the caller; Tune's own state is not resumed from
}
_QUIET = {
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_THRESHOLD_S": "60",
}
# A controller polls its workers at this interval, and a worker's reports wait for the poll: Ray's 2 s would hold up a
# loop that reports more often. The preemption watcher (one more process) looks for nodes being drained: on one's own
# machine there are none.
_LOCAL = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_worker_niceness": "0",  # Ray's 15 lets anything else that runs on the machine starve the workers
}
_REMOTE = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
# Where a head is lost, the driver's native code writes a line a second for a minute, and then ends the process.
_QUIET_REMOTE = {"RAY_BACKEND_LOG_LEVEL": "fatal"}

# What a driver's environment says about how its workers compute; no credentials.
_PROPAGATED = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "CUBLAS_WORKSPACE_CONFIG",
    "NCCL_DEBUG",
    "NCCL_SOCKET_IFNAME",
    "GLOO_SOCKET_IFNAME",
)
# In a job's own command these are Ray's choice for a process without processors of its own: one thread. Workers get as
# many threads as processors.
_OF_THE_COMMAND = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

# [2026-11-30 21:24:40,256 W 12991 12991] gcs_client.cc:210: …
_NATIVE = re.compile(r"\[[^]]*\] \w+\.cc:\d+: ")

_active: ClusterSpec | None = None


@contextlib.contextmanager
def session(spec: ClusterSpec, verbose: bool = False) -> Iterator[None]:
    """Connect to the cluster, or start a local Ray, for the length of the block.

    Where this process is connected already, that connection serves and stays. Ray's own output (logs, progress tables,
    banners, the workers' prints) is shown only when `verbose`.

    Parameters
    ----------
    spec : ClusterSpec
        Where the work runs.
    verbose : bool
        Show Ray's output.

    Raises
    ------
    UserError
        When the cluster can't be reached or the local Ray does not start.
    """
    global _active
    if ray.is_initialized():
        yield
        return
    values = _ALWAYS | (_LOCAL if spec.local else _REMOTE)
    if not verbose:
        values |= _QUIET if spec.local else _QUIET | _QUIET_REMOTE
    with _environment(values), _same_modules(spec):
        try:
            with calm(verbose):
                _connect(spec, verbose)
            _active = spec
            with (
                contextlib.nullcontext() if verbose else _no_notices(),
                contextlib.nullcontext() if spec.local else _watched_head(str(spec.address)),
            ):
                yield
        finally:
            _active = None
            ray.shutdown()


def active() -> ClusterSpec:
    """Return the settings of the session this process is in.

    Raises
    ------
    RuntimeError
        Outside of a session.
    """
    if not ray.is_initialized():
        raise RuntimeError("no Ray session; wrap the call in `with session(spec)`")
    return _active or ClusterSpec(address="auto")  # someone else's connection: assume nothing about it


@contextlib.contextmanager
def calm(verbose: bool) -> Iterator[None]:
    """Keep what Ray's own modules warn of (deprecations among themselves) from the user; other warnings stay."""
    with warnings.catch_warnings():
        if not verbose:
            warnings.filterwarnings("ignore", module=r"ray(\.|$)")
        yield


def beside(resources: dict[str, float], count: int, most: int | None = None) -> int:
    """Return how many of `count` calls with these resources run side by side now, `most` at most; at least 1."""
    if not ray.is_initialized():  # nobody else is there to be called
        return 1
    return max(min(slots(resources), count, most or count), 1)


def slots(resources: dict[str, float]) -> int:
    """Return how many times `resources` fit on the cluster's nodes as they are now.

    Raises
    ------
    UserError
        When they do not fit once and the cluster does not add nodes.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    wanted = {key: value for key, value in resources.items() if value > 0} or {"CPU": 1}
    count = sum(int(min(node.get(key, 0) / value for key, value in wanted.items()) + 1e-9) for node in nodes)
    if count == 0 and not active().autoscaling:
        raise UserError(
            f"{describe(wanted)} asked for, but no node of the cluster has that much "
            f"({describe(_largest(nodes))} at most); ask for less, or raise cluster.num_cpus / cluster.num_gpus"
        )
    return count


def describe(resources: dict[str, float]) -> str:
    """Write resources as a person would: ``4 CPU, 1 GPU``."""
    return ", ".join(f"{value:g} {key}" for key, value in resources.items()) or "nothing"


def _largest(nodes: list[dict[str, float]]) -> dict[str, float]:
    return {
        key: max(node.get(key, 0) for node in nodes) for key in ("CPU", "GPU") if any(key in node for node in nodes)
    }


def _connect(spec: ClusterSpec, verbose: bool) -> None:
    options: dict[str, Any] = {
        "log_to_driver": verbose,
        "logging_level": logging.INFO if verbose else logging.CRITICAL,
        "configure_logging": True,
    }
    if spec.local:
        options |= {
            "address": "local",
            "num_cpus": spec.num_cpus,
            "num_gpus": spec.num_gpus,
            "include_dashboard": False,
            "_temp_dir": _temp_dir(spec.temp_dir),
        }
        if spec.object_store_mb is not None:
            options["object_store_memory"] = spec.object_store_mb * 2**20
        if spec.runtime_env:
            options["runtime_env"] = spec.runtime_env
    else:
        _knock(str(spec.address))
        options |= {"address": spec.address, "runtime_env": _runtime_env(spec)}
    told = ""
    try:
        with _same_sigterm(), _native_lines(verbose or spec.local) as lines:
            try:
                ray.init(**options)
            finally:
                told = lines()
    except Exception as error:
        if spec.local:
            raise UserError(f"cluster: the local Ray did not start ({one_line(error)}); -v shows its log") from error
        if "InvalidAuthToken" in told:
            raise another_token(f"cluster.address {spec.address!r}") from error
        raise UserError(
            f"cluster.address {spec.address!r} can't be reached ({one_line(error)}); "
            "check it, or leave it out for a local Ray"
        ) from error


def _runtime_env(spec: ClusterSpec) -> dict[str, Any]:
    """Return what the workers get beside what the job gave them, if there is one: Ray takes nothing from both.

    Raises
    ------
    ConfigError
        When the settings name what the job has, too.
    """
    given = job_environment()
    variables = given.get("env_vars") or {}
    asked = spec.runtime_env.get("env_vars", {})
    twice = [key for key in spec.runtime_env if key in given and key != "env_vars"]
    twice += [f"env_vars.{key}" for key in asked if key in variables]
    if twice:
        raise ConfigError(
            f"cluster.runtime_env.{twice[0]}: the job's runtime environment has it, too; keep one of them"
        )
    carried = {
        key: os.environ[key] for key in _PROPAGATED if key in os.environ and not (given and key in _OF_THE_COMMAND)
    }
    ours = {key: value for key, value in (_ALWAYS | carried).items() if key not in variables}
    return spec.runtime_env | {"env_vars": ours | asked}


@contextlib.contextmanager
def _native_lines(shown: bool) -> Iterator[Callable[[], str]]:
    """Hold back what Ray's native code writes past Python, a line a second, while it fails to connect.

    Yields what returns it. Lines of others are written out at the end.
    """
    own = None
    if not shown:
        with contextlib.suppress(OSError):  # where there is no error stream
            own = os.dup(2)
    if own is None:
        yield lambda: ""
        return
    with tempfile.TemporaryFile() as held:

        def told() -> str:
            return os.pread(held.fileno(), 2**20, 0).decode(errors="replace")

        sys.stderr.flush()
        os.dup2(held.fileno(), 2)
        try:
            yield told
        finally:
            sys.stderr.flush()
            os.dup2(own, 2)
            os.close(own)
            for line in told().splitlines():
                if not _NATIVE.match(line):
                    print(line, file=sys.stderr)


@contextlib.contextmanager
def _same_sigterm() -> Iterator[None]:
    """Leave SIGTERM to whoever handles it: Ray would end the process without a word."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _watched_head(address: str) -> Iterator[None]:
    """Say when the head is gone: Ray itself waits for a minute, then ends this process whatever it is in."""
    if not address.startswith("ray://"):
        address = ray.get_runtime_context().gcs_address
    ended = threading.Event()

    def watch() -> None:
        missed = 0
        while not ended.wait(_WATCH_S):
            try:
                _touch(address)
            except OSError:
                missed += 1
                if missed == 2:
                    print(
                        f"cluster: its head at {address} does not answer. If it is lost, Ray ends this process within "
                        "a minute; the same command goes on where it was, on this cluster or another one.",
                        file=sys.stderr,
                        flush=True,
                    )
            else:
                if missed >= 2:
                    print("cluster: its head answers again", file=sys.stderr, flush=True)
                missed = 0

    thread = threading.Thread(target=watch, name="head", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _touch(address: str) -> None:
    """Connect to a port and close it again; OSError where that can't be done."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if separator and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()


def _knock(address: str) -> None:
    """Try the address's port first: Ray itself retries for a minute and logs each time."""
    try:
        _touch(address)
    except OSError as error:
        raise UserError(
            f"cluster.address {address!r} can't be reached ({error.strerror or error}); "
            "check it, or leave it out for a local Ray"
        ) from None


def _temp_dir(chosen: str | None) -> str | None:
    if chosen is not None:
        path = str(Path(chosen).absolute())
        if len(path.encode()) > _LONGEST_TEMP_DIR:
            raise ConfigError(
                f"cluster.temp_dir {path!r} is too long for a Unix socket ({_LONGEST_TEMP_DIR} bytes at most); "
                "choose a shorter one"
            )
        return path
    default = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    if len(default.encode()) + len("/ray") <= _LONGEST_TEMP_DIR:
        return None
    return f"/tmp/faculty-ray-{os.getuid()}"


@contextlib.contextmanager
def _same_modules(spec: ClusterSpec) -> Iterator[None]:
    """Let local workers import what this process can; on other machines that is the runtime environment's task."""
    if not spec.local:
        yield
        return
    before = os.environ.get("PYTHONPATH")
    own = [str(Path(entry).absolute()) for entry in sys.path if not entry.startswith((sys.prefix, sys.base_prefix))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(own))
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


@contextlib.contextmanager
def _no_notices() -> Iterator[None]:
    """Keep the cluster's notices (a worker died, a task is repeated) off the output; ``log_to_driver`` does not."""
    from ray._private import worker

    before = getattr(worker, "_worker_logs_enabled", True)
    worker._worker_logs_enabled = False
    try:
        yield
    finally:
        worker._worker_logs_enabled = before


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set the variables that are not set, and take them back."""
    added = [key for key in values if key not in os.environ]
    os.environ.update({key: values[key] for key in added})
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)
