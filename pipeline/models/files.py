"""Weight files as files: whether they are there, and their hash. Imports no torch."""

from __future__ import annotations

import hashlib
import os
import re
from functools import cache
from pathlib import Path


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file in hex; files that did not change since are not read again.

    Raises
    ------
    OSError
        When it can't be read.
    """
    status = os.stat(path)
    return _sha256(os.fspath(path), status.st_size, status.st_mtime_ns)


@cache  # a bound would be met by a pass over a larger zoo, and none be kept
def _sha256(path: str, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def missing(path: str | Path) -> str | None:
    """Say in one line why `path` can't be a weight file; None if it can."""
    if "://" in os.fspath(path) or re.match(r"[A-Za-z][\w+.-]*:/(?!/)", os.fspath(path)):
        return "is a URI, of which nothing is known: give its `sha256`, or copy the file and give a path"
    if "\0" in os.fspath(path):
        return "is no path"
    if not os.path.exists(path):
        return "does not exist; a path in a zoo file is relative to that file"
    if not os.path.isfile(path):
        return "is not a file"
    if not os.access(path, os.R_OK):
        return "may not be read"
    return None
