"""Command `evaluate`, with the stages that it needs. Also `python -m jobs.evaluate -c run.yaml`."""

from __future__ import annotations

from jobs.shell import Config, Overrides, Verbose, execute, main


def evaluate(overrides: Overrides = None, config: Config = None, verbose: Verbose = False) -> None:
    """Test the student beside the same student trained without teachers."""
    execute("evaluate", config, overrides, verbose)


if __name__ == "__main__":
    main(evaluate)
