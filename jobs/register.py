"""Command `register`, with the stages that it needs. Also `python -m jobs.register -c run.yaml`."""

from __future__ import annotations

from jobs.shell import Config, Overrides, Verbose, execute, main


def register(overrides: Overrides = None, config: Config = None, verbose: Verbose = False) -> None:
    """Export the student and register it with its lineage."""
    execute("register", config, overrides, verbose)


if __name__ == "__main__":
    main(register)
