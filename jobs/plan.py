"""Command `plan`: what a run will take, before it runs. Also `python -m jobs.plan -c run.yaml`."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.shell import Config, Overrides, main

Cluster = Annotated[str | None, typer.Option(help="Nodes that it is for: gpus=8,gpu_mem=80,cpus=64,mem=256,nodes=4")]
Price = Annotated[float | None, typer.Option(help="Of a GPU, an hour.")]
Calibrate = Annotated[bool | None, typer.Option(help="Measure now, or take what is recorded; default: what there is.")]


def plan(
    overrides: Overrides = None, config: Config = None, cluster: Cluster = None, price: Price = None,
    calibrate: Calibrate = None, as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:  # fmt: skip
    """Say what each stage takes: memory, bytes, seconds, cost; and what stands against running it."""
    from pipeline.planning.command import plan_run

    raise typer.Exit(plan_run(config or [], overrides or [], cluster, price, calibrate, as_json))


if __name__ == "__main__":
    main(plan)
