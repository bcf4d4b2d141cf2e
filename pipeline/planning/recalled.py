"""What starting took in former runs on this machine: of this folder and of those beside it."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.places import is_remote

_FOLDERS = 100  # run folders that are looked into at most
_LATEST = 5  # of each kind: a machine changes
KINDS = ("session", "trials", "tasks", "group", "register", "resident")


def recalled(run_dir: str | Path, machine: str | None = None) -> dict[str, float]:
    """Return what starting took on this machine, the median of the latest few runs.

    Parameters
    ----------
    run_dir : str or Path
        Runs are looked for in it and beside it; in a store there are none.
    machine : str, optional
        Its name; None: this one's.

    Returns
    -------
    dict
        See `pipeline.stages.base.Run.timed`; what is not known is not in it.
    """
    if is_remote(str(run_dir)):
        return {}
    machine = platform.node() if machine is None else machine
    found: dict[str, list[tuple[float, float]]] = {}
    for record in _records(Path(run_dir).absolute()):
        if record.get("machine") != machine:
            continue
        for kind, value in dict(record.get("starts") or {}).items():
            if kind in KINDS and value > 0:
                found.setdefault(kind, []).append((float(record["finished"]), float(value)))
    return {kind: statistics.median(value for _, value in sorted(values)[-_LATEST:]) for kind, values in found.items()}


def _records(folder: Path) -> Iterator[dict[str, Any]]:
    places = [path for path in folder.parent.glob("*/run.json") if path.parent != folder][: _FOLDERS - 1]
    for home in (folder, *(path.parent for path in places)):
        for path in home.glob("*/*/stage.json"):
            try:
                record = json.loads(path.read_text(encoding="utf-8"))
                float(record["finished"])
            except (OSError, ValueError, KeyError, TypeError):
                continue  # cut off, or of an older version
            yield record
