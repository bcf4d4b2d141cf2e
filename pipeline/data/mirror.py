"""A run folder in a store (S3, GCS, …) and its mirror on this machine: what is read is fetched, what is new is sent.

The store is the truth. Readers ask `here` for a path and get a local one; writers `share` what others need. Both leave
paths alone that mirror nothing, so that a run folder on a disk costs no request and no copy.

A file gets its name when it is whole, on both sides: fetched ones by rename, sent ones because a store shows an object
when it is complete (others than object stores by rename, too). Beside the mirror's files lies a list of what each was
when it was last the same on both sides. A file that is not as the list says was written here since, and is the newer
one.
"""

from __future__ import annotations

import fnmatch
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from pipeline.data.objects import State, Store, Version, state_of
from pipeline.data.seen import Seen
from pipeline.places import local_place, origin_of, own

if TYPE_CHECKING:
    from pyarrow import fs

LIST = ".mirror.jsonl"
# Names that say that the files beside them are whole; they are sent after those, in this order.
LAST = ("teaching.json", "row.json", "done.json", "stage.json")
# Folders at the top that are no part of the mirror: checkpoints go to the store by themselves.
APART = ("ray",)
# Folders at the top in which a file that is gone here is to be gone in the store: what was sent is not sent again.
EMPTIED = ("tracking-journal",)
_SIDE_BY_SIDE = 16


def here(path: str | Path, *, newest: bool = False, but: Collection[str] = ()) -> Path:
    """Return the local path of a file or folder of a run folder, fetched if need be; other paths as they are.

    Parameters
    ----------
    path : str or Path
        May be the mirror's path on another machine.
    newest : bool
        Compare with the store even if this process has done so before: for files that others write anew.
    but : collection of str
        Names of files that are not fetched with a folder.

    Raises
    ------
    StageError
        If the store can't be reached. Of a file that is in neither place, the path comes back all the same.
    """
    found = origin_of(path)
    return Path(path) if found is None else Mirror.of(found[0]).ensure(found[1], newest=newest, but=but)


def here_all(paths: Iterable[Path]) -> list[Path]:
    """Return the local paths of several files, fetched side by side."""
    paths = list(paths)
    if not any(map(origin_of, paths)):
        return paths
    with ThreadPoolExecutor(_SIDE_BY_SIDE) as threads:
        return list(threads.map(here, paths))


def names_in(folder: Path) -> set[str]:
    """Return the names of the files in a folder: on this machine, or in the store that it mirrors."""
    found, local = origin_of(folder), own(folder)
    names = {entry.name for entry in os.scandir(local)} if local.is_dir() else set()
    if found is None:
        return names
    return names | {PurePosixPath(name).name for name in Mirror.of(found[0]).listed(found[1])}


def share(*paths: str | Path) -> None:
    """Send files, or all in folders, to the store that they mirror; those that say that others are whole go last.

    Raises
    ------
    StageError
        If the store does not take them.
    """
    for uri, inner in _by_store(paths).items():
        Mirror.of(uri).share(inner)


def forget(*paths: str | Path) -> None:
    """Delete files here, and in the store that they mirror."""
    for path in paths:
        own(path).unlink(missing_ok=True)
    for uri, inner in _by_store(paths).items():
        Mirror.of(uri).forget(inner)


