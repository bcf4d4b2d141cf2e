"""Image tables as they are read: one memory-mapped Arrow file, and views of some of its rows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from pipeline.data.layout import FILE_NAME, Layout, damaged, fingerprint_of
from pipeline.data.splits import SPLITS, UNLABELLED
from pipeline.data.storage import local_copy
from pipeline.errors import DataError

__all__ = ["NO_LABEL", "SPLITS", "ImageSplit", "ImageTable"]

NO_LABEL = "(no label)"
_PIECE = 32  # images decoded by a thread at a time
_THREADS = min(8, os.cpu_count() or 1)


class ImageTable:
    """An image table on disk. Made by `ImageTable.open`; pickled as its path.

    Attributes
    ----------
    path : str
        As given to `open`.
    classes : tuple of str
    image_shape : (int, int, int)
        Channels, height, width.
    storage : {"raw", "encoded"}
    fingerprint : str
        Hash of classes, image shape, sample ids, labels and splits.
    """

    def __init__(self, path: str, file: Path, fingerprint: str | None) -> None:
        self.path = path
        try:
            # The map is of the file that is open now: a later ingest that replaces it does not disturb this table.
            self._reader = pa.ipc.open_file(pa.memory_map(str(file)))
            layout = Layout.parse(self._reader.schema, path)
            batches = [self._reader.get_batch(number) for number in range(self._reader.num_record_batches)]
            columns = [_columns_of(batch) for batch in batches]
        except FileNotFoundError:
            raise DataError(f"{path}: there is no such image table; write it with `faculty ingest`") from None
        except PermissionError:
            raise DataError(f"{path}: image table can't be read; check its permissions") from None
        except (OSError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise damaged(path, (str(error).splitlines() or [type(error).__name__])[0]) from None
        self.classes, self.image_shape, self.storage = layout.classes, layout.shape, layout.storage
        self.fingerprint = layout.fingerprint
        self._ids = np.concatenate([ids for ids, _, _ in columns] or [np.empty((0, 16), np.uint8)])
        self._labels = np.concatenate([labels for _, labels, _ in columns] or [np.empty(0, np.int32)])
        self._codes = np.concatenate([codes for _, _, codes in columns] or [np.empty(0, np.int8)])
        self._images = [batch.column("image") for batch in batches]
        self._ends = np.cumsum([len(batch) for batch in batches], dtype=np.int64)
        found = fingerprint_of(self.classes, self.image_shape, self._ids, self._labels, self._codes)
        if found != self.fingerprint:
            raise damaged(path, "its rows do not match its fingerprint")
        if fingerprint not in (None, found):
            raise DataError(
                f"{path}: holds another image table than before (fingerprint {found}, expected {fingerprint}); "
                "run the stages that depend on it again"
            )
        if self.storage == "raw":
            self._pixels = [_pixels_of(image, layout.row_bytes) for image in self._images]

    @classmethod
    def open(cls, path: str | Path, *, fingerprint: str | None = None) -> ImageTable:
        """Open a table.

        Parameters
        ----------
        path : str or Path
            The file, or the folder that holds it as ``images.arrow``; a URI that ``pyarrow.fs`` knows must name the
            file, which is copied to a local cache.
        fingerprint : str, optional
            What it must be.

        Raises
        ------
        DataError
            If there is no such file, it is no image table or is damaged, has another format version or another
            fingerprint.
        """
        file = local_copy(path)
        return cls(str(path), file / FILE_NAME if file.is_dir() else file, fingerprint)

    def __len__(self) -> int:
        return len(self._ids)

    def __repr__(self) -> str:
        return f"ImageTable({self.path!r}, {len(self)} images {self.image_shape}, {len(self.classes)} classes)"

    def __reduce__(self) -> tuple[object, ...]:
        return _reopen, (self.path, self.fingerprint)

    def split(self, *names: str) -> ImageSplit:
        """Return the rows of one or several splits, in the table's order.

        Raises
        ------
        ValueError
            If a name is no split.
        """
        unknown = [name for name in names if name not in SPLITS]
        if unknown or not names:
            raise ValueError(f"split names must be of {', '.join(SPLITS)}, got {', '.join(unknown) or 'none'}")
        codes = [SPLITS.index(name) for name in names]
        return ImageSplit(self, np.flatnonzero(np.isin(self._codes, codes)))

    def counts(self) -> dict[str, dict[str, int]]:
        """Return how many samples each split has of each class, `NO_LABEL` for those without a label."""
        found: dict[str, dict[str, int]] = {}
        for code, split in enumerate(SPLITS):
            # Shifted by one, so that bin 0 counts the missing labels.
            numbers = np.bincount(self._labels[self._codes == code] + 1, minlength=len(self.classes) + 1).tolist()
            found[split] = {name: n for name, n in zip((NO_LABEL, *self.classes), numbers, strict=True) if n}
        return found

    def read(self, rows: np.ndarray) -> torch.Tensor:
        """Read the images of some rows of the table.

        Parameters
        ----------
        rows : (n,) int64 array
            In [0, len(table)), in any order.

        Returns
        -------
        images : (n, C, H, W) uint8 tensor
            A copy: writing to it changes nothing else.
        """
        images = torch.empty((len(rows), *self.image_shape), dtype=torch.uint8)
        if not len(rows):
            return images
        if self.storage == "raw":
            self._gather(rows, images.numpy().reshape(len(rows), -1))
        else:
            self._decode(rows, images.numpy())
        return images

    def _gather(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Copy pixels from the memory map, record batch by record batch."""
        if len(self._pixels) == 1:
            np.take(self._pixels[0], rows, axis=0, out=out, mode="clip")  # other modes than clip go through a buffer
            return
        for places, batch, inner in self._by_batch(rows):
            out[places] = self._pixels[batch][inner]

    def _decode(self, rows: np.ndarray, out: np.ndarray) -> None:
        from pipeline.data.pixels import UnreadableImageError, decode

        def work(part: tuple[np.ndarray, int, np.ndarray]) -> None:
            for place, row in zip(part[0].tolist(), part[2].tolist(), strict=True):
                try:
                    out[place] = decode(self._images[part[1]][row].as_py(), self.image_shape)
                except UnreadableImageError as error:
                    raise damaged(self.path, f"an image of it {error}") from None

        pieces = [
            (places[start : start + _PIECE], batch, inner[start : start + _PIECE])
            for places, batch, inner in self._by_batch(rows)
            for start in range(0, len(places), _PIECE)
        ]
        if len(pieces) == 1:
            work(pieces[0])
        else:
            list(self._threads.map(work, pieces))

    def _by_batch(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, int, np.ndarray]]:
        """Yield for each record batch in use: the places in `rows`, its number, and the rows within it."""
        order = np.argsort(rows, kind="stable")  # ascending, so that the file is read from front to back
        ordered = rows[order]
        bounds = np.concatenate(([0], np.searchsorted(ordered, self._ends)))
        for batch in np.flatnonzero(np.diff(bounds)).tolist():
            part = slice(bounds[batch], bounds[batch + 1])
            yield order[part], batch, ordered[part] - (self._ends[batch] - len(self._images[batch]))

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(_THREADS, thread_name_prefix="decode")  # Pillow decodes without the interpreter lock


