"""The files of a run folder in a store, by their paths in it: listed, fetched and put whole, and tried again."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pipeline.errors import StageError

if TYPE_CHECKING:
    from pyarrow import fs

Value = TypeVar("Value")
State = tuple[int, int]  # of a local file: bytes, time of its last change [ns]
Version = tuple[int, int]  # of the store's: bytes, second of its last change; some stores tell no more

_PIECE = 8 << 20
_PAUSES = (0.5, 2.0, 8.0)  # seconds between the tries: a network may be away for a moment
_LASTING = ("ACCESS_DENIED", "NO_SUCH_BUCKET", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH")
_WHOLE_AT_ONCE = ("s3", "gcs", "abfs")  # stores that show an object when it is complete


class Store:
    """One run folder in a store.

    Parameters
    ----------
    uri : str
        As messages name it.
    filesystem : pyarrow.fs.FileSystem, optional
        By default that of the URI, which is asked for at the first use.
    root : str
        The run folder's path in `filesystem`.

    Raises
    ------
    StageError
        By all methods, when the store still refuses after a few tries.
    """

    def __init__(self, uri: str, filesystem: fs.FileSystem | None = None, root: str = "") -> None:
        self.uri = uri
        self._filesystem, self._root = filesystem, root.rstrip("/")
        self._lock = threading.Lock()

    def version(self, relative: str) -> Version | None:
        """Return the version of a file; None where there is none. Of a folder: (-1, 0)."""
        from pyarrow.fs import FileType

        info = self._tried(lambda store: store.get_file_info(self._inner(relative)), f"{relative} can't be looked for")
        if info.type == FileType.NotFound:
            return None
        return _version(info) if info.type == FileType.File else (-1, 0)

    def changed(self, relative: str) -> float | None:
        """Return when a file was changed, in seconds since 1970 by the store's clock; None where there is none."""
        found = self.version(relative)
        return None if found is None else float(found[1])

    def listed(self, folder: str, *, deep: bool = True) -> dict[str, Version]:
        """Return the files under a folder, path to version; without `deep` also its folders, as (-1, 0)."""
        from pyarrow.fs import FileSelector, FileType

        def ask(store: fs.FileSystem) -> list[fs.FileInfo]:
            return store.get_file_info(FileSelector(self._inner(folder), allow_not_found=True, recursive=deep))

        infos = self._tried(ask, f"{folder or 'it'} can't be listed")
        return {
            info.path.removeprefix(self._root).strip("/"): _version(info) if info.type == FileType.File else (-1, 0)
            for info in infos
            if info.type == FileType.File or not deep
        }

    def get(self, relative: str, target: Path) -> tuple[State, Version] | None:
        """Fetch a file, which gets its name when it is whole; None where there is none any more."""
        temporary = target.with_name(f".{target.name}.fetching-{uuid.uuid4().hex[:8]}")

        def fetch(store: fs.FileSystem) -> tuple[State, Version]:
            version = _version(store.get_file_info(self._inner(relative)))
            with store.open_input_stream(self._inner(relative)) as source, _room(target.parent):
                target.parent.mkdir(parents=True, exist_ok=True)
                with temporary.open("wb") as sink:
                    while piece := self._asked(lambda: source.read(_PIECE)):
                        sink.write(piece)
            state = state_of(temporary)
            if state[0] != version[0]:
                raise OSError(f"{state[0]} of {version[0]} bytes came")
            os.replace(temporary, target)
            return state, version

        try:
            return self._tried(fetch, f"{relative} can't be fetched")
        except FileNotFoundError:
            return None
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def put(self, source: Path, relative: str) -> tuple[State, Version] | None:
        """Send a file, which appears when it is whole; None where there is none any more."""

        def send(store: fs.FileSystem) -> tuple[State, Version]:
            state = state_of(source)
            with source.open("rb") as file:
                sent = _write(store, self._inner(relative), iter(lambda: file.read(_PIECE), b""))
            found = _version(store.get_file_info(self._inner(relative)))
            if found[0] != sent:
                raise OSError(f"{found[0]} of {sent} bytes arrived")
            return state, found

        try:
            return self._tried(send, f"{relative} can't be written")
        except FileNotFoundError:
            return None

    def read(self, relative: str) -> bytes | None:
        """Return what a small file holds; None where there is none."""

        def ask(store: fs.FileSystem) -> bytes:
            with store.open_input_stream(self._inner(relative)) as stream:
                return bytes(stream.read())

        try:
            return self._tried(ask, f"{relative} can't be read")
        except FileNotFoundError:
            return None

    def write(self, relative: str, content: bytes) -> None:
        """Write a small file."""
        self._tried(lambda store: _write(store, self._inner(relative), [content]), f"{relative} can't be written")

    def delete(self, relative: str) -> None:
        """Delete a file, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._tried(lambda store: store.delete_file(self._inner(relative)), f"{relative} can't be deleted")

    def _tried(self, call: Callable[[fs.FileSystem], Value], what: str) -> Value:
        """Ask the store; again after a pause where that may help."""
        pauses = iter(_PAUSES)
        while True:
            try:
                return call(self._opened())
            except FileNotFoundError:
                raise
            except OSError as error:
                line = (str(error).splitlines() or [type(error).__name__])[0][:300]
                pause = next(pauses, None)
                if pause is None or any(text in line for text in _LASTING):
                    raise StageError(
                        f"run_dir {self.uri}: {what} ({line}); check the store and its credentials, and run again"
                    ) from None
                time.sleep(pause)

    @staticmethod
    def _asked(call: Callable[[], bytes]) -> bytes:
        """Keep the store's errors apart from those of the disk that it is copied to."""
        try:
            return call()
        except OSError as error:
            raise _StoreError(*error.args) from None

    def _opened(self) -> fs.FileSystem:
        with self._lock:
            if self._filesystem is None:
                from pipeline.data.storage import resolve

                uri = self.uri
                if uri.startswith("s3://") and "allow_delayed_open" not in uri:
                    uri += f"{'&' if '?' in uri else '?'}allow_delayed_open=true"  # one request a file instead of three
                self._filesystem, root = resolve(uri)
                self._root = root.rstrip("/")
            return self._filesystem

    def _inner(self, relative: str) -> str:
        self._opened()
        return "/".join(part for part in (self._root, relative) if part)


