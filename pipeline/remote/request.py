"""A job made from settings: its command, what travels with it, and what it says of itself."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cluster.job_request import STOP_WAIT, STOP_WAIT_S, JobRequest
from pipeline.errors import ConfigError, UserError
from pipeline.remote.travels import Folder, settings_there
from pipeline.settings_files import load_settings
from pipeline.strict import load_yaml
from pipeline.tracking.redact import redact

STAGES = ("run", "sweep", "ingest", "assess", "select", "amalgamate", "distill", "evaluate", "register")
RUNTIME_ENV = Path("conf") / "runtime_env.yaml"
_EXCLUDES = ("runs", ".env")  # where no runtime environment is given; .git and .venv are left out by Ray itself
_ADDRESS = "cluster.address"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MIB = 2**20


@dataclass(frozen=True)
class Options:
    """How a job is submitted.

    Attributes
    ----------
    stage : str
        The stage up to which it runs, or ``run`` for all.
    working_dir : Path
        The folder that is uploaded.
    runtime_env : Path or None
        File of the runtime environment; None: ``conf/runtime_env.yaml`` of the working folder, where there is one.
    env : sequence of str
        Names of variables whose values are taken from here.
    shared : sequence of Path
        Folders that every node sees under the same path.
    num_cpus, num_gpus, memory_gb : float
        What the command itself takes of the cluster.
    verbose : bool
    """

    stage: str = "run"
    working_dir: Path = Path()
    runtime_env: Path | None = None
    env: Sequence[str] = ()
    shared: Sequence[Path] = ()
    num_cpus: float = 0.0
    num_gpus: float = 0.0
    memory_gb: float = 0.0
    verbose: bool = False


def make_request(config: Sequence[Path], overrides: Sequence[str], options: Options) -> tuple[JobRequest, Folder]:
    """Validate the settings here, as the job will read them there, and return the job and the folder it takes along.

    Parameters
    ----------
    config, overrides
        See `pipeline.settings_files.load_settings`. ``cluster.address`` becomes ``auto``: the cluster that the job
        runs on.
    options : Options

    Raises
    ------
    UserError
        For settings that are not valid, files that do not travel, a folder that is too large, a variable that is not
        set, or credentials in an override. Nothing has been sent.
    """
    if options.stage not in STAGES:
        raise UserError(f"--stage {options.stage}: is none of {', '.join(STAGES)}")
    for text in overrides:
        if redact(text) != text:
            raise ConfigError(
                f"override {redact(text)}: holds credentials, and everybody who sees the cluster's jobs reads the "
                "command; leave them out and pass them with --env, for example --env MLFLOW_TRACKING_PASSWORD"
            )
    settled = [text for text in overrides if text.partition("=")[0] != _ADDRESS] + [f"{_ADDRESS}=auto"]
    load_settings(config, settled)  # whose errors name the files as they were given
    root = options.working_dir.resolve()
    if not root.is_dir():
        raise UserError(f"--working-dir {options.working_dir}: there is no such folder")
    runtime_env = read_runtime_env(options.runtime_env, root)
    folder = pack(root, runtime_env)
    there = settings_there(config, settled, folder, options.shared)
    files = [folder.relative(file) for file in config]
    request = JobRequest(
        entrypoint=entrypoint(options.stage, files, settled, options.verbose),
        runtime_env=with_variables(runtime_env, options.env) | {"working_dir": str(root)},
        metadata=metadata(there, options.stage),
        num_cpus=options.num_cpus,
        num_gpus=options.num_gpus,
        memory=round(options.memory_gb * 1e9),
    )
    return request, folder


def entrypoint(stage: str, files: Sequence[str], overrides: Sequence[str], verbose: bool = False) -> str:
    """Return the job's shell command, every argument quoted."""
    options = [part for file in files for part in ("-c", file)]
    return shlex.join(["python", "-m", f"jobs.{stage}", *options, *(["-v"] if verbose else []), *overrides])


def metadata(settings: dict[str, Any], stage: str) -> dict[str, str]:
    """Return what the job says of itself to everybody who sees the cluster's jobs: no credentials.

    The hash is that of the settings as the job reads them, so that the same job has the same from wherever it was sent.
    """
    from pipeline.stages.artefacts import digest_of

    return {
        "faculty.run": settings["name"],
        "faculty.stage": stage,
        "faculty.run_dir": redact(settings["run_dir"]),
        "faculty.settings": digest_of(redact(json.dumps(settings, sort_keys=True)))[:16],
    }


def read_runtime_env(file: Path | None, root: Path) -> dict[str, Any]:
    """Read Ray's runtime environment from a file, or from the working folder's own where none is named.

    A job that is stopped gets time to store a checkpoint, unless the file says how much.

    Raises
    ------
    ConfigError
        When it can't be read, or does not have the right form.
    """
    given = file or root / RUNTIME_ENV
    data = load_yaml(given) if file is not None or given.is_file() else {"excludes": list(_EXCLUDES)}
    if not isinstance(data, dict):
        raise ConfigError(f"{given}: must hold a mapping (excludes, env_vars, …), got {type(data).__name__}")
    if "working_dir" in data:
        raise ConfigError(f"{given}: `working_dir` is named by --working-dir; leave it out of the file")
    excludes, variables = data.get("excludes") or [], data.get("env_vars") or {}
    if not isinstance(excludes, list) or not all(isinstance(item, str) for item in excludes):
        raise ConfigError(f"{given}: `excludes` must be a list of patterns as in .gitignore")
    if not isinstance(variables, dict) or not all(isinstance(value, str) for value in variables.values()):
        raise ConfigError(f'{given}: `env_vars` must hold texts; put numbers in quotes ("1")')
    return data | {"excludes": excludes, "env_vars": {STOP_WAIT: str(STOP_WAIT_S)} | variables}


def with_variables(runtime_env: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return the runtime environment with the values that some variables have here.

    Raises
    ------
    UserError
        When one is not set, or a value was given with it.
    """
    values = {}
    for name in names:
        if not _NAME.fullmatch(name):
            said = name.partition("=")[0]
            raise UserError(f"--env {said}: give the name alone; the value is taken from this environment")
        if name not in os.environ:
            raise UserError(f"--env {name}: is not set here; export it first")
        values[name] = os.environ[name]
    return runtime_env | {"env_vars": (runtime_env.get("env_vars") or {}) | values}


def pack(root: Path, runtime_env: dict[str, Any]) -> Folder:
    """Find out what of the working folder is uploaded.

    Raises
    ------
    UserError
        When it is more than a cluster takes.
    """
    from pipeline.cluster.jobs import most_bytes, packed

    files = packed(root, runtime_env.get("excludes") or [])
    total = sum(files.values())
    if total > most_bytes():
        sizes: dict[str, int] = {}
        for name, size in files.items():
            top = name.split("/", 1)[0]
            sizes[top] = sizes.get(top, 0) + size
        largest = sorted(sizes, key=lambda top: sizes[top], reverse=True)[:3]
        named = ", ".join(f"{top} {sizes[top] / _MIB:.0f} MiB" for top in largest)
        raise UserError(
            f"the working folder {root} holds {total / _MIB:.0f} MiB, a cluster takes {most_bytes() / _MIB:.0f} MiB "
            f"({named}); leave out what the job does not need (excludes in the runtime environment, .rayignore)"
        )
    return Folder(root, files)
