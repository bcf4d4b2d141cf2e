"""The store: entries by key, their shards, and what a trainer reads from them.

Any number of processes read and write at once, on any number of machines that share the folder. There is no lock: a
file appears under its name when it is complete, its name says what it holds, and what went away is computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Collection, Sequence
from pathlib import Path

from torch import Tensor

from pipeline.cache.entry import USED, Entry
from pipeline.cache.reader import Reader
from pipeline.cache.shard import FORMAT_VERSION, CacheError, MissingOutputError
from pipeline.cache.spec import Precision

__all__ = ["CacheError", "Entry", "MissingOutputError", "OutputStore", "Reader", "compact", "output_key"]

_KEY = re.compile(r"[0-9a-f]{64}")
_EVICTED = re.compile(rf"\.evicted-{_KEY.pattern}-[0-9a-f]{{32}}")
_LARGEST_HALF, _SMALLEST_HALF = 6e4, 1e-2


def output_key(
    *, teacher: str, view: str, taps: Sequence[str], autocast: str, precision: Precision, top_k: int | None
) -> str:
    """Return the key of a teacher's outputs: SHA-256 of all that decides them, and of the format version.

    What is the same for two runs must give the same text in both, on any machine: no paths, times or names of runs.

    Parameters
    ----------
    teacher
        Fingerprint of the teacher: its weights, its architecture, and its preprocessing (size, mean, deviation, ...).
    view
        Which view of the images it saw: a digest of the augmentation's settings, its seed, and the number of the view;
        ``clean`` for images as they are in the table.
    taps
        What is stored besides the logits: names of the taps, in any order. Each name must say where in the network the
        values are from and how they are pooled, or the fingerprint must.
    autocast
        Precision the teacher computed in, for instance ``bf16``; ``none`` without autocast.
    precision
        Precision that values are stored in, see `compact`.
    top_k
        Classes kept of each image's logits; None: all.

    Returns
    -------
    key : str
        64 hexadecimal digits.

    Raises
    ------
    ValueError
        For an empty text, or a single text as `taps`.
    """
    if isinstance(taps, str):
        raise ValueError(f"taps must be a sequence of names, got {taps!r}")
    for name, text in (("teacher", teacher), ("view", view), ("autocast", autocast), ("precision", precision)):
        if not text:
            raise ValueError(f"{name} must not be empty")
    parts = {
        "format": FORMAT_VERSION,
        "teacher": teacher,
        "view": view,
        "taps": sorted(set(taps)),
        "autocast": autocast,
        "precision": precision,
        "top_k": top_k,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def compact(values: Tensor, precision: Precision) -> Tensor:
    """Return values in the precision they are stored in.

    For ``fp16`` that is half precision where max |v| is in [0.01, 60000], which it holds to 11 bits, and single
    precision otherwise, as for values that are not finite. Shards of one entry may therefore differ in their dtype;
    a reader returns single precision then. Values that are not floating-point stay as they are.
    """
    if not values.is_floating_point():
        return values
    if precision == "fp32":
        return values.float()
    largest = float(values.abs().max()) if values.numel() else 1.0
    return values.half() if _SMALLEST_HALF <= largest <= _LARGEST_HALF else values.float()


class OutputStore:
    """Outputs of many teachers in one folder: an entry, which is a folder of its own, for each key.

    Parameters
    ----------
    root : Path
        Made when something is stored.
    quota_bytes : int or None
        What `evict` keeps to; None: no limit.

    Raises
    ------
    ValueError
        If the quota is below 0.
    """

    def __init__(self, root: Path, quota_bytes: int | None = None) -> None:
        if quota_bytes is not None and quota_bytes < 0:
            raise ValueError(f"quota_bytes must be >= 0, got {quota_bytes}")
        self.root, self.quota_bytes = Path(root), quota_bytes

    def __repr__(self) -> str:
        return f"OutputStore({str(self.root)!r}, {self.quota_bytes})"

    def entry(self, key: str) -> Entry:
        """Return the entry of a key, and mark it as used if it is there.

        Raises
        ------
        ValueError
            If the key is none of `output_key`.
        """
        if not _KEY.fullmatch(key):
            raise ValueError(f"key must be of 64 hexadecimal digits, got {key!r}")
        entry = Entry(self.root / key)
        entry.touch()
        return entry

    def keys(self) -> list[str]:
        """Return the keys of the entries that are there, sorted."""
        return sorted(folder.name for folder in _folders_in(self.root, _KEY))

    def size(self) -> int:
        """Return the bytes of all files of entries, unfinished ones included."""
        return sum(_size_of(folder) for folder in _folders_in(self.root, _KEY))

    def evict(self, keep: Collection[str] = (), *, grace_seconds: float = 900.0) -> list[str]:
        """Delete entries, the least recently used first, until the store is within its quota.

        An entry's name goes at once, so that no reader sees a part of it; those that have it mapped go on reading.
        When nothing more may be deleted, the store stays above its quota.

        Parameters
        ----------
        keep
            Keys of entries that stay.
        grace_seconds
            Entries that anyone used or wrote to within this time stay, too. Use is marked once a minute, and clocks of
            machines that share the folder differ a little: not less than a few minutes, if others use the store.

        Returns
        -------
        evicted : list of str
            Keys, in the order they went.

        Raises
        ------
        CacheError
            If an entry can't be deleted.
        """
        if self.quota_bytes is None:
            return []
        for folder in _folders_in(self.root, _EVICTED):  # of an eviction that was cut off, or goes on elsewhere
            shutil.rmtree(folder, ignore_errors=True)
        found = [(_last_use(folder), folder, _size_of(folder)) for folder in _folders_in(self.root, _KEY)]
        total, evicted = sum(size for _, _, size in found), []
        for _, folder, size in sorted(found):
            if total <= self.quota_bytes:
                break
            # The time of use is asked for again: sizes take a while to add up.
            if folder.name in keep or time.time() - _last_use(folder) < grace_seconds:
                continue
            away = self.root / f".evicted-{folder.name}-{uuid.uuid4().hex}"
            try:
                folder.rename(away)
            except FileNotFoundError:  # someone else evicted it
                total -= size
                continue
            except OSError as error:
                raise CacheError(
                    f"{folder}: can't be deleted ({error.strerror}); check its permissions, or set another `cache.path`"
                ) from None
            shutil.rmtree(away, ignore_errors=True)
            total -= size
            evicted.append(folder.name)
        return evicted


def _folders_in(root: Path, pattern: re.Pattern[str]) -> list[Path]:
    """Return the folders with such a name: only what the store made is counted, and deleted."""
    try:
        with os.scandir(root) as entries:
            return [
                Path(entry.path)
                for entry in entries
                if pattern.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
            ]
    except FileNotFoundError:
        return []


def _last_use(folder: Path) -> float:
    """Return when an entry was used, in seconds since 1970; one that has no mark yet was begun just then."""
    for path in (folder / USED, folder):
        try:
            return path.stat().st_mtime
        except FileNotFoundError:
            continue
    return 0.0


def _size_of(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):  # passes over what goes away meanwhile
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except FileNotFoundError:
                continue
    return total
