"""What is to be recorded and has not reached its store yet: one file that outlives the process. Imports no MLflow."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = "tracking-journal"
"""Its place in a run folder."""

_COPIED = 8 * 2**20  # bytes; a larger file is linked, which keeps it unless it is overwritten in place

_log = logging.getLogger("pipeline.tracking")


class Journal:
    """An append-only file of records, and how far a store has confirmed them.

    A record is one line of JSON, written by one system call before the store is asked. Beside the file lie the number
    of its bytes that were confirmed (``.sent``) and the files that records refer to, as they were when they were
    recorded: copies of small ones, hard links of others. The file is locked as long as its writer lives: what a killed
    process left behind is known by its lock being free.

    Parameters
    ----------
    path : Path
        The file, ``<folder>/<name>.jsonl``.
    descriptor : int
        Open for appending, and locked.

    Notes
    -----
    A folder that can't be written to (a full disk) ends nothing: records are then kept in memory alone, which is said
    once.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor: int | None = descriptor
        self._end = os.fstat(descriptor).st_size
        self._kept = 0
        self._told = False

    @classmethod
    def create(cls, folder: str | Path, store: str) -> Journal | None:
        """Begin a journal for a store (its URI without credentials); None where the folder can't be written to."""
        path = Path(folder) / f"{uuid.uuid4().hex}.jsonl"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            _log.warning("%s can't be written (%s); records wait in memory alone", folder, error.strerror or error)
            return None
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        journal = cls(path, descriptor)
        journal.append({"do": "store", "uri": store})
        return journal

    @classmethod
    def left(cls, folder: str | Path, store: str) -> Iterator[Journal]:
        """Take over, oldest first, the journals for a store whose processes have ended."""
        for path in sorted(Path(folder).glob("*.jsonl"), key=_age):
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_APPEND)
            except OSError:  # its owner has just finished with it
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(descriptor)
                continue
            journal = cls(path, descriptor)
            first = next(journal._lines(), None)
            if first is None:  # its process ended before it recorded anything
                journal.remove()
            elif first[0].get("uri") != store:
                journal.close()
            else:
                yield journal

    @staticmethod
    def waiting(folder: str | Path, store: str) -> bool:
        """Return whether a process that has ended left records for a store."""
        found = False
        for journal in Journal.left(folder, store):
            journal.close()
            found = True
        return found

    def append(self, record: dict[str, Any]) -> int:
        """Write a record down; return where it ends in the file."""
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", errors="replace")
        if self._descriptor is not None:
            try:
                done = os.write(self._descriptor, line)
                if done < len(line):  # the disk became full within the line
                    os.ftruncate(self._descriptor, self._end)
                    raise OSError(None, "no space left")
            except OSError as error:
                self._tell(error)
                return self._end
            self._end += len(line)
        return self._end

    def keep(self, source: Path) -> Path:
        """Keep a file, or what a folder holds, as it is now; return the folder that has it.

        Raises
        ------
        OSError
            When that is not possible.
        """
        self._kept += 1
        # A process that takes the journal over numbers its own files anew.
        folder = self._files / f"{os.getpid()}-{self._kept}"
        folder.mkdir(parents=True)
        if source.is_dir():
            shutil.copytree(source, folder, copy_function=_keep, dirs_exist_ok=True)
        else:
            _keep(source, folder / source.name)
        return folder

    def records(self) -> Iterator[tuple[dict[str, Any], int, bool]]:
        """Yield every record, where it ends, and whether the store has confirmed it."""
        sent = self._confirmed()
        for record, end in self._lines():
            if record.get("do") != "store":
                yield record, end, end <= sent

    def confirm(self, end: int) -> None:
        """Note that the store has everything up to there."""
        if self._descriptor is None:
            return
        temporary = self.path.with_suffix(".part")
        try:
            temporary.write_text(str(end), encoding="ascii")
            temporary.replace(self.path.with_suffix(".sent"))
        except OSError as error:  # at worst records are sent again, which changes nothing
            self._tell(error)

    def sync(self) -> None:
        """Bring what was written to the disk itself."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.fsync(self._descriptor)

    def close(self) -> None:
        """Leave the journal for the next process."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def remove(self) -> None:
        """Delete it, and its folder if that is empty."""
        with contextlib.suppress(OSError):
            self.path.unlink()
        with contextlib.suppress(OSError):
            self.path.with_suffix(".sent").unlink()
        shutil.rmtree(self._files, ignore_errors=True)
        self.close()
        with contextlib.suppress(OSError):
            self.path.parent.rmdir()

    @property
    def _files(self) -> Path:
        return self.path.with_suffix(".files")

    def _lines(self) -> Iterator[tuple[dict[str, Any], int]]:
        end = 0
        with self.path.open("rb") as file:
            for line in file:
                end += len(line)
                with contextlib.suppress(json.JSONDecodeError, UnicodeDecodeError):  # torn by a crash
                    record = json.loads(line)
                    if isinstance(record, dict):
                        yield record, end

    def _confirmed(self) -> int:
        try:
            return int(self.path.with_suffix(".sent").read_text(encoding="ascii"))
        except (OSError, ValueError):
            return 0

    def _tell(self, error: OSError) -> None:
        if not self._told:
            self._told = True
            _log.warning("%s can't be written (%s); records wait in memory alone", self.path, error.strerror or error)


def _keep(source: str | Path, target: str | Path) -> None:
    if os.path.getsize(source) > _COPIED:
        with contextlib.suppress(OSError):  # another file system, or one without links
            os.link(source, target)
            return
    shutil.copy2(source, target)


def _age(path: Path) -> float:
    try:
        return path.stat().st_ctime
    except OSError:
        return 0.0
