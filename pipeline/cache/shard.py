"""One shard: an Arrow file of ids and tensors that is written whole or not at all, and mapped when it is read."""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.errors import FacultyError

FORMAT_VERSION = 1
ID_BYTES = 16
WRITING = ".writing-"
_KEY = b"faculty.outputs"
_NAME = re.compile(r"([0-9a-f]{32})-([0-9]+)\.arrow")
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.bool,
    )
}


class CacheError(FacultyError):
    """The cache can't be read or written; the message names the folder and the remedy."""


class MissingOutputError(CacheError, KeyError):
    """An image that was asked for has no stored output."""

    __str__ = Exception.__str__  # that of KeyError puts the message in quotes


class BrokenShardError(Exception):
    """A file of the right size that is no shard of this format."""


@dataclass(frozen=True)
class Column:
    """One tensor of a shard.

    Attributes
    ----------
    rows : (n, B) uint8 array
        The bytes of each image's part, over a memory map when they were read.
    dtype : torch.dtype
    shape : tuple of int
        Of one image's part.
    """

    rows: np.ndarray
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Shard:
    """What some images were given.

    Attributes
    ----------
    ids : (n, 16) uint8 array
    columns : dict
        Name → column, in the order of the names.
    about : dict
        Name → text.
    checksum : str
        SHA-256 of all of it, 64 hexadecimal digits: as found in the file when it was read.
    """

    ids: np.ndarray
    columns: dict[str, Column]
    about: dict[str, str]
    checksum: str

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def layout(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of one image's part: what shards must have in common to be read together."""
        return {name: column.shape for name, column in self.columns.items()}

    @classmethod
    def of(cls, ids: np.ndarray, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None) -> Shard:
        """Check values and lay them out as rows of bytes; those of contiguous tensors on the CPU are not copied.

        Raises
        ------
        ValueError
            If there is nothing to store, or a shape, dtype or name is not one that can be stored.
        """
        ids = checked_ids(ids)
        if not len(ids) or not tensors:
            raise ValueError(f"a shard needs at least one image and one tensor, got {len(ids)} and {len(tensors)}")
        columns = {name: _column_of(name, tensors[name], len(ids)) for name in sorted(tensors)}
        texts = {str(name): str(text) for name, text in sorted((about or {}).items())}
        return cls(ids, columns, texts, checksum_of(ids, columns, texts))

    def intact(self) -> bool:
        """Whether ids, tensors and metadata have the checksum that was stored with them. Reads all of it."""
        return checksum_of(self.ids, self.columns, self.about) == self.checksum


def checked_ids(ids: np.ndarray) -> np.ndarray:
    """Return ids as a contiguous array.

    Raises
    ------
    ValueError
        If they are no (n, 16) uint8 array.
    """
    if not isinstance(ids, np.ndarray) or ids.dtype != np.uint8 or ids.ndim != 2 or ids.shape[1] != ID_BYTES:
        found = f"{ids.dtype} of shape {ids.shape}" if isinstance(ids, np.ndarray) else type(ids).__name__
        raise ValueError(f"ids must be an (n, {ID_BYTES}) uint8 array, got {found}")
    return np.ascontiguousarray(ids)


def checksum_of(ids: np.ndarray, columns: Mapping[str, Column], about: Mapping[str, str]) -> str:
    """Return the SHA-256 of all that a shard holds."""
    head = json.dumps([FORMAT_VERSION, len(ids), _described(columns), about], sort_keys=True)
    digest = hashlib.sha256(head.encode())
    digest.update(ids.data)
    for name in sorted(columns):
        digest.update(columns[name].rows.data)
    return digest.hexdigest()


def write_shard(folder: Path, shard: Shard) -> str:
    """Write a shard to a folder that exists; it appears under its name when it is complete.

    Returns
    -------
    name : str
        ``<first half of the checksum>-<bytes of the file>.arrow``. A file of another size than its name says was cut
        off, or is being copied.

    Raises
    ------
    OSError
        If it can't be written; nothing is left then. `FileNotFoundError` if the folder went away meanwhile.
    """
    schema = pa.schema(
        [
            pa.field("id", pa.binary(ID_BYTES), nullable=False),
            *(pa.field(name, pa.binary(c.rows.shape[1]), nullable=False) for name, c in shard.columns.items()),
        ],
        metadata={
            _KEY: json.dumps(
                {
                    "version": FORMAT_VERSION,
                    "tensors": _described(shard.columns),
                    "about": shard.about,
                    "checksum": shard.checksum,
                }
            ).encode()
        },
    )
    arrays = [_fixed_binary(shard.ids), *(_fixed_binary(column.rows) for column in shard.columns.values())]
    temporary = folder / f"{WRITING}{uuid.uuid4().hex}"
    try:
        with temporary.open("xb") as sink:
            with pa.ipc.new_file(sink, schema) as writer:
                writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
            sink.flush()
            os.fsync(sink.fileno())  # else a crash of the machine could leave the name on an empty file
            size = os.fstat(sink.fileno()).st_size
        name = f"{shard.checksum[:32]}-{size}.arrow"
        temporary.replace(folder / name)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return name


def shards_in(folder: Path) -> Iterator[tuple[os.DirEntry[str], os.stat_result, bool]]:
    """Yield the files of a folder that are named like shards, in the order of their names.

    Yields
    ------
    entry, stat
    whole : bool
        Whether the file is as long as its name says.
    """
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except FileNotFoundError:
        return
    for entry in found:
        if named := _NAME.fullmatch(entry.name):
            try:
                stat = entry.stat()
            except FileNotFoundError:
                continue
            yield entry, stat, stat.st_size == int(named[2])


def open_shard(path: Path) -> Shard:
    """Map a shard. Only its metadata is read; no file stays open, and the map outlives the file's name.

    Raises
    ------
    BrokenShardError
        If it is no shard of this format.
    OSError
        If it can't be opened.
    """
    with pa.memory_map(str(path)) as source:
        try:
            reader = pa.ipc.open_file(source)
            if reader.num_record_batches != 1:
                raise ValueError(f"{reader.num_record_batches} record batches")
            batch = reader.get_batch(0)
            content: dict[str, Any] = json.loads((reader.schema.metadata or {})[_KEY])
            if content["version"] != FORMAT_VERSION:
                raise ValueError(f"format version {content['version']}")
            columns = {
                name: Column(_rows_of(batch.column(name)), _DTYPES[found["dtype"]], tuple(found["shape"]))
                for name, found in sorted(content["tensors"].items())
            }
            ids = _rows_of(batch.column("id"))
            sizes = {name: column.dtype.itemsize * int(np.prod(column.shape)) for name, column in columns.items()}
            if ids.shape[1] != ID_BYTES or any(columns[name].rows.shape[1] != size for name, size in sizes.items()):
                raise ValueError("columns of another width than its metadata promises")
            shard = Shard(ids, columns, dict(content["about"]), str(content["checksum"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
            raise BrokenShardError(f"{path}: {error}") from None
    if not path.name.startswith(shard.checksum[:32]):
        raise BrokenShardError(f"{path}: its checksum is not the one in its name")
    return shard


def _described(columns: Mapping[str, Column]) -> dict[str, Any]:
    return {
        name: {"dtype": str(column.dtype).removeprefix("torch."), "shape": list(column.shape)}
        for name, column in columns.items()
    }


def _column_of(name: str, values: Tensor, count: int) -> Column:
    if name == "id" or not name:
        raise ValueError(f"{name!r} is not a name that a stored tensor may have")
    if values.dtype not in _DTYPES.values():
        raise ValueError(f"{name} must have one of the dtypes {', '.join(_DTYPES)}, got {values.dtype}")
    if values.ndim < 1 or len(values) != count or not values.numel():
        raise ValueError(f"{name} must have shape ({count}, ...) and hold values, got shape {tuple(values.shape)}")
    flat = values.detach().cpu().reshape(count, -1).contiguous()
    return Column(flat.view(torch.uint8).numpy(), values.dtype, tuple(values.shape[1:]))


def _fixed_binary(rows: np.ndarray) -> pa.Array:
    """Return the rows of an (n, B) uint8 array as n binary values of B bytes, without a copy."""
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(rows.shape[1]), len(rows), [None, pa.py_buffer(rows)])


def _rows_of(values: pa.Array) -> np.ndarray:
    """Return a fixed-size binary column as an (n, B) uint8 array over the very same memory."""
    size = values.type.byte_width
    if not isinstance(values, pa.FixedSizeBinaryArray) or values.offset:
        raise ValueError(f"a column of {values.type}")
    return np.frombuffer(values.buffers()[1], dtype=np.uint8, count=len(values) * size).reshape(-1, size)
