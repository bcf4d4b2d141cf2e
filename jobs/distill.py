"""Command `distill`, with the stages that it needs. Also `python -m jobs.distill -c run.yaml`."""

from __future__ import annotations

from jobs.shell import Config, Overrides, Verbose, execute, main


def distill(overrides: Overrides = None, config: Config = None, verbose: Verbose = False) -> None:
    """Train the student."""
    execute("distill", config, overrides, verbose)


if __name__ == "__main__":
    main(distill)
