"""Command `assess`, with the stages that it needs. Also `python -m jobs.assess -c run.yaml`."""

from __future__ import annotations

from jobs.shell import Config, Overrides, Verbose, execute, main


def assess(overrides: Overrides = None, config: Config = None, verbose: Verbose = False) -> None:
    """Score every teacher of the zoo on the task's probe, in parallel."""
    execute("assess", config, overrides, verbose)


if __name__ == "__main__":
    main(assess)
