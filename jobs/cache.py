"""Command `cache`: what is kept of the teachers' outputs. Also `python -m jobs.cache -c run.yaml`."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.shell import Config, Overrides, main


def cache(
    config: Config = None,
    overrides: Overrides = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read all of it, and delete what is damaged.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Bring the cache of teacher outputs within its quota, and say what is in it."""
    from pipeline.settings_files import load_settings
    from pipeline.stages.outputs import look_after

    look_after(load_settings(config or [], overrides or []), verify=verify, as_json=as_json)


if __name__ == "__main__":
    main(cache)
