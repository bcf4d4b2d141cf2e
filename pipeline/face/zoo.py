"""Teachers for a notebook: a zoo file, a list of entries, or a model registry."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError
from pipeline.face.kept import KEPT, keep
from pipeline.models.spec import TRUSTED_FACTORIES, TeacherSpec, ZooFile
from pipeline.models.zoo_spec import ZooSettings
from pipeline.strict import validate

if TYPE_CHECKING:
    from pipeline.models.zoo import Zoo as Catalogue


@dataclass(frozen=True)
class Zoo:
    """A repository of teachers, by reference: no weights are read until somebody is assessed.

    Attributes
    ----------
    settings : ZooSettings
        As in the section ``zoo`` of a settings file.
    """

    settings: ZooSettings

    @property
    def names(self) -> tuple[str, ...]:
        """The teachers' names, in order.

        Raises
        ------
        ConfigError
            For a model registry, which is asked when a run begins.
        """
        return self._catalogue().names

    def __getitem__(self, name: str) -> TeacherSpec:
        return self._catalogue()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        if self.settings.path is None:
            return f"Zoo(what a model registry answers: {self.settings.query})"
        names = self.names
        listed = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
        return f"Zoo of {len(names)} teacher{'s' * (len(names) != 1)}: {listed}"

    def _catalogue(self) -> Catalogue:
        from pipeline.models.zoo import load_zoo as read

        if self.settings.path is None:
            raise ConfigError(
                "load_zoo: a model registry is asked when a run begins; its teachers are not known before"
            )
        found = read(self.settings.path)
        return found if self.settings.only is None else found.only(self.settings.only)


def load_zoo(
    teachers: str | Path | Sequence[TeacherSpec | Mapping[str, Any]],
    *,
    only: Sequence[str] | None = None,
    trust: Sequence[str] = (),
    allow_pickle: Sequence[str] = (),
    filter: str | None = None,
    alias: str | None = None,
    versions: str = "latest",
    keep_in: str | Path = KEPT,
) -> Zoo:
    """Return a zoo for `assess`.

    Parameters
    ----------
    teachers : path, or list of entries
        A zoo file (YAML, a path or a URI) or a catalogue (``.parquet``); a list of `TeacherSpec`, or of mappings with
        the keys of a zoo file's entries, whose relative paths start from the current folder; or ``"mlflow"``: what the
        model registry of ``assess(..., tracking=)`` answers to `filter`, `alias` and `versions`.
    only : sequence of str, optional
        These teachers alone.
    trust : sequence of str
        Prefixes of modules that a ``factory`` may come from, besides the package's own, torchvision and timm: it is
        code that will run.
    allow_pickle : sequence of str
        Teachers, by name, whose registered model may be unpickled, which runs its author's code.
    keep_in : path
        Where a list is written to, named by its content, so that a run can be repeated from its settings.

    Raises
    ------
    ConfigError
        When the file can't be read, an entry is not valid, or `only` names nobody.
    """
    entry: dict[str, Any] = {"filter": filter, "alias": alias, "versions": versions}
    if isinstance(teachers, str) and teachers == "mlflow":
        entry["source"] = "mlflow"
    elif isinstance(teachers, str | Path):
        place = str(teachers)
        entry["path"] = place if "://" in place else str(Path(place).expanduser().absolute())
    else:
        entry["path"] = str(_written(teachers, Path(keep_in)))
    if only is not None:
        entry["only"] = tuple(only)
    entry |= {"trusted_factories": (*TRUSTED_FACTORIES, *trust), "allow_pickle": tuple(allow_pickle)}
    zoo = Zoo(validate(ZooSettings, entry, where="load_zoo"))
    if zoo.settings.path is not None:
        len(zoo)  # a file that can't be read, or a name that nobody has, is told now
    return zoo


def _written(teachers: Sequence[TeacherSpec | Mapping[str, Any]], folder: Path) -> Path:
    import yaml

    from pipeline.models.zoo import absolute

    if isinstance(teachers, Mapping) or not isinstance(teachers, Sequence):
        raise ConfigError(
            f"load_zoo: takes a path, a list of entries or 'mlflow', got {type(teachers).__name__}; put it in a list"
        )
    entries = [one.model_dump() if isinstance(one, TeacherSpec) else one for one in teachers]
    specs = validate(ZooFile, {"teachers": entries}, where="load_zoo").teachers
    plain = [absolute(spec, Path.cwd()).model_dump(mode="json") for spec in specs]
    text = yaml.safe_dump({"teachers": plain}, sort_keys=False, allow_unicode=True).encode()
    return keep(folder, f"zoo-{hashlib.sha256(text).hexdigest()[:16]}.yaml", lambda handle: handle.write(text))
