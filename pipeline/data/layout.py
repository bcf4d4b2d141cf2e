"""The file of an image table: its schema and metadata, its fingerprint, and how it is written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.data.splits import SPLITS, UNLABELLED
from pipeline.data.whole import replacing
from pipeline.errors import DataError

FILE_NAME = "images.arrow"
FORMAT_VERSION = 1
_KEY = b"faculty.image_table"
_BATCH_BYTES = 32 << 20  # memory while writing, and the reach of one contiguous buffer while reading
_BATCH_ROWS = 1 << 16


@dataclass(frozen=True)
class Layout:
    """What a table's metadata says.

    Attributes
    ----------
    classes : tuple of str
    shape : (int, int, int)
        Channels, height, width.
    storage : {"raw", "encoded"}
    fingerprint : str
        See `fingerprint_of`.
    """

    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    storage: str
    fingerprint: str

    @property
    def row_bytes(self) -> int:
        """Size of one image's pixels in bytes."""
        channels, height, width = self.shape
        return channels * height * width

    def schema(self) -> pa.Schema:
        """Return the Arrow schema, metadata included."""
        image = pa.binary(self.row_bytes) if self.storage == "raw" else pa.binary()
        metadata = {
            "version": FORMAT_VERSION,
            "classes": self.classes,
            "shape": self.shape,
            "storage": self.storage,
            "fingerprint": self.fingerprint,
        }
        return pa.schema(
            [
                pa.field("sample_id", pa.binary(16), nullable=False),
                pa.field("image", image, nullable=False),
                pa.field("label", pa.int32()),
                pa.field("split", pa.dictionary(pa.int8(), pa.string()), nullable=False),
            ],
            metadata={_KEY: json.dumps(metadata).encode()},
        )

    @classmethod
    def parse(cls, schema: pa.Schema, path: str) -> Layout:
        """Read a file's metadata and check that its schema is the one it promises.

        Raises
        ------
        DataError
            If the file is no image table, or one of another format version.
        """
        try:
            content: dict[str, Any] = json.loads((schema.metadata or {})[_KEY])
            version = content["version"]
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{path}: is not an image table of Faculty; write one with `faculty ingest`") from None
        if version != FORMAT_VERSION:
            raise DataError(
                f"{path}: image table has format version {version}, this release reads {FORMAT_VERSION}; "
                "write it anew with `faculty ingest`"
            )
        try:
            channels, height, width = content["shape"]
            classes, storage = tuple(content["classes"]), content["storage"]
            found = cls(classes, (channels, height, width), storage, content["fingerprint"])
            matches = found.schema().equals(schema)
        except (KeyError, TypeError, ValueError):
            matches = False
        if not matches:
            raise damaged(path, "its columns are not those that its metadata promises")
        return found


def damaged(path: str, reason: str) -> DataError:
    """Return the error for a table that can't be what ingest wrote."""
    return DataError(f"{path}: image table is damaged ({reason}); write it anew with `faculty ingest`")


def fingerprint_of(
    classes: tuple[str, ...], shape: tuple[int, int, int], ids: np.ndarray, labels: np.ndarray, codes: np.ndarray
) -> str:
    """Return the hash of all that a table means; neither its path nor the way its pixels are stored is part of it.

    Parameters
    ----------
    classes, shape
        As in `Layout`.
    ids : (N, 16) uint8 array
        They stand for the pixels, of which they are the hash.
    labels : (N,) int array
        As stored: `UNLABELLED` where null.
    codes : (N,) int8 array
        Indices into `SPLITS`.

    Returns
    -------
    fingerprint : str
        32 hexadecimal digits.
    """
    head = json.dumps([FORMAT_VERSION, classes, shape, SPLITS, len(ids)])
    digest = hashlib.blake2b(head.encode(), digest_size=16, person=b"faculty.table")
    for array, dtype in ((ids, "u1"), (labels, "<i4"), (codes, "i1")):
        digest.update(np.ascontiguousarray(array, dtype=dtype).data)
    return digest.hexdigest()


def write_table(
    path: Path,
    layout: Layout,
    ids: np.ndarray,
    labels: np.ndarray,
    codes: np.ndarray,
    images: Callable[[slice], pa.Array],
) -> None:
    """Write a table; the file appears under its name when it is complete.

    Parameters
    ----------
    path : Path
    layout : Layout
    ids, labels, codes
        As in `fingerprint_of`.
    images : callable
        Returns the images of a range of rows as an Arrow array of the schema's type; called once for every record
        batch, so that no more than one is in memory.
    """
    schema = layout.schema()
    rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES // layout.row_bytes))
    names = pa.array(SPLITS, pa.string())
    with replacing(path) as sink, pa.ipc.new_file(sink, schema) as writer:
        for start in range(0, len(ids), rows):
            part = slice(start, min(start + rows, len(ids)))
            columns = [
                fixed_binary(ids[part]),
                images(part),
                pa.array(labels[part], pa.int32(), mask=labels[part] == UNLABELLED),
                pa.DictionaryArray.from_arrays(pa.array(codes[part], pa.int8()), names),
            ]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
            del columns  # before the next ones are made


def fixed_binary(rows: np.ndarray) -> pa.Array:
    """Return the rows of a (N, B) uint8 array as an Arrow array of N binary values of B bytes, without a copy."""
    rows = np.ascontiguousarray(rows)
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(rows.shape[1]), len(rows), [None, pa.py_buffer(rows)])
