"""One rung of one teacher's assessment, with the history of the rungs below it; on a worker."""

from __future__ import annotations

import contextlib
import importlib
import json
import time
from pathlib import Path
from typing import Any

from pipeline.data.mirror import here, share
from pipeline.errors import StageError
from pipeline.stages.artefacts import write_json
from pipeline.stages.probe import ProbePayload, assess_teacher

_HISTORY = "rungs.json"
_IMPORTED = ("torch", "pipeline.models.sources", "pipeline.assessment.probe", "pipeline.transport.bridge")


def assess_rung(payload: ProbePayload, *, rung: int, shared: dict[str, Any]) -> dict[str, Any]:
    """Score one teacher on the images of a rung, see `assess_teacher`.

    A search hands over what its last rung gave alone. So each rung leaves its row beside the teacher's results, and
    ``rungs`` of the one that comes next is the JSON of them all: the rung's number, its scores, images, and seconds.
    ``worked`` is the seconds of this one without what the first trial of a process imports for those that follow: how
    long the others may be expected to take.
    """
    began = time.perf_counter()
    for name in _IMPORTED:
        importlib.import_module(name)
    imported = time.perf_counter()
    row = assess_teacher(payload, rung=rung, shared=shared)
    path = here(Path(payload.job.folder) / _HISTORY, newest=True)
    # Those of a former search, among other teachers, end where this one begins.
    below = [one for one in _read(path) if one["rung"] < rung] if rung else []
    numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
    history = [*below, numbers | {"rung": rung, "seconds": time.perf_counter() - began}]
    if rung < payload.last_rung:
        with contextlib.suppress(OSError, StageError):  # a record that can't be kept is no fault of the teacher's
            write_json(path, history)
            share(path)
    return row | {"rungs": json.dumps(history), "worked": time.perf_counter() - imported}


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return [one for one in found if isinstance(one, dict) and "rung" in one]
    except (OSError, ValueError, TypeError):
        return []
