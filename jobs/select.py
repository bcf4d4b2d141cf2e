"""Command `select`, with the stages that it needs. Also `python -m jobs.select -c run.yaml`."""

from __future__ import annotations

from jobs.shell import Config, Overrides, Verbose, execute, main


def select(overrides: Overrides = None, config: Config = None, verbose: Verbose = False) -> None:
    """Choose the set of teachers that together help most, or say that none does."""
    execute("select", config, overrides, verbose)


if __name__ == "__main__":
    main(select)