class _StoreError(OSError):
    """What a store said while it was read."""


@contextlib.contextmanager
def _room(folder: Path) -> Iterator[None]:
    """Let an error of the disk name it; it would only repeat itself."""
    try:
        yield
    except _StoreError:
        raise
    except OSError as error:
        raise no_room(folder, error) from None


def no_room(folder: Path, error: OSError) -> StageError:
    """Return the error of a mirror that can't be written."""
    return StageError(f"{folder}: can't be written ({error.strerror or error}); set FACULTY_CACHE to a folder that can")


def state_of(path: Path) -> State:
    """Return what tells one content of a local file from another."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _version(info: fs.FileInfo) -> Version:
    return int(info.size or 0), int((info.mtime_ns or 0) // 1_000_000_000)


def _write(store: fs.FileSystem, inner: str, pieces: Iterable[bytes]) -> int:
    """Write a file that appears when it is whole; return its bytes."""
    at_once = store.type_name in _WHOLE_AT_ONCE
    folder, _, name = inner.rpartition("/")
    target, size, pieces = inner, 0, iter(pieces)
    if not at_once:
        target = f"{folder}/.{name}.sending-{uuid.uuid4().hex[:8]}".lstrip("/" if not folder else "")
        if folder:
            store.create_dir(folder, recursive=True)
    first = next(pieces, b"")  # so that what can't be read leaves nothing
    try:
        with store.open_output_stream(target) as sink:
            for piece in itertools.chain([first], pieces):
                sink.write(piece)
                size += len(piece)
        if not at_once:
            store.move(target, inner)
    except BaseException:
        # Leaving the block has closed the stream, which may show the part that came: take it away.
        with contextlib.suppress(OSError):
            store.delete_file(target)
        raise
    return size
