"""The zoo: an ordered catalogue of teachers, read from one YAML file, or lazily from one Parquet file."""

from __future__ import annotations

import difflib
import hashlib
import heapq
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, TeacherError
from pipeline.models.files import file_sha256, missing
from pipeline.models.spec import TeacherSpec, ZooFile
from pipeline.places import is_remote, join
from pipeline.strict import load_yaml, parse_yaml, validate

_LISTED = 20  # names in an error
_COMPARED = 200  # names that are compared letter by letter with a wrong one


class Zoo(Mapping[str, TeacherSpec]):
    """Teachers by name, in the file's order.

    Parameters
    ----------
    teachers : iterable of TeacherSpec
        With absolute paths.
    where : str
        What to call the zoo in errors: its file.

    Notes
    -----
    It holds no weights: a spec is a reference, which travels to another process as it is.
    """

    def __init__(self, teachers: Iterable[TeacherSpec], *, where: str = "zoo") -> None:
        # In order; what stands for a teacher is its spec here, and may be its row in a zoo that reads lazily.
        self._entries: dict[str, Any] = {teacher.name: teacher for teacher in teachers}
        self.where = where

    def _spec(self, name: str, entry: Any) -> TeacherSpec:
        return entry

    def _with(self, entries: dict[str, Any]) -> Zoo:
        """Return a zoo of the same kind and origin with other entries."""
        other = object.__new__(type(self))
        other.__dict__ |= self.__dict__ | {"_entries": entries}
        return other

    @property
    def names(self) -> tuple[str, ...]:
        """All names, in order."""
        return tuple(self._entries)

    def __getitem__(self, name: str) -> TeacherSpec:
        if name not in self._entries:
            raise self._unknown(str(name))
        return self._spec(name, self._entries[name])

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def _unknown(self, name: str) -> ConfigError:
        near = _nearest(name, self._entries)
        listed = ", ".join(list(self._entries)[:_LISTED]) + (", …" if len(self) > _LISTED else "")
        hint = f"it has: {listed}" if near is None else f"did you mean {near!r}?"
        return ConfigError(f"{self.where}: there is no teacher {name!r}; {hint}")

    def only(self, names: Iterable[str]) -> Zoo:
        """Return a zoo of these teachers alone, still in the file's order.

        Raises
        ------
        ConfigError
            When one is not in the zoo, or none is asked for.
        """
        wanted = dict.fromkeys(names)
        if not wanted:
            raise ConfigError(f"{self.where}: `only` is empty; name at least one teacher, or leave it out")
        for name in wanted:
            if name not in self._entries:
                raise self._unknown(name)
        return self._with({name: entry for name, entry in self._entries.items() if name in wanted})

    def with_specs(self, specs: Mapping[str, TeacherSpec]) -> Zoo:
        """Return the same zoo with other specs for some of its teachers."""
        for name in specs:
            if name not in self._entries:
                raise self._unknown(name)
        return self._with(self._entries | dict(specs))

    def with_uris(self, uris: Mapping[str, str]) -> Zoo:
        """Return the same zoo with other URIs for some of its registered teachers."""
        return self.with_specs({name: with_uri(self[name], uri) for name, uri in uris.items()})

    def fingerprint_of(self, name: str) -> str:
        """Return a hash of all that decides what a teacher answers, see `teacher_fingerprint`.

        Raises
        ------
        TeacherError
            When the weight file can't be read.
        """
        return teacher_fingerprint(self[name], where=self.where)

    @property
    def fingerprint(self) -> str:
        """A hash of all teachers, in order."""
        return _hash([self.fingerprint_of(name) for name in self._entries])


def teacher_fingerprint(spec: TeacherSpec, *, where: str = "zoo") -> str:
    """Return a hash of all that decides what a teacher answers: its spec and the content of its weight file.

    Where the file lies, and what is there for people or for the teacher's card, does not count. A net that is fetched
    by name or URI counts by that name; a registered one whose spec declares the hash of its program, by that hash.
    Where the spec declares the file's hash, the file is not read for it: one that differs is refused when it is loaded.

    Parameters
    ----------
    spec : TeacherSpec
        With absolute paths.
    where : str
        The zoo, for errors.

    Raises
    ------
    TeacherError
        When the weight file can't be read.
    """
    content = spec.model_dump(mode="json", exclude={"licence", "notes", "sha256", "accuracy", "examples"})
    if spec.path is not None:
        # What a URI leads to is compared with its hash when it is loaded.
        problem = None if is_remote(spec.path) and spec.sha256 else missing(spec.path)
        if problem:
            raise TeacherError(f"{where}: teacher {spec.name!r}: `source.path` {spec.path} {problem}")
        content["source"]["path"] = spec.sha256 or file_sha256(spec.path)
    if content["source"].pop("described", False):
        content["preprocessing"] = "the model's own"
    if "uri" in content["source"] and spec.sha256 is not None:
        content["source"]["uri"] = spec.sha256
    return _hash(content)


