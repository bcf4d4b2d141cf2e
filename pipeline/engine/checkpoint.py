"""Checkpoints: one folder each, written whole or not at all, verified by hash when read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

_MANIFEST = "manifest.json"
_STATE = "state.pt"
_KEEP = 2


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write a training state and the hash that proves it whole.

    Parameters
    ----------
    folder : Path
        An existing folder; `state.pt` and `manifest.json` are written into it.
    state : dict
        Tensors, numbers, strings, lists and dicts of these: what ``torch.load(weights_only=True)`` can read back.
    """
    target = folder / _STATE
    torch.save(state, target)
    manifest = {"sha256": {_STATE: _sha256(target)}}
    (folder / _MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def load_state(folder: Path) -> dict[str, Any] | None:
    """Read a training state back; None when the checkpoint is incomplete or damaged."""
    if not _is_whole(folder):
        return None
    return torch.load(folder / _STATE, map_location="cpu", weights_only=True)


def replace_folder(source: Path, home: Path) -> None:
    """Add a checkpoint to `home` and drop all but the newest two.

    The copy gets its final name only when it is complete, so a crash at any point leaves the former checkpoints.
    """
    home.mkdir(parents=True, exist_ok=True)
    number = 1 + max((_number(path) for path in home.glob("checkpoint_*")), default=-1)
    temporary = home / f".writing_{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    for path in temporary.iterdir():
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
    temporary.rename(home / f"checkpoint_{number:06d}")
    for path in sorted(home.glob("checkpoint_*"), key=_number)[:-_KEEP]:
        shutil.rmtree(path, ignore_errors=True)


def newest_folder(home: Path) -> Path | None:
    """Return the newest checkpoint in `home` that is whole; damaged ones are passed over."""
    for path in sorted(home.glob("checkpoint_*"), key=_number, reverse=True):
        if _is_whole(path):
            return path
    return None


def _number(path: Path) -> int:
    suffix = path.name.removeprefix("checkpoint_")
    return int(suffix) if suffix.isdigit() else -1


def _is_whole(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return all(_sha256(folder / name) == digest for name, digest in manifest["sha256"].items())
    except (OSError, ValueError, KeyError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
