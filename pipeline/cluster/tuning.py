"""What all uses of Ray Tune here have in common: how runs are set up, and what is cleared up after them.

Rows are handed over as trials end, and what counts of them is written by those who take them. Nothing of Tune's own
state is read again.
"""

from __future__ import annotations

from typing import Any

from pyarrow import fs

from pipeline.engine.checkpoint import CheckpointStore

# What a trial asks for whose workers train. It must ask for something: a byte of memory every node has, whereas any
# share of a processor would keep a worker from the last one.
DRIVER = {"memory": 1.0}


def run_settings(store: CheckpointStore, callback: Any, *, max_failures: int, verbose: bool) -> Any:
    """Return Tune's settings of a run whose records lie in a store's folder.

    Parameters
    ----------
    store : CheckpointStore
    callback : ray.tune.Callback
        Takes the rows.
    max_failures : int
        How often a trial is tried again whose process died.
    verbose : bool
        Show Tune's progress table.
    """
    from ray import tune

    return tune.RunConfig(
        name=store.root.rsplit("/", 1)[-1],
        storage_path=store.storage,
        failure_config=tune.FailureConfig(max_failures=max_failures),
        # What a trial computes, it keeps itself; at its end there is nothing else to save.
        checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        callbacks=[callback],
        progress_reporter=None if verbose else _silence(),
        verbose=2 if verbose else 0,
    )


def _silence() -> Any:
    """Return a reporter that says nothing in a notebook, where Tune's own would clear the cell's output.

    None elsewhere: there Tune is silent when it is asked to be.
    """
    from ray.tune import ProgressReporter
    from ray.widgets.util import in_notebook

    class Silence(ProgressReporter):
        def should_report(self, trials: list[Any], done: bool = False) -> bool:
            return False

        def report(self, trials: list[Any], done: bool, *sys_info: str) -> None:
            pass

    return Silence() if in_notebook() else None


def groups_made_here() -> set[Any]:
    """Return the placement groups that this process has made, as Tune does for its trials."""
    from pipeline.cluster.groups import own_groups

    return {one.group for one in own_groups() if not one.by_actor}


def delete_records(store: CheckpointStore) -> None:
    """Delete the folder of a run that has ended."""
    if store.filesystem.get_file_info(store.root).type == fs.FileType.Directory:
        store.filesystem.delete_dir(store.root)
