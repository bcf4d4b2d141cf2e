"""Command `sweep`: many runs that differ in some settings. Also `python -m jobs.sweep -c run.yaml -c sweep.yaml`."""

from __future__ import annotations

import os

from jobs.shell import Config, Overrides, Verbose, main, stoppable


def sweep(overrides: Overrides = None, config: Config = None, verbose: Verbose = False) -> None:
    """Try settings against each other, by their section `sweep`; the best student becomes the run's."""
    from pipeline.stages.sweep import sweep_files

    if verbose:
        os.environ["FACULTY_VERBOSE"] = "1"
    with stoppable():
        sweep_files(config or [], overrides or [], verbose=verbose)


if __name__ == "__main__":
    main(sweep)