def _by_store(paths: Iterable[str | Path]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in paths:
        origin = origin_of(path)
        if origin is not None:
            found.setdefault(origin[0], []).append(origin[1])
    return found


class Mirror:
    """One run folder in a store, and the folder of this machine that mirrors it.

    Parameters
    ----------
    uri : str
        As messages name it.
    local : Path
    filesystem : pyarrow.fs.FileSystem, optional
        The store; by default that of the URI.
    root : str
        The run folder's path in `filesystem`.

    Attributes
    ----------
    store : Store
    may_send : callable
        Called before anything is sent; raises where it must not be. See `pipeline.data.claim`.
    """

    _known: dict[tuple[str, Path], Mirror] = {}  # noqa: RUF012
    _guard = threading.Lock()

    def __init__(self, uri: str, local: Path, filesystem: fs.FileSystem | None = None, root: str = "") -> None:
        self.uri, self.local = uri, Path(local)
        self.store = Store(uri, filesystem, root)
        self.may_send: Callable[[], None] = freely
        self._seen = Seen(self.local / LIST)
        self._checked: set[tuple[str, tuple[str, ...]]] = set()

    @classmethod
    def of(cls, uri: str) -> Mirror:
        """Return this process's mirror of a URI."""
        key = uri, local_place(uri)
        with cls._guard:
            return cls._known.setdefault(key, cls(*key))

    # What is read

    def ensure(self, relative: str, *, newest: bool = False, but: Collection[str] = ()) -> Path:
        """Fetch a file, or the files of a folder, unless they are here; see `here`."""
        local, key = self.local / relative, (relative, tuple(but))
        if not newest and key in self._checked and local.exists():
            return local
        version = self.store.version(relative)
        if version is None:
            return local
        if version[0] < 0:
            found = self.listed(relative)
            self._bring({name: one for name, one in found.items() if PurePosixPath(name).name not in but})
        else:
            self._bring({relative: version})
        self._checked.add(key)
        return local

    def pull(self, *patterns: str) -> None:
        """Fetch all files that match a pattern such as ``teachers/*/row.json``, unless they are here as they are.

        One request lists what is under the part before the first star.
        """
        for pattern in patterns:
            if "*" not in pattern:
                self.ensure(pattern, newest=True)
                continue
            found = self.listed(pattern.partition("*")[0].rpartition("/")[0])
            self._bring({name: found[name] for name in fnmatch.filter(found, pattern)})

    def look(self, *patterns: str) -> None:
        """Fetch what matches the patterns, and drop what matches and has been deleted in the store; for readers.

        A run that goes on in this very mirror is not disturbed: what it has written since stays.
        """
        self._refresh()
        known = self._seen.all()  # before the store is listed: what is known to be there by now is among it
        found = self.listed("")
        for pattern in patterns:
            for name in set(fnmatch.filter(known, pattern)) - found.keys():
                if self._state(name) == known[name][0]:
                    self._drop(name)
        self._bring({name: found[name] for pattern in patterns for name in fnmatch.filter(found, pattern)})

    def reconcile(self) -> None:
        """Make the mirror agree with the store, by deleting: what has changed there is fetched when it is read.

        Only for who holds the run folder. What was written here and never came to be sent stays, and is sent.
        """
        self._refresh()
        self._checked.clear()
        known, found = self._seen.all(), self.listed("")
        for name, _ in list(self._walk()):
            record = known.get(name)
            changed = name in found and (record is None or record[1] != found[name])
            if changed or (name not in found and record is not None):
                self._drop(name)

    def listed(self, folder: str) -> dict[str, Version]:
        """Return the store's files under a folder, path to version; without what is no part of a mirror."""
        if folder:
            return {name: version for name, version in self.store.listed(folder).items() if _counts(name)}
        found: dict[str, Version] = {}
        for name, version in self.store.listed("", deep=False).items():
            if _counts(name):
                found |= self.listed(name) if version[0] < 0 else {name: version}
        return found

    # What is written

    def push(self) -> None:
        """Send all that was written here since it was last sent; delete what the journal no longer needs."""
        self._refresh()
        known = self._seen.all()
        self._send([name for name, state in self._walk() if name not in known or known[name][0] != state])
        self.forget(name for name in known if name.split("/")[0] in EMPTIED and not (self.local / name).exists())

    def share(self, relatives: Iterable[str]) -> None:
        """Send files, or all in folders."""
        names: list[str] = []
        for relative in relatives:
            inside = (self.local / relative).is_dir()
            names += [name for name, _ in self._walk(relative)] if inside else [relative]
        self._refresh()
        self._send([name for name in names if (self._seen.get(name) or (None,))[0] != self._state(name)])

    def forget(self, relatives: Iterable[str]) -> None:
        """Delete files in the store."""

        def delete(name: str) -> None:
            self.store.delete(name)
            self._seen.note(name, None, None)

        _side_by_side(delete, relatives)

    # How

    def _bring(self, wanted: Mapping[str, Version]) -> None:
        self._refresh()

        def bring(name: str) -> None:
            state, record = self._state(name), self._seen.get(name)
            if state is not None and (record is None or record[0] != state or record[1] == wanted[name]):
                return  # written here since, or the same
            fetched = self.store.get(name, self.local / name)
            if fetched is not None:
                self._seen.note(name, *fetched)

        _side_by_side(bring, wanted)

    def _send(self, names: Collection[str]) -> None:
        def send(name: str) -> None:
            sent = self.store.put(self.local / name, name)
            if sent is not None:
                self._seen.note(name, *sent)

        if names:
            self.may_send()
        marks = [name for name in names if PurePosixPath(name).name in LAST]
        _side_by_side(send, [name for name in names if name not in set(marks)])
        for name in sorted(marks, key=lambda name: LAST.index(PurePosixPath(name).name)):
            send(name)

    def _refresh(self) -> None:
        if not self._seen.refresh():  # there is another mirror in its place
            self._checked.clear()

    def _walk(self, folder: str = "") -> Iterator[tuple[str, State]]:
        """Yield the files of the mirror that count, with their state."""
        for place, folders, names in os.walk(self.local / folder):
            inside = Path(place).relative_to(self.local).as_posix()
            prefix = "" if inside == "." else f"{inside}/"
            folders[:] = [name for name in folders if _counts(f"{prefix}{name}")]
            for name in names:
                state = self._state(f"{prefix}{name}")
                if _counts(f"{prefix}{name}") and state is not None:
                    yield f"{prefix}{name}", state

    def _state(self, relative: str) -> State | None:
        try:
            return state_of(self.local / relative)
        except OSError:
            return None

    def _drop(self, name: str) -> None:
        (self.local / name).unlink(missing_ok=True)
        self._seen.note(name, None, None)


def freely() -> None:
    """Let anything be sent."""


def _counts(relative: str) -> bool:
    """Whether a path belongs to the run folder's content: hidden files are of one machine, or not whole yet."""
    parts = PurePosixPath(relative).parts
    return bool(parts) and parts[0] not in APART and not any(part.startswith(".") for part in parts)


def _side_by_side(call: Callable[[str], None], names: Iterable[str]) -> None:
    names = list(names)
    if len(names) < 2:
        for name in names:
            call(name)
        return
    with ThreadPoolExecutor(min(_SIDE_BY_SIDE, len(names))) as threads:
        calls = [threads.submit(call, name) for name in names]
        try:
            for one in calls:
                one.result()
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)  # else each would wait for a store that is away
            raise
