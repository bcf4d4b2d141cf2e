"""What reaches the cluster with a job, and what does not: files of the settings that lie elsewhere are refused here."""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import Settings
from pipeline.errors import ConfigError, TeacherError
from pipeline.settings_files import load_settings

if TYPE_CHECKING:
    from pipeline.models.zoo import Zoo

_READ = ("path", "root")
_WRITTEN = ("run_dir", "cache.path", "tracking.artifacts")
_WILD = "*?["
_TEACHERS = 1000  # of a catalogue, whose rows are read one by one
_SHOWN = 5


@dataclass(frozen=True)
class Folder:
    """The working folder, and what of it is packed.

    Attributes
    ----------
    root : Path
        Absolute, without links.
    files : mapping of str to int
        Path in the folder to size in bytes, of the files that travel.
    """

    root: Path
    files: Mapping[str, int]

    def holds(self, path: str) -> bool:
        """Tell whether a file, or something in a folder, travels."""
        return path in self.files or path == "." or any(name.startswith(f"{path}/") for name in self.files)

    def relative(self, file: str | Path) -> str:
        """Return a settings file's path in the folder.

        Raises
        ------
        ConfigError
            When it does not travel.
        """
        found = Path(file).resolve()
        if not found.is_relative_to(self.root):
            raise ConfigError(
                f"{file}: lies outside of the working folder {self.root} and does not travel with the job; move it "
                "there, or name another folder with --working-dir"
            )
        path = found.relative_to(self.root).as_posix()
        if not self.holds(path):
            raise ConfigError(f"{file}: {_LEFT_OUT}")
        return path


_LEFT_OUT = (
    "is left out when the working folder is packed (excludes of the runtime environment, .gitignore, .rayignore); "
    "take it out of them"
)


def settings_there(
    files: Sequence[str | Path], overrides: Sequence[str], folder: Folder, shared: Iterable[Path] = ()
) -> dict[str, Any]:
    """Return the settings as the job will read them, paths in the working folder relative to it.

    Parameters
    ----------
    files : sequence of path
        Settings files.
    overrides : sequence of str
        ``section.key=value``.
    folder : Folder
    shared : iterable of Path
        Folders outside of it that every node sees under the same path.

    Raises
    ------
    ConfigError
        One line for each file of the settings, or of the zoo, that the job would not find, and for a run folder that
        would go with it.
    """
    names = [folder.relative(file) for file in files]
    places = [Path(os.path.abspath(place)) for place in shared]
    # Read once more under another name of the folder: what then begins with that name travels with it, and what does
    # not was written as an absolute path.
    with tempfile.TemporaryDirectory(prefix="faculty-submit-") as above:
        there = Path(above) / "folder"
        there.symlink_to(folder.root)
        settings = load_settings([there / name for name in names], overrides)
        look = _Look(folder, there, places)
        problems = [*_of_settings(settings, look), *_of_zoo(settings, look)]
        if problems:
            more = [f"and {len(problems) - _SHOWN} more of the kind"] if len(problems) > _SHOWN else []
            raise ConfigError("\n".join([*problems[:_SHOWN], *more]))
        return _without_prefix(settings.dump(), f"{there}/")


