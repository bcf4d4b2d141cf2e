"""NumPy archives read a row at a time: ``numpy.load`` would hold a whole member in memory."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from pipeline.data.storage import local_copy
from pipeline.errors import DataError


class NumpyArchive:
    """A ``.npz`` file.

    Parameters
    ----------
    path : str
        Local, or a URI that ``pyarrow.fs`` knows.

    Raises
    ------
    DataError
        If it can't be read or is no such archive.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._file: Path = local_copy(path)
        try:
            with zipfile.ZipFile(self._file) as archive:
                self._members = set(archive.namelist())
        except OSError as error:
            raise DataError(f"{path}: can't be read ({error.strerror or error}); check the source's `path`") from None
        except zipfile.BadZipFile:
            raise DataError(f"{path}: is no .npz archive or is damaged; write it with numpy.savez") from None

    def read(self, name: str) -> np.ndarray | None:
        """Return a small array, None if the archive has none of that name.

        Raises
        ------
        DataError
            If it is damaged or would need pickle.
        """
        if f"{name}.npy" not in self._members:
            return None
        try:
            with np.load(self._file, allow_pickle=False) as archive:
                return archive[name]
        except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise self._damaged(name, error) from None

    def header(self, name: str) -> tuple[tuple[int, ...], np.dtype]:
        """Return shape and dtype of an array without reading it.

        Raises
        ------
        DataError
            If the archive has none of that name, or it is damaged.
        """
        if f"{name}.npy" not in self._members:
            raise DataError(
                f"{self._path}: has no array `{name}` (it has {', '.join(sorted(self._members))}); "
                f"write it with numpy.savez(..., {name}=...)"
            )
        try:
            with zipfile.ZipFile(self._file) as archive, archive.open(f"{name}.npy") as member:
                return self._header(member, name)
        except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise self._damaged(name, error) from None

    def rows(self, name: str) -> Iterator[np.ndarray]:
        """Yield the rows of an array one after the other.

        Raises
        ------
        DataError
            If it is damaged.
        """
        try:
            with zipfile.ZipFile(self._file) as archive, archive.open(f"{name}.npy") as member:
                shape, dtype = self._header(member, name)
                size = int(np.prod(shape[1:])) * dtype.itemsize
                for _ in range(shape[0]):
                    content = member.read(size)
                    if len(content) < size:
                        raise ValueError("it ends too early")
                    yield np.frombuffer(content, dtype=dtype).reshape(shape[1:])
        except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise self._damaged(name, error) from None

    def _header(self, member: IO[bytes], name: str) -> tuple[tuple[int, ...], np.dtype]:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, columns_first, dtype = read(member)
        if columns_first and len(shape) > 1:
            raise DataError(f"{self._path}: `{name}` is in Fortran order; write numpy.ascontiguousarray of it")
        return shape, dtype

    def _damaged(self, name: str, error: Exception) -> DataError:
        return DataError(f"{self._path}: array `{name}` can't be read ({error}); write the archive anew")
