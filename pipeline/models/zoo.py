"""The zoo: an ordered catalogue of teachers, read from one YAML file."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from pipeline.errors import ConfigError, TeacherError
from pipeline.models.files import file_sha256, missing
from pipeline.models.spec import TeacherSpec, ZooFile
from pipeline.strict import load_yaml, validate


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
        self._specs = {teacher.name: teacher for teacher in teachers}
        self.where = where

    @property
    def names(self) -> tuple[str, ...]:
        """All names, in order."""
        return tuple(self._specs)

    def __getitem__(self, name: str) -> TeacherSpec:
        try:
            return self._specs[name]
        except KeyError:
            near = difflib.get_close_matches(str(name), self._specs, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(self._specs)}"
            raise ConfigError(f"{self.where}: there is no teacher {name!r}; {hint}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._specs

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def only(self, names: Iterable[str]) -> Zoo:
        """Return a zoo of these teachers alone, still in the file's order.

        Raises
        ------
        ConfigError
            When one is not in the zoo, or none is asked for.
        """
        wanted = {self[name].name for name in names}
        if not wanted:
            raise ConfigError(f"{self.where}: `only` is empty; name at least one teacher, or leave it out")
        return Zoo((spec for name, spec in self._specs.items() if name in wanted), where=self.where)

    def with_uris(self, uris: Mapping[str, str]) -> Zoo:
        """Return the same zoo with other URIs for some of its registered teachers."""
        changed = {
            name: self[name].model_copy(update={"source": self[name].source.model_copy(update={"uri": uri})})
            for name, uri in uris.items()
        }
        return Zoo((changed.get(name, spec) for name, spec in self._specs.items()), where=self.where)

    def fingerprint_of(self, name: str) -> str:
        """Return a hash of all that decides what a teacher answers: its spec and the content of its weight file.

        Where the file lies, the licence and the notes do not count. A net that is fetched by name or URI counts by that
        name.

        Raises
        ------
        TeacherError
            When the weight file can't be read.
        """
        spec = self[name]
        content = spec.model_dump(mode="json", exclude={"licence", "notes", "sha256"})
        if spec.path is not None:
            problem = missing(spec.path)
            if problem:
                raise TeacherError(f"{self.where}: teacher {name!r}: `source.path` {spec.path} {problem}")
            content["source"]["path"] = file_sha256(spec.path)
        return _hash(content)

    @property
    def fingerprint(self) -> str:
        """A hash of all teachers, in order."""
        return _hash([self.fingerprint_of(name) for name in self._specs])


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_zoo(path: str | Path) -> Zoo:
    """Read a zoo file; relative paths in it are relative to it.

    Weight files are not looked at: one bad teacher does not keep the others from being used, see `check_teacher`.

    Raises
    ------
    ConfigError
        Naming file, field and remedy.
    """
    data = load_yaml(path)
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: must hold `teachers:` with a list, got {type(data).__name__}")
    zoo = validate(ZooFile, data, where=str(path))
    folder = Path(path).absolute().parent
    return Zoo([_absolute(spec, folder) for spec in zoo.teachers], where=str(path))


def _absolute(spec: TeacherSpec, folder: Path) -> TeacherSpec:
    if spec.path is None or "://" in spec.path:  # a URI is told of when the teacher is loaded
        return spec
    source = spec.source.model_copy(update={"path": str(folder / spec.path)})
    return spec.model_copy(update={"source": source})