@dataclass(frozen=True)
class _Look:
    """Looks at single paths, as the job would meet them."""

    folder: Folder
    there: Path
    shared: Sequence[Path]

    def at(self, name: str, value: str, *, must_be: bool = True) -> str | None:
        """Say in one line why the job does not find what it is to read; None where it does."""
        if "://" in value:
            return None
        written = os.path.normpath(self.there / value)
        fixed = _before_wild(written)
        if _under(fixed, self.there):
            inner = os.path.relpath(fixed, self.there)
            if not (self.folder.root / inner).exists():
                return f"{name}: {inner} is not in the working folder {self.folder.root}" if must_be else None
            return None if self.folder.holds(inner) else f"{name}: {inner} {_LEFT_OUT}"
        if _under(written, self.there.parent):  # by ..: relative, and beside the folder
            here = os.path.normpath(self.folder.root / os.path.relpath(written, self.there))
            return (
                f"{name}: {here} lies outside of the working folder and is named by a relative path, which leads "
                "nowhere on the cluster; move it into the folder, or name it by an absolute path that every node sees, "
                "or a URI"
            )
        if any(_under(written, place) for place in self.shared):
            return None
        if _under(written, self.folder.root):
            return (
                f"{name}: {written} is in the working folder, whose copy lies elsewhere on the cluster; write the path "
                "relative to its file"
            )
        return (
            f"{name}: {written} lies outside of the working folder {self.folder.root} and does not travel with the "
            "job; move it there, give a URI, or, where every node sees it under this path, name its folder with "
            "--shared"
        )

    def keeps(self, name: str, value: str) -> str | None:
        """Say in one line why what is written there would be lost; None where it would not."""
        if "://" in value or not _under(os.path.normpath(self.there / value), self.there.parent):
            return None
        return (
            f"{name}: {value.removeprefix(f'{self.there}/')} is relative, and would lie in the job's copy of the "
            "working folder, which is deleted when the job has ended; give an absolute path that every node sees, or a "
            f"URI: {name}=/shared/…"
        )


def _of_settings(settings: Settings, look: _Look) -> Iterator[str]:
    data = {key: value for key, value in settings.dump().items() if key != "cluster"}
    for name, value in _texts(data):
        if name in _WRITTEN:
            problem = look.keeps(name, value)
        elif name == "tracking.uri" and value.startswith("sqlite:///"):
            problem = look.keeps(name, value.removeprefix("sqlite:///"))
        elif name.rsplit(".", 1)[-1] in _READ:
            problem = look.at(name, value)
        else:
            problem = None
        if problem:
            yield problem


def _of_zoo(settings: Settings, look: _Look) -> Iterator[str]:
    """Look at the teachers' files. One that is missing altogether is an error of that teacher alone, when it runs."""
    if settings.zoo.path is None or "://" in settings.zoo.path or look.at("zoo.path", settings.zoo.path):
        return
    from pipeline.models.zoo import load_zoo

    try:
        zoo = load_zoo(look.there / settings.zoo.path)
    except ConfigError as error:
        raise ConfigError(str(error).replace(f"{look.there}/", "")) from None
    for name in itertools.islice(settings.zoo.only or zoo.names, _TEACHERS):
        for field, value in _texts(_spec(zoo, name)):
            if field.rsplit(".", 1)[-1] in _READ:
                problem = look.at(f"{settings.zoo.path}: teacher {name!r}: {field}", value, must_be=False)
                if problem:
                    yield problem.replace(f"{look.there}/", "")


def _spec(zoo: Zoo, name: str) -> dict[str, Any]:
    with contextlib.suppress(ConfigError, TeacherError):  # of a row that can't be read the run itself will tell
        return zoo[name].model_dump(mode="json", include={"source", "examples"})
    return {}


def _texts(data: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield every text in nested plain values with its dotted path."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield from _texts(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(data, list | tuple):
        for index, value in enumerate(data):
            yield from _texts(value, f"{prefix}.{index}")
    elif isinstance(data, str):
        yield prefix, data


def _without_prefix(data: Any, prefix: str) -> Any:
    if isinstance(data, dict):
        return {key: _without_prefix(value, prefix) for key, value in data.items()}
    if isinstance(data, list):
        return [_without_prefix(value, prefix) for value in data]
    return data.removeprefix(prefix) if isinstance(data, str) else data


def _before_wild(path: str) -> str:
    """Return the part of a glob that holds no wildcard."""
    parts = Path(path).parts
    plain = list(itertools.takewhile(lambda part: not any(sign in part for sign in _WILD), parts))
    return str(Path(*plain))


def _under(path: str | Path, folder: Path) -> bool:
    return Path(path).is_relative_to(folder)
