"""Command `amalgamate`, with the stages that it needs. Also `python -m jobs.amalgamate -c run.yaml`."""

from __future__ import annotations

from jobs.shell import Config, Overrides, Verbose, execute, main


def amalgamate(overrides: Overrides = None, config: Config = None, verbose: Verbose = False) -> None:
    """Write down what the chosen teachers say of the training images: as one, or each of its share."""
    execute("amalgamate", config, overrides, verbose)


if __name__ == "__main__":
    main(amalgamate)
