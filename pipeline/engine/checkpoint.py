"""Checkpoints of a run in a folder or bucket: which of them are whole, and which one is the newest.

Ray Train keeps its own list of checkpoints in a snapshot file, written in place: a driver that is killed while it
writes leaves a file with which no later run starts. A manifest inside each checkpoint (every file, its size and its
hash) makes a checkpoint prove its own completeness, so that no list is needed: a run continues from the newest whole
one, whoever wrote it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pyarrow import fs

from pipeline.places import is_remote, join

MANIFEST = "faculty-manifest.json"
KEPT = 2
_STATE = "state.pt"
_NAME = re.compile(r"checkpoint_(\d{6,})-[0-9a-f]+")
_ON_ITS_WAY, _FETCHED = "faculty-state-", "faculty-checkpoint-"
_FORGOTTEN_S = 24 * 3600.0


def new_folder() -> Path:
    """Return an empty folder on this machine for a state that is on its way to the storage."""
    return Path(tempfile.mkdtemp(prefix=_ON_ITS_WAY))


def clear_forgotten() -> None:
    """Delete what trainings that were killed left of checkpoints on this machine: our folders, a day old or more."""
    found = (path for start in (_ON_ITS_WAY, _FETCHED) for path in Path(tempfile.gettempdir()).glob(f"{start}*"))
    for path in found:
        with contextlib.suppress(OSError):  # another training may be at it as well
            info = path.lstat()
            own = stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid()
            if own and time.time() - info.st_mtime > _FORGOTTEN_S:
                shutil.rmtree(path)


@dataclass(frozen=True)
class SavedCheckpoint:
    """One whole checkpoint.

    Attributes
    ----------
    name : str
        Its folder's name inside the run.
    index : int
        Its number; the newest has the highest.
    metrics : dict of str to float
        What was reported with it.
    """

    name: str
    index: int
    metrics: dict[str, Any]


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write a training state into an existing folder: tensors, numbers, strings, and lists and dicts of these."""
    import torch

    torch.save(state, folder / _STATE)


def load_state(folder: Path) -> dict[str, Any]:
    """Read what `save_state` wrote; nothing is unpickled."""
    import torch

    return torch.load(folder / _STATE, map_location="cpu", weights_only=True)


def write_manifest(folder: Path, metrics: dict[str, Any]) -> None:
    """Write the manifest of a local folder into it."""
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).as_posix() != MANIFEST
    }
    (folder / MANIFEST).write_text(json.dumps({"files": files, "metrics": metrics}), encoding="utf-8")


def new_name(index: int) -> str:
    """Name a checkpoint so that a repeated index (after a restart) never meets the files of its forerunner."""
    return f"checkpoint_{index:06d}-{uuid.uuid4().hex[:6]}"


def index_of(name: str) -> int | None:
    """Return the number in a checkpoint's name, or None when it is not the name of a checkpoint."""
    match = _NAME.fullmatch(name)
    return int(match.group(1)) if match else None


