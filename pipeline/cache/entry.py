"""An entry of the store: the folder of shards under one key, and who writes and reads it."""

from __future__ import annotations

import errno
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from pipeline.cache.reader import Index, Reader
from pipeline.cache.shard import (
    WRITING,
    BrokenShardError,
    CacheError,
    MissingOutputError,
    Shard,
    checked_ids,
    open_shard,
    shards_in,
    write_shard,
)

USED = "used"
_USE_SECONDS = 60.0  # between two marks of use
_ABANDONED_SECONDS = 3600.0  # after that an unfinished file is one of a writer that died
_ATTEMPTS = 5
_Known = tuple[str, int, int]


class Entry:
    """The outputs under one key: a folder of shards. Made by `OutputStore.entry`; pickled as its path.

    Attributes
    ----------
    path : Path
        The folder, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened: dict[_Known, Shard] = {}
        self._index: tuple[tuple[_Known, ...], Index] | None = None
        self._marked = -_USE_SECONDS

    def __repr__(self) -> str:
        return f"Entry({str(self.path)!r})"

    def __reduce__(self) -> tuple[object, ...]:
        return Entry, (self.path,)

    def touch(self) -> None:
        """Mark the entry as used, at most once a minute; an entry that is not there or may not be written is not."""
        now = time.monotonic()
        if now - self._marked < _USE_SECONDS:
            return
        mark = self.path / USED
        try:
            age = time.time() - mark.stat().st_mtime
        except OSError:
            age = _USE_SECONDS
        try:
            if not 0 <= age < _USE_SECONDS:
                mark.touch()
            self._marked = now
        except OSError:
            pass

    def put(self, ids: np.ndarray, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> str:
        """Store what a teacher says of some images, as one shard.

        Parameters
        ----------
        ids : (n, 16) uint8 array
            Of the images, n ≥ 1. An id that is stored already is no error.
        tensors : mapping
            Name → (n, ...) tensor on any device. Names and shapes are the same for all shards of an entry.
        about : mapping, optional
            Texts that go with them.

        Returns
        -------
        name : str
            Of the shard's file: the same values have the same name.

        Raises
        ------
        CacheError
            If it can't be written, above all for a full disk. Nothing is left of it then.
        ValueError
            If names, shapes or dtypes can't be stored, or differ from those of the entry's other shards.
        """
        shard = Shard.of(ids, tensors, about)
        for other in self._shards().values():
            if other.layout != shard.layout:
                raise ValueError(f"tensors must be {other.layout} as in the entry's other shards, got {shard.layout}")
        try:
            for _ in range(_ATTEMPTS):
                try:
                    self.path.mkdir(parents=True, exist_ok=True)
                    self._sweep()
                    if not (self.path / USED).exists():
                        (self.path / USED).touch()
                    self.touch()
                    return write_shard(self.path, shard)
                except FileNotFoundError:  # the entry was evicted meanwhile
                    self._marked = -_USE_SECONDS
        except OSError as error:
            raise self._unwritable(error) from None
        raise CacheError(f"{self.path}: is deleted again and again; raise `cache.quota_gb`")

    def missing(self, ids: np.ndarray) -> np.ndarray:
        """Return which images have no stored output.

        Parameters
        ----------
        ids : (N, 16) uint8 array

        Returns
        -------
        positions : int64 array
            Ascending positions in `ids`; of an id that occurs twice, both.
        """
        self.touch()
        return np.flatnonzero(self._find(checked_ids(ids))[1] < 0)

    def reader(self, ids: np.ndarray) -> Reader:
        """Return a reader of the outputs for some images.

        Parameters
        ----------
        ids : (N, 16) uint8 array
            In any order, repeated or not. Each is looked up once, here.

        Raises
        ------
        MissingOutputError
            If one of them has no stored output; it is a `KeyError`, too.
        CacheError
            If the shards do not hold the same tensors, or can't be read.
        """
        self.touch()
        ids = checked_ids(ids)
        shards, at = self._find(ids)
        absent = np.flatnonzero(at < 0)
        if len(absent):
            raise MissingOutputError(
                f"{self.path}: {len(absent)} of {len(ids)} images have no stored output, "
                f"the first is {ids[absent[0]].tobytes().hex()}; compute what `missing` names"
            )
        # With a handle of its own: this one maps all shards, the reader only those it needs.
        return Reader(Entry(self.path), ids, shards, at)

    def verify(self) -> list[str]:
        """Read all shards, and delete those that are not what was written: cut off, or with a bit that flipped.

        Returns
        -------
        dropped : list of str
            Names of their files. The outputs in them are missing from now on; readers that have them mapped keep them.

        Raises
        ------
        CacheError
            If a shard can't be read or deleted.
        """
        dropped = []
        try:
            for found, _, whole in shards_in(self.path):
                try:
                    good = whole and open_shard(Path(found.path)).intact()
                except FileNotFoundError:
                    continue
                except BrokenShardError:
                    good = False
                if not good:
                    Path(found.path).unlink(missing_ok=True)
                    dropped.append(found.name)
        except OSError as error:
            raise self._unreadable(error) from None
        return dropped

    def _shards(self) -> dict[_Known, Shard]:
        """Return the whole shards that are there now, opening those that are new."""
        present: dict[_Known, Shard] = {}
        try:
            for found, stat, whole in shards_in(self.path):
                # With the inode: a shard that was found bad and written anew has the name that it had.
                known = (found.name, stat.st_ino, stat.st_mtime_ns)
                if known in self._opened:
                    present[known] = self._opened[known]
                elif whole:
                    try:
                        present[known] = open_shard(Path(found.path))
                    except (FileNotFoundError, BrokenShardError):
                        continue
        except OSError as error:
            raise self._unreadable(error) from None
        self._opened = present
        return present

    def _find(self, ids: np.ndarray) -> tuple[list[Shard], np.ndarray]:
        """Return the shards, and for each id its row in all of them one after another: the first, -1 for none."""
        present = self._shards()
        shards = list(present.values())
        if self._index is None or self._index[0] != tuple(present):
            stored = np.concatenate([np.empty((0, 16), np.uint8), *(shard.ids for shard in shards)])
            self._index = tuple(present), Index(stored)
        return shards, self._index[1].find(ids)

    def _sweep(self) -> None:
        """Delete what writers left behind that were cut off."""
        for found, _, whole in shards_in(self.path):
            if not whole:
                Path(found.path).unlink(missing_ok=True)
        for path in self.path.glob(f"{WRITING}*"):
            try:
                if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                    path.unlink()
            except FileNotFoundError:
                pass

    def _unwritable(self, error: OSError) -> CacheError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return CacheError(
                f"{self.path}: the disk is full; set `cache.path` to a larger disk, or lower `cache.quota_gb`"
            )
        return CacheError(f"{self.path}: can't be written ({error.strerror or error}); set another `cache.path`")

    def _unreadable(self, error: OSError) -> CacheError:
        return CacheError(
            f"{self.path}: can't be read ({error.strerror or error}); check its permissions or set `cache.path`"
        )
