"""Images in Parquet files, as Hugging Face lays them out: a struct of bytes and path, or a plain binary column."""

from __future__ import annotations

import contextlib
import glob
import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from pipeline.data.sources import LabelReader, RawSample
from pipeline.data.spec import ParquetSource
from pipeline.data.storage import resolve
from pipeline.errors import DataError

_ROWS = 256  # a read batch; at 100 kB an image that is 25 MB


class ParquetImages:
    """Images in one or many Parquet files.

    Parameters
    ----------
    spec : ParquetSource
    """

    def __init__(self, spec: ParquetSource) -> None:
        self._image, self._label_column = spec.image_column, spec.label_column
        self.where = f"Parquet {spec.path}"
        self._filesystem, self._files = _list_files(spec.path)
        names = spec.classes
        for path in self._files:
            schema = self._checked_schema(path)
            names = names or self._names_in(schema)
        if names is None and self._has_text_labels:
            names = sorted({name for path in self._files for name in self._labels_in(path) if name is not None})
        if not names:
            raise DataError(
                f"{self.where}: has no class names in its metadata; list them in the source's `classes`, in the order "
                "of the labels"
            )
        self.classes = tuple(names)
        self._label = LabelReader(self.classes, self.where)

    def __iter__(self) -> Iterator[RawSample]:
        """Yield the rows of the files in the order of their names."""
        columns = [self._image] + ([self._label_column] if self._label_column is not None else [])
        for path in self._files:
            row = 0
            for batch in self._batches(path, columns):
                labels = batch.column(1).to_pylist() if len(columns) > 1 else [None] * len(batch)
                for image, value in zip(_bytes_of(batch.column(0)), labels, strict=True):
                    origin = f"{path}, row {row}"
                    problem = "" if image is not None else f"has no bytes in column `{self._image}`"
                    yield RawSample(image, self._label(value, origin), origin, problem)
                    row += 1

    def _checked_schema(self, path: str) -> pa.Schema:
        with self._open(path) as file:
            schema = file.schema_arrow
        for field, column in (("image_column", self._image), ("label_column", self._label_column)):
            if column is not None and column not in schema.names:
                raise DataError(
                    f"{path}: has no column `{column}` (it has {', '.join(schema.names)}); set the source's `{field}`"
                )
        kind = schema.field(self._image).type
        if pa.types.is_struct(kind):
            kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else kind
        if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            raise DataError(
                f"{path}: column `{self._image}` is {kind}; it must hold encoded images: binary, or a struct with a "
                "binary field `bytes`"
            )
        self._has_text_labels = False
        if self._label_column is not None:
            kind = schema.field(self._label_column).type
            if pa.types.is_dictionary(kind):
                kind = kind.value_type
            self._has_text_labels = pa.types.is_string(kind) or pa.types.is_large_string(kind)
            if not (self._has_text_labels or pa.types.is_integer(kind) or pa.types.is_null(kind)):
                raise DataError(f"{path}: column `{self._label_column}` is {kind}; labels are integers or strings")
        return schema

    def _names_in(self, schema: pa.Schema) -> list[str] | None:
        """Return the class names that the `datasets` library writes into the schema's metadata."""
        try:
            features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
            names = features[self._label_column]["names"]
        except (KeyError, TypeError, ValueError):
            return None
        return [str(name) for name in names] if isinstance(names, list) and names else None

    def _labels_in(self, path: str) -> Iterator[Any]:
        for batch in self._batches(path, [self._label_column or ""]):
            yield from batch.column(0).unique().to_pylist()

    def _batches(self, path: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
        with self._open(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS, columns=columns, use_threads=False):
                yield batch.select(columns)

    @contextlib.contextmanager
    def _open(self, path: str) -> Iterator[pq.ParquetFile]:
        """Open a file; Arrow's errors while it is read name it."""
        try:
            with self._filesystem.open_input_file(path) as stream, pq.ParquetFile(stream) as file:
                yield file
        except (OSError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(f"{path}: can't be read as Parquet ({reason}); write or download it anew") from None


def _list_files(path: str) -> tuple[fs.FileSystem, list[str]]:
    """Return the file system and the sorted files of a file, a folder or a (local) glob."""
    filesystem, inner = resolve(path)
    try:
        info = filesystem.get_file_info(inner)
        if info.type == fs.FileType.File:
            return filesystem, [inner]
        if info.type == fs.FileType.Directory:
            entries = filesystem.get_file_info(fs.FileSelector(inner, recursive=True))
            files = [entry.path for entry in entries if entry.is_file and entry.path.endswith(".parquet")]
        else:
            files = glob.glob(inner, recursive=True) if isinstance(filesystem, fs.LocalFileSystem) else []
    except OSError as error:
        raise DataError(f"{path}: can't be listed ({str(error).splitlines()[0]}); check the source's `path`") from None
    if not files:
        raise DataError(f"{path}: there is no Parquet file; check the source's `path`")
    return filesystem, sorted(files)


def _bytes_of(column: pa.Array) -> Iterator[bytes | None]:
    if pa.types.is_struct(column.type):
        # StructArray.field ignores the struct's own nulls; flatten applies them.
        column = column.flatten()[column.type.get_field_index("bytes")]
    return (value.as_py() for value in column)