def with_uri(spec: TeacherSpec, uri: str) -> TeacherSpec:
    """Return a registered teacher's spec with another URI."""
    return spec.model_copy(update={"source": spec.source.model_copy(update={"uri": uri})})


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the name that a wrong one may have meant."""
    # Comparing with a hundred thousand names takes a minute; those that share most pairs of letters take a moment.
    pairs = {name[i : i + 2] for i in range(min(len(name), 80) - 1)}
    likely = heapq.nlargest(_COMPARED, names, key=lambda other: sum(pair in other for pair in pairs))
    return next(iter(difflib.get_close_matches(name[:80], likely, n=1, cutoff=0.4)), None)


def load_zoo(path: str | Path) -> Zoo:
    """Read a zoo file, or open a catalogue (``.parquet``); relative paths in it are relative to it.

    A zoo file may be a URI; a catalogue is read where it lies, and must be a path.

    Weight files are not looked at: one bad teacher does not keep the others from being used, see `check_teacher`.
    The teachers of a catalogue are read and validated one by one, when they are asked for.

    Raises
    ------
    ConfigError
        Naming file, field and remedy.
    """
    if is_remote(path):
        return _remote_zoo(str(path))
    if Path(path).suffix == ".parquet":
        from pipeline.models.catalogue import Catalogue

        return Catalogue(path)
    data = load_yaml(path)
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: must hold `teachers:` with a list, got {type(data).__name__}")
    zoo = validate(ZooFile, data, where=_naming(str(path), data))
    folder = Path(path).absolute().parent
    return Zoo([absolute(spec, folder) for spec in zoo.teachers], where=str(path))


def _naming(where: str, data: Mapping[str, Any]) -> Callable[[Sequence[Any]], str]:
    """Return what an error names in a zoo file: the file, and the teacher that is meant, which a number tells badly."""

    def place(location: Sequence[Any]) -> str:
        try:
            name = data[location[0]][location[1]]["name"]
        except (LookupError, TypeError):
            return where
        return f"{where} (teacher {name!r})"

    return place


def _remote_zoo(uri: str) -> Zoo:
    from pipeline.data.storage import local_copy

    address, mark, options = uri.partition("?")
    if address.endswith(".parquet"):
        raise ConfigError(f"{uri}: a catalogue is read where it lies; copy it, and give its path")
    data = parse_yaml(local_copy(uri).read_text(encoding="utf-8", errors="replace"), where=uri)
    if not isinstance(data, dict):
        raise ConfigError(f"{uri}: must hold `teachers:` with a list, got {type(data).__name__}")
    zoo = validate(ZooFile, data, where=_naming(uri, data))
    folder = address.rpartition("/")[0] + mark + options

    def move(path: str) -> str:
        return path if os.path.isabs(path) else join(folder, path)

    return Zoo([_moved(spec, move) for spec in zoo.teachers], where=uri)


def absolute(spec: TeacherSpec, folder: Path) -> TeacherSpec:
    """Return a spec whose paths, which were relative to `folder`, are absolute."""
    return _moved(spec, lambda path: str(folder / os.path.expanduser(path)))


def relative(spec: TeacherSpec, folder: Path) -> TeacherSpec:
    """Return a spec whose absolute paths are relative to `folder` where they lie under it."""
    return _moved(spec, lambda path: str(Path(path).relative_to(folder)) if Path(path).is_relative_to(folder) else path)


def _moved(spec: TeacherSpec, move: Callable[[str], str]) -> TeacherSpec:
    changed: dict[str, Any] = {}
    for field in ("source", "examples"):
        part = getattr(spec, field)
        paths = {key: getattr(part, key, None) for key in ("path", "root")}
        moved = {key: move(path) for key, path in paths.items() if path is not None and "://" not in path}
        if moved:
            changed[field] = part.model_copy(update=moved)
    return spec.model_copy(update=changed) if changed else spec
