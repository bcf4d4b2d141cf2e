"""Code of one's own that the settings name: where it is, and what it has to do with a stage's key."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path

from pipeline.stages.artefacts import digest_of_file


def code_of(targets: Iterable[str]) -> dict[str, str]:
    """Return the hash of the source file of each module, so that a result is stale when its code has changed.

    Parameters
    ----------
    targets : iterable of str
        ``package.module:name``. What a module imports in its turn does not count; a module that can't be found has the
        hash "unknown", and is told of by whoever needs it.
    """
    return {target: _hash(target.partition(":")[0]) for target in sorted(targets)}


def _hash(module: str) -> str:
    try:
        # What has been imported in a notebook need not be on the path any more.
        spec = getattr(sys.modules.get(module), "__spec__", None) or importlib.util.find_spec(module)
        origin = None if spec is None else spec.origin
        return digest_of_file(Path(origin)) if origin else "unknown"
    except (ImportError, OSError, ValueError):
        return "unknown"