class CheckpointStore:
    """The checkpoints of one run.

    Parameters
    ----------
    storage : str
        A local folder or a URI (``s3://…``, ``gs://…``) that every worker reaches.
    name : str
        The run's folder inside it.

    Attributes
    ----------
    storage, uri : str
        As given, with an absolute path; and with the run's folder.
    root : str
        The run's folder in `filesystem`.
    """

    def __init__(self, storage: str, name: str) -> None:
        if "://" in storage:
            self.filesystem, root = fs.FileSystem.from_uri(storage)
            self.storage = storage
        else:
            self.filesystem, root = fs.LocalFileSystem(), Path(storage).absolute().as_posix()
            self.storage = root
        self.uri = join(self.storage, name)
        self.root = f"{root.rstrip('/')}/{name}"

    @classmethod
    def at(cls, place: str) -> CheckpointStore:
        """Open the checkpoints of a run by its folder: path or URI."""
        path, mark, options = place.partition("?") if is_remote(place) else (place, "", "")
        storage, _, name = path.rstrip("/").rpartition("/")
        return cls(f"{storage}{mark}{options}", name)

    def manifests(self, but: Collection[str] = ()) -> dict[str, dict[str, Any]]:
        """Return the manifests of the checkpoints that have one, by name; those of `but` are not read."""
        found = {}
        for info in self._children():
            name = PurePosixPath(info.path).name
            if index_of(name) is not None and name not in but:
                with contextlib.suppress(OSError, ValueError):  # not whole yet, or just being deleted
                    found[name] = self._manifest(info.path)
        return found

    def whole(self) -> list[SavedCheckpoint]:
        """Return the whole checkpoints, oldest first."""
        found = []
        for info in self._children():
            name = PurePosixPath(info.path).name
            index = index_of(name)
            if info.type == fs.FileType.Directory and index is not None:
                metrics = self._verified(info.path)
                if metrics is not None:
                    found.append(SavedCheckpoint(name, index, metrics))
        return sorted(found, key=lambda saved: (saved.index, saved.name))

    def newest(self) -> SavedCheckpoint | None:
        """Return the newest whole checkpoint whose content is what was written, or None."""
        return next((saved for saved in reversed(self.whole()) if self._unchanged(saved)), None)

    def path(self, name: str) -> str:
        """Return where a checkpoint lies, with the scheme of the storage where it has one."""
        return join(self.uri, name)

    def save(self, folder: Path, metrics: dict[str, Any], index: int) -> SavedCheckpoint:
        """Copy a local folder into the store. The manifest goes last, so that a copy cut short is no checkpoint."""
        write_manifest(folder, metrics)
        saved = SavedCheckpoint(new_name(index), index, metrics)
        target = f"{self.root}/{saved.name}"
        self.filesystem.create_dir(target, recursive=True)
        manifest = (folder / MANIFEST).read_bytes()
        (folder / MANIFEST).unlink()
        fs.copy_files(folder.as_posix(), target, fs.LocalFileSystem(), self.filesystem)
        self.write(f"{saved.name}/{MANIFEST}", manifest)
        return saved

    def write(self, relative: str, data: bytes) -> str:
        """Write one small file of the run and return where it lies."""
        target = f"{self.root}/{relative}"
        self.filesystem.create_dir(str(PurePosixPath(target).parent), recursive=True)
        with self.filesystem.open_output_stream(target) as stream:
            stream.write(data)
        return join(self.uri, relative)

    @contextlib.contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """Give a checkpoint as a local folder: itself on a local disk, else a copy that is deleted afterwards."""
        if isinstance(self.filesystem, fs.LocalFileSystem):
            yield Path(self.root) / name
            return
        folder = Path(tempfile.mkdtemp(prefix=_FETCHED))
        try:
            fs.copy_files(f"{self.root}/{name}", folder.as_posix(), self.filesystem, fs.LocalFileSystem())
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def tidy(self, keep: int) -> None:
        """Delete what a killed run left: checkpoints cut short, all but the newest `keep`, Ray's list of them."""
        kept = {saved.name for saved in self.whole()[-keep:]}
        for info in self._children():
            name = PurePosixPath(info.path).name
            if info.type == fs.FileType.Directory and name.startswith("checkpoint_") and name not in kept:
                self.filesystem.delete_dir(info.path)
            elif name in ("checkpoint_manager_snapshot.json", ".validate_storage_marker"):
                self.filesystem.delete_file(info.path)

    def _children(self) -> list[fs.FileInfo]:
        return self.filesystem.get_file_info(fs.FileSelector(self.root, allow_not_found=True))

    def _verified(self, folder: str) -> dict[str, Any] | None:
        """Return the manifest's metrics if every file it lists is there in full."""
        try:
            manifest = self._manifest(folder)
            infos = self.filesystem.get_file_info([f"{folder}/{name}" for name in manifest["files"]])
            sizes = [file["size"] for file in manifest["files"].values()]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        whole = all(info.size == size for info, size in zip(infos, sizes, strict=True))
        return manifest["metrics"] if whole else None

    def _unchanged(self, saved: SavedCheckpoint) -> bool:
        """Compare every file with its hash: a disk may keep a size and lose the content."""
        folder = f"{self.root}/{saved.name}"
        try:
            for name, file in self._manifest(folder)["files"].items():
                digest = hashlib.sha256()
                with self.filesystem.open_input_stream(f"{folder}/{name}") as stream:
                    while block := stream.read(2**22):
                        digest.update(block)
                if digest.hexdigest() != file["sha256"]:
                    return False
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return True

    def _manifest(self, folder: str) -> dict[str, Any]:
        with self.filesystem.open_input_stream(f"{folder}/{MANIFEST}") as stream:
            return json.loads(stream.read())


def plain(metrics: dict[str, Any]) -> dict[str, Any]:
    """Turn one-element tensors and numpy scalars into Python numbers, so that metrics can be read without torch."""
    return {key: value.item() if hasattr(value, "item") else value for key, value in metrics.items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
