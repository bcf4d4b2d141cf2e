"""Files wherever they are: local paths, and URIs that ``pyarrow.fs`` knows, which are copied to a local cache."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from pyarrow import fs

from pipeline.errors import DataError
from pipeline.places import cache_folder, origin_of

_CHUNK = 8 << 20


def resolve(path: str | Path) -> tuple[fs.FileSystem, str]:
    """Return the file system of a path or URI, and the path in it.

    Raises
    ------
    DataError
        If the URI's scheme is not known or its store can't be reached.
    """
    text = str(path)
    if "://" not in text:
        return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(text))
    try:
        return fs.FileSystem.from_uri(text)
    except (OSError, ValueError) as error:  # pyarrow's errors derive from these two
        raise DataError(f"{text}: can't be reached ({_first_line(error)}); give a local path or a valid URI") from None


def local_copy(path: str | Path, *, cache: Path | None = None) -> Path:
    """Return a local path to a file, fetching it into the cache if it is remote, or part of a run folder that is.

    Parameters
    ----------
    path : str or Path
    cache : Path, optional
        Default: ``$FACULTY_CACHE``, else ``faculty`` in the user's cache folder.

    Raises
    ------
    DataError
        If there is no such file or it can't be read.
    """
    if origin_of(path) is not None:
        from pipeline.data.mirror import here

        return here(path)
    filesystem, inner = resolve(path)
    if isinstance(filesystem, fs.LocalFileSystem):
        return Path(inner)
    return fetch(filesystem, inner, str(path), cache or cache_folder())


def fetch(filesystem: fs.FileSystem, inner: str, uri: str, cache: Path) -> Path:
    """Copy one remote file into a cache folder unless this very version of it is there already.

    A version is told by URI, size and modification time. The copy gets its name when it is complete, so that any number
    of processes may fetch the same file at once.

    Raises
    ------
    DataError
        If there is no such file or it can't be read.
    """
    try:
        info = filesystem.get_file_info(inner)
        if info.type != fs.FileType.File:
            raise DataError(f"{uri}: there is no such file; check the path")
        key = hashlib.blake2b(f"{uri}\n{info.size}\n{info.mtime_ns}".encode(), digest_size=16).hexdigest()
        target = cache / f"{key}-{Path(inner).name}"
        if not target.exists():
            cache.mkdir(parents=True, exist_ok=True)
            with filesystem.open_input_stream(inner) as source:
                _write_whole(source, target)
    except OSError as error:
        raise DataError(f"{uri}: can't be copied to {cache} ({_first_line(error)})") from None
    return target


def publish(local: Path, destination: str) -> None:
    """Copy a local file to a URI; it appears there under its name when it is complete.

    Raises
    ------
    DataError
        If it can't be written.
    """
    filesystem, inner = resolve(destination)
    try:
        parent = inner.rsplit("/", 1)[0]
        filesystem.create_dir(parent, recursive=True)
        temporary = f"{inner}.writing-{os.getpid()}"
        with local.open("rb") as source, filesystem.open_output_stream(temporary) as sink:
            while piece := source.read(_CHUNK):
                sink.write(piece)
        filesystem.move(temporary, inner)
    except OSError as error:
        raise DataError(f"{destination}: can't be written ({_first_line(error)})") from None


def _write_whole(source, target: Path) -> None:
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".fetching-")
    try:
        with os.fdopen(handle, "wb") as sink:
            while piece := source.read(_CHUNK):
                sink.write(piece)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