class ImageSplit:
    """Some rows of an image table. Made by `ImageTable.split`; pickled as the table's path and the rows.

    Parameters
    ----------
    table : ImageTable
    rows : (N,) int64 array
        Rows of the table.

    Attributes
    ----------
    table : ImageTable
    """

    def __init__(self, table: ImageTable, rows: np.ndarray) -> None:
        self.table, self._rows = table, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"ImageSplit({len(self)} of {self.table!r})"

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by class number."""
        return self.table.classes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return self.table.image_shape

    @cached_property
    def ids(self) -> list[str]:
        """Sample ids, 32 hexadecimal digits each."""
        return [row.tobytes().hex() for row in self.raw_ids]

    @cached_property
    def raw_ids(self) -> np.ndarray:
        """Sample ids as they are stored, an (N, 16) uint8 array."""
        return self.table._ids[self._rows]

    @cached_property
    def numbers(self) -> torch.Tensor:
        """A number for each sample that stands for its content: the first half of its id, an (N,) int64 tensor."""
        return torch.from_numpy(self.raw_ids[:, :8].copy().view("<i8")[:, 0].astype(np.int64))

    @cached_property
    def labels(self) -> torch.Tensor:
        """Class numbers, an (N,) int64 tensor; -1 where there is none."""
        return torch.from_numpy(self.table._labels[self._rows].astype(np.int64))

    def images(self, rows: torch.Tensor | slice | None = None) -> torch.Tensor:
        """Read images.

        Parameters
        ----------
        rows : (n,) int64 tensor or slice, optional
            Row numbers of this split, in any order and as often as wanted; default: all.

        Returns
        -------
        images : (n, C, H, W) uint8 tensor

        Raises
        ------
        IndexError
            If a row number is not in [0, N).
        """
        return self.table.read(self._resolve(rows))

    def take(self, rows: torch.Tensor | slice) -> ImageSplit:
        """Return some rows of this split as a split of their own; `rows` as in `images`."""
        return ImageSplit(self.table, self._resolve(rows))

    def shard(self, rank: int, world_size: int) -> ImageSplit:
        """Return one rank's share: the shares are contiguous, disjoint, and differ by one sample at most.

        The rows of a split are in random order, so that each share is a fair sample of it.

        Raises
        ------
        ValueError
            If `rank` is not in [0, world_size).
        """
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
        return self.take(slice(len(self) * rank // world_size, len(self) * (rank + 1) // world_size))

    def batches(self, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (rows, images) of at most `batch_size` samples, in order, until all were given.

        Raises
        ------
        ValueError
            If `batch_size` is not positive.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        for start in range(0, len(self), batch_size):
            rows = torch.arange(start, min(start + batch_size, len(self)))
            yield rows, self.images(rows)

    def _resolve(self, rows: torch.Tensor | slice | None) -> np.ndarray:
        if rows is None:
            return self._rows
        if isinstance(rows, slice):
            return self._rows[rows]
        numbers = rows.numpy(force=True)
        if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
            raise IndexError(f"rows must be a vector of integers, got {rows.dtype} of shape {tuple(rows.shape)}")
        if len(numbers) and (numbers.min() < 0 or numbers.max() >= len(self)):
            raise IndexError(f"rows must be in [0, {len(self)}), got {numbers.min()} to {numbers.max()}")
        return self._rows[numbers]


def _reopen(path: str, fingerprint: str) -> ImageTable:
    return ImageTable.open(path, fingerprint=fingerprint)


def _columns_of(batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return ids (n, 16), labels (n,) and split codes (n,) of one record batch."""
    split = batch.column("split")
    if split.dictionary.to_pylist() != list(SPLITS):
        raise pa.ArrowInvalid("its splits have other names")
    ids = _pixels_of(batch.column("sample_id"), 16)
    return ids, batch.column("label").fill_null(UNLABELLED).to_numpy(), split.indices.to_numpy()


def _pixels_of(values: pa.Array, size: int) -> np.ndarray:
    """Return a fixed-size binary column as an (n, size) uint8 array over the very same memory."""
    content = np.frombuffer(values.buffers()[1], dtype=np.uint8, count=(values.offset + len(values)) * size)
    return content.reshape(-1, size)[values.offset :]
