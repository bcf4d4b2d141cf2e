"""What each file of a mirror was when it was last the same here and in the store: a list that processes append to."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.data.objects import State, Version, no_room


class Seen:
    """The list, one line of JSON for each note; of a file's notes the last one counts.

    Parameters
    ----------
    path : Path
        Its file, which goes and comes with the mirror.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._records: dict[str, tuple[State, Version]] = {}
        self._read: tuple[int, int] = (0, 0)  # inode of the file, bytes of it that have been read

    def refresh(self) -> bool:
        """Read what has been added; return False where it is another file than before, or none."""
        with self._lock:
            same = True
            try:
                with self.path.open("rb") as file:
                    inode = os.fstat(file.fileno()).st_ino
                    if self._read[0] != inode:
                        same, self._records, self._read = False, {}, (inode, 0)
                    file.seek(self._read[1])
                    lines = file.read()
            except OSError:
                self._records, self._read = {}, (0, 0)
                return False
            whole = lines[: lines.rfind(b"\n") + 1]
            self._read = inode, self._read[1] + len(whole)
            for line in whole.splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):  # torn by a crash
                    self._remember(json.loads(line))
            return same

    def get(self, name: str) -> tuple[State, Version] | None:
        """Return state and version as of the last `refresh`; None for a file that was never the same, or is gone."""
        return self._records.get(name)

    def all(self) -> dict[str, tuple[State, Version]]:
        """Return state and version by file, as of the last `refresh`."""
        with self._lock:
            return dict(self._records)

    def note(self, name: str, state: State | None, version: Version | None) -> None:
        """Write down that a file is the same on both sides; None: that it is not here, or not there."""
        line = json.dumps({"name": name, "state": state, "version": version}, ensure_ascii=False) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(handle, line.encode())  # one call: lines of several processes do not mix
            finally:
                os.close(handle)
        except OSError as error:
            raise no_room(self.path.parent, error) from None

    def _remember(self, entry: Mapping[str, Any]) -> None:
        if entry["state"] is None or entry["version"] is None:
            self._records.pop(entry["name"], None)
        else:
            (size, changed), (stored, second) = entry["state"], entry["version"]
            self._records[entry["name"]] = (size, changed), (stored, second)
