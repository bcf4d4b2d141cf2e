"""Reading what is stored: ids are looked up once, rows are copied straight from the memory maps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pipeline.cache.shard import CacheError, Shard

if TYPE_CHECKING:
    from pipeline.cache.entry import Entry

_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2⁶⁴ over the golden ratio: ids that count upwards get keys far apart


class Index:
    """Finds ids among many.

    The two halves of an id, taken as 64-bit numbers a and b, give the key a + b · odd modulo 2⁶⁴. Keys are sorted once
    and searched by bisection; where several ids share a key, the ids themselves decide.

    Parameters
    ----------
    ids : (N, 16) uint8 array
    """

    def __init__(self, ids: np.ndarray) -> None:
        self._words = ids.view(np.uint64)
        keys = _keys_of(self._words)
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]

    def find(self, ids: np.ndarray) -> np.ndarray:
        """Return for each of (n, 16) ids its first row, an (n,) int64 array; -1 where it is not there."""
        words = ids.view(np.uint64)
        keys = _keys_of(words)
        order = np.argsort(keys)  # bisecting in order goes through memory in order: several times as fast
        place = np.empty(len(ids), np.int64)
        place[order] = np.searchsorted(self._keys, keys[order])
        found = np.full(len(ids), -1, np.int64)
        pending = np.arange(len(ids))
        while True:
            pending = pending[place[pending] < len(self._keys)]
            pending = pending[self._keys[place[pending]] == keys[pending]]
            if not len(pending):
                return found
            rows = self._order[place[pending]]
            same = (self._words[rows] == words[pending]).all(1)
            found[pending[same]] = rows[same]
            pending = pending[~same]
            place[pending] += 1


class Reader:
    """The outputs for some images, over memory maps. Made by `Entry.reader`; pickled as the folder and the ids.

    It reads what was there when it was made, also when the entry is evicted meanwhile.

    Parameters
    ----------
    entry : Entry
    ids : (N, 16) uint8 array
    shards : sequence of Shard
    at : (N,) int64 array
        Row of each id in the shards one after another.

    Raises
    ------
    CacheError
        If the shards do not hold the same tensors.
    """

    def __init__(self, entry: Entry, ids: np.ndarray, shards: Sequence[Shard], at: np.ndarray) -> None:
        self._entry, self._ids = entry, ids
        lengths = np.array([len(shard) for shard in shards], np.int64)
        ends = np.cumsum(lengths)
        numbers = np.searchsorted(ends, at, side="right")
        # Only shards that hold one of the ids stay mapped; without ids, one that tells names and shapes.
        used = np.flatnonzero(np.bincount(numbers, minlength=len(shards))) if len(ids) else np.arange(len(shards))[:1]
        self._shards = [shards[number] for number in used.tolist()]
        self._ends = np.cumsum(lengths[used])
        self._starts = self._ends - lengths[used]
        shift = np.zeros(len(shards), np.int64)
        shift[used] = self._starts - (ends - lengths)[used]
        at = at + shift[numbers]
        # Ids in the order of a single shard need no translation.
        in_order = len(self._shards) == 1 and np.array_equal(at, np.arange(len(at)))
        self._at = None if in_order else at
        layouts = [shard.layout for shard in self._shards]
        if any(layout != layouts[0] for layout in layouts):
            raise CacheError(f"{entry.path}: its shards do not hold the same tensors; delete the folder")
        self._shapes = layouts[0] if layouts else {}
        columns = {name: [shard.columns[name] for shard in self._shards] for name in self._shapes}
        self._dtypes = {
            name: reduce(torch.promote_types, (column.dtype for column in found)) for name, found in columns.items()
        }
        self._mixed = {name for name, found in columns.items() if len({column.dtype for column in found}) > 1}
        self._items = {name: [_items(column.rows) for column in found] for name, found in columns.items()}

    def __len__(self) -> int:
        return len(self._ids)

    def __repr__(self) -> str:
        return f"Reader({str(self._entry.path)!r}, {len(self)} images, {', '.join(self.names)})"

    def __reduce__(self) -> tuple[object, ...]:
        return self._entry.reader, (self._ids,)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors, sorted."""
        return tuple(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one image's part of a tensor."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype that `gather` gives: the stored one, or that which holds all, where shards differ."""
        return self._dtypes[name]

    def about(self) -> dict[str, str]:
        """Return the texts stored with the shards in use; where they differ, that of the first."""
        return {name: text for shard in reversed(self._shards) for name, text in shard.about.items()}

    def gather(self, name: str, rows: Tensor) -> Tensor:
        """Read some images' part of a tensor.

        Parameters
        ----------
        name
            One of `names`.
        rows : (n,) int64 tensor
            Positions in the ids that the reader was made for, in any order and as often as wanted.

        Returns
        -------
        values : (n, *shape(name)) tensor
            In the order of `rows`, on the CPU: a copy, of `dtype(name)`.

        Raises
        ------
        KeyError
            If there is no such tensor.
        IndexError
            If a row is not in [0, N).
        """
        if name not in self._shapes:
            raise KeyError(f"no tensor {name!r} is stored; there is {', '.join(self.names) or 'none'}")
        self._entry.touch()
        at = self._resolve(rows)
        shape, dtype = self._shapes[name], self._dtypes[name]
        if not len(at):
            return torch.empty((0, *shape), dtype=dtype)
        if name in self._mixed:
            return self._converted(name, at)
        raw = np.empty((len(at), dtype.itemsize * math.prod(shape)), np.uint8)
        items, target = self._items[name], _items(raw)
        if len(items) == 1:
            np.take(items[0], at, out=target, mode="clip")  # other modes than clip go through a buffer
        else:
            for places, number, inner in self._by_shard(at):
                target[places] = items[number][inner]
        return torch.from_numpy(raw).view(dtype).reshape(len(at), *shape)

    def _converted(self, name: str, at: np.ndarray) -> Tensor:
        shape = self._shapes[name]
        values = torch.empty((len(at), *shape), dtype=self._dtypes[name])
        for places, number, inner in self._by_shard(at):
            column = self._shards[number].columns[name]
            part = torch.from_numpy(column.rows[inner]).view(column.dtype).reshape(len(inner), *shape)
            values[torch.from_numpy(places)] = part.to(values.dtype)
        return values

    def _by_shard(self, at: np.ndarray) -> Iterator[tuple[np.ndarray, int, np.ndarray]]:
        """Yield for each shard in use: the places in `at`, its number, and the rows within it."""
        order = np.argsort(at, kind="stable")  # ascending, so that a shard is read from front to back
        ordered = at[order]
        bounds = np.concatenate(([0], np.searchsorted(ordered, self._ends)))
        counts = np.diff(bounds)
        used = np.flatnonzero(counts)
        inner = ordered - np.repeat(self._starts[used], counts[used])
        # A batch may touch as many shards as it has rows: nothing but slices is left to do for each.
        for number, start, stop in zip(used.tolist(), bounds[used].tolist(), bounds[used + 1].tolist(), strict=True):
            yield order[start:stop], number, inner[start:stop]

    def _resolve(self, rows: Tensor) -> np.ndarray:
        numbers = rows.numpy(force=True)
        if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
            raise IndexError(f"rows must be a vector of integers, got {rows.dtype} of shape {tuple(rows.shape)}")
        if len(numbers) and (numbers.min() < 0 or numbers.max() >= len(self)):
            raise IndexError(f"rows must be in [0, {len(self)}), got {numbers.min()} to {numbers.max()}")
        return numbers if self._at is None else self._at[numbers]


def _keys_of(words: np.ndarray) -> np.ndarray:
    return words[:, 0] + words[:, 1] * _ODD  # wraps around


def _items(rows: np.ndarray) -> np.ndarray:
    """Return (n, B) bytes as n items of B bytes over the same memory: numpy then copies a row at a time."""
    return rows.view(np.dtype((np.void, rows.shape[1])))[:, 0]
