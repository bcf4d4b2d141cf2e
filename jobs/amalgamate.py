"""Command `amalgamate`, with the stages that it needs. Also `python -m jobs.amalgamate -c run.yaml`."""

from __future__ import annotations

from jobs.shell import Config, Overrides, Verbose, execute, main


def amalgamate(overrides: Overrides = None, config: Config = None, verbose: Verbose = False) -> None:
    """Let the chosen teachers share the images: the least ambiguous one teaches each."""
    execute("amalgamate", config, overrides, verbose)


if __name__ == "__main__":
    main(amalgamate)
