"""Command `ingest`, with the stages that it needs. Also `python -m jobs.ingest -c run.yaml`."""

from __future__ import annotations

from jobs.shell import Config, Overrides, Verbose, execute, main


def ingest(overrides: Overrides = None, config: Config = None, verbose: Verbose = False) -> None:
    """Read the task's images into a table with fixed splits."""
    execute("ingest", config, overrides, verbose)


if __name__ == "__main__":
    main(ingest)
