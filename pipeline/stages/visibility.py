"""Whether every node sees the files that its workers open: asked in seconds, before hours of work are begun.

Workers open the run folder, the teachers' weights, and the cache of their outputs. The images' source, the zoo's file
and word vectors are read by the driver alone, and need not be seen by the others.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UserError
from pipeline.places import cache_folder, is_remote
from pipeline.stages.outputs import cache_root

if TYPE_CHECKING:
    from pipeline.stages.base import Run

_RUN_DIR = "put it on a path that all nodes share, or in a store: run_dir=s3://bucket/folder"
_WEIGHTS = "put the weights on a path that all nodes share, or give their s3:// URI and `sha256` in the zoo"
_CACHE = "set cache.path to a folder that every node can write to"
_STORE = "give the nodes the store's credentials and a way to it, or take a run_dir on a shared path"
_IMPORT = "install this package on every node, or send it along with cluster.runtime_env"


@dataclass(frozen=True)
class Place:
    """Something that a node must see.

    Attributes
    ----------
    setting : str
        What leads to it.
    path : str
        A path, or the URI of a run folder.
    remedy : str
    size : int or None
        Of the file, in bytes; None where it does not matter.
    token : str
        What the file, or the marker of a URI's run folder, must hold.
    writable : bool
        Whether it is a folder that is written to; it is made if need be.
    """

    setting: str
    path: str
    remedy: str
    size: int | None = None
    token: str = ""
    writable: bool = False


def check_nodes(run: Run) -> None:
    """Ask all nodes but the driver's own what they see.

    Raises
    ------
    UserError
        Naming node, setting, path and remedy. Nothing has been started.
    """
    from pipeline.cluster.nodes import ask_nodes, forget_question, leave_question, other_nodes

    nodes = other_nodes()
    if not run.settings.cluster.local:
        # Through its marker: what is written for those that are there now does not stay.
        marker = run.files.root / "run.json"
        leave_question(look_later, places_of(run, marker, marker.read_text("utf-8")), [one for one, _ in nodes])
        run._exits.callback(forget_question)
    if not nodes:
        return
    run.files.push()
    token = uuid.uuid4().hex
    mark = run.files.root / f".seen-{token[:8]}"
    try:
        if run.files.mirror is None:
            mark.write_text(token, encoding="ascii")
        answers = ask_nodes(look_at, places_of(run, mark, token), nodes)
    finally:
        mark.unlink(missing_ok=True)
    found: list[tuple[str, Place | None, str]] = []
    for answer in answers:
        if answer.error is not None:
            found.append((answer.address, None, answer.error))
        else:
            found += [(answer.address, place, why) for place, why in answer.value]
    if found:
        raise UserError(_told(found, len(nodes)))


def look_later(question: tuple[str, Sequence[Place]]) -> str:
    """Return what is wrong with places on a node that has come since the others were asked; runs there."""
    address, places = question
    found = look_at(places)
    return _told([(address, place, why) for place, why in found], 1) if found else ""


def places_of(run: Run, mark: Path, token: str) -> list[Place]:
    """Return what the nodes must see of a run; `mark` is a file in the run folder that holds the token."""
    settings, files = run.settings, run.files
    if files.mirror is not None:
        found = [Place("run_dir", files.place, _STORE, token=files.identity)]
    else:
        found = [
            Place("run_dir", str(mark), _RUN_DIR, token=token),
            Place("run_dir", str(files.root), _RUN_DIR, writable=True),
        ]
    if settings.cache.path:
        found.append(Place("cache.path", str(cache_root(settings)), _CACHE, writable=True))
    for name in run.zoo.names:
        path = run.zoo[name].path
        if path is None or is_remote(path):
            continue
        with contextlib.suppress(OSError):  # what is not here either is the teacher's own fault, and told as such
            found.append(Place(f"teacher {name!r}: source.path", path, _WEIGHTS, size=os.stat(path).st_size))
    return found


def look_at(places: Sequence[Place], root: str = "/") -> list[tuple[Place, str]]:
    """Return what is wrong with places, on the node that runs this; `root` stands for the root of its file system."""
    found = []
    for place in places:
        try:
            why = _store(place) if is_remote(place.path) else _path(place, Path(root) / place.path.lstrip("/"))
        except OSError as error:
            why = error.strerror or str(error)
        if why:
            found.append((place, why))
    return found


def _path(place: Place, path: Path) -> str:
    if place.writable:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".writable-{uuid.uuid4().hex[:8]}"
        probe.touch()
        probe.unlink()
        return ""
    if place.token:
        same = path.read_text(encoding="ascii", errors="replace") == place.token
        return "" if same else "another folder has that name there"
    size = path.stat().st_size
    if place.size is not None and size != place.size:
        return f"another file there, of {size} bytes instead of {place.size}"
    return "" if os.access(path, os.R_OK) else "may not be read"


def _store(place: Place) -> str:
    import json

    from pipeline.data.mirror import Mirror
    from pipeline.errors import FacultyError

    try:
        content = Mirror.of(place.path).store.read("run.json")
    except FacultyError as error:
        return str(error)
    if content is None or json.loads(content).get("id") != place.token:
        return "another run folder, or none, is seen there"
    folder = cache_folder()
    try:
        _path(Place("", "", "", writable=True), folder)
    except OSError as error:
        return f"its mirror in {folder} can't be written: {error.strerror or error}"
    return ""


def _told(found: list[tuple[str, Place | None, str]], nodes: int) -> str:
    """Tell the first fault in one line, and how many there are."""
    address, place, why = found[0]
    if place is None:
        return f"cluster: node {address} can't run this package ({why}); {_IMPORT}"
    path = place.path if place.writable or not place.token or is_remote(place.path) else str(Path(place.path).parent)
    affected = len({one for one, _, _ in found})
    many = f" (as do {affected - 1} more of {nodes} nodes)" if affected > 1 else ""
    more = len({(one.setting, one.path) for _, one, _ in found if one is not None}) - 1
    rest = f"; {more} more paths like it" if more > 0 and place.setting.startswith("teacher") else ""
    return f"{place.setting}: node {address} does not see {path} as this one does ({why}){many}{rest}; {place.remedy}"
