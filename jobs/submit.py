"""Command `submit`: a run as a job of a Ray cluster. Also `python -m jobs.submit -c run.yaml run_dir=/shared/run`."""

from __future__ import annotations

from pathlib import Path

import typer

from jobs import options as o
from jobs.shell import Config, Overrides, Verbose, main


def submit(
    overrides: Overrides = None, config: Config = None, stage: o.Stage = "run", working_dir: o.WorkingDir = Path(),
    runtime_env: o.RuntimeEnv = None, env: o.Env = None, shared: o.Shared = None, entrypoint_num_cpus: o.Cpus = 0.0,
    entrypoint_num_gpus: o.Gpus = 0.0, entrypoint_memory_gb: o.MemoryGb = 0.0, address: o.Address = None,
    detach: o.Detach = False, resume: o.Resume = None, verbose: Verbose = False,
) -> None:  # fmt: skip
    """Upload the working folder, run there what `run` runs here, and follow it; exits as the job does."""
    from pipeline.remote.command import submit_run
    from pipeline.remote.request import Options

    own = (entrypoint_num_cpus, entrypoint_num_gpus, entrypoint_memory_gb)
    options = Options(stage, working_dir, runtime_env, env or [], shared or [], *own, verbose)
    raise typer.Exit(submit_run(config or [], overrides or [], options, address=address, detach=detach, resume=resume))


if __name__ == "__main__":
    main(submit)
