"""Options of the commands that talk to a cluster's jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Job = Annotated[str, typer.Argument(metavar="JOB_ID", help="As `faculty jobs` shows it.", show_default=False)]
Address = Annotated[
    str | None, typer.Option(help="Of the dashboard. Default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, here.")
]
AsJson = Annotated[bool, typer.Option("--json", help="For machines.")]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Until the job ends; Ctrl-C leaves it running.")]
Stage = Annotated[str, typer.Option(help="The last stage to run, or run: all.")]
WorkingDir = Annotated[Path, typer.Option(help="The folder that travels with the job.")]
RuntimeEnv = Annotated[Path | None, typer.Option(help="Ray's. Default: conf/runtime_env.yaml of the folder.")]
Env = Annotated[list[str] | None, typer.Option(metavar="NAME", help="Variable to pass with the value it has here.")]
Shared = Annotated[list[Path] | None, typer.Option(help="A folder that every node sees under this path.")]
Cpus = Annotated[float, typer.Option(help="Processors for the command itself; 0: it runs on the head.")]
Gpus = Annotated[float, typer.Option(help="GPUs for the command itself.")]
MemoryGb = Annotated[float, typer.Option(help="Memory for the command itself, GB.")]
Detach = Annotated[bool, typer.Option("--detach", help="Return at once, without following the job.")]
Resume = Annotated[str | None, typer.Option(metavar="JOB_ID", help="Run a job again that has ended: it goes on.")]
