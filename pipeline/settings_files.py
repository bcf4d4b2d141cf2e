"""How settings are read: YAML files laid over each other, then `section.key=value` overrides.

Paths in a file (keys `path` and `root`) are relative to that file; `run_dir` and paths in overrides are relative to the
current folder.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import Settings
from pipeline.errors import ConfigError
from pipeline.strict import load_yaml, parse_yaml, validate

_PATH_KEYS = frozenset({"path", "root"})


def load_settings(files: Sequence[str | Path], overrides: Iterable[str] = ()) -> Settings:
    """Read settings from YAML files and overrides.

    Parameters
    ----------
    files : sequence of path
        Merged in order: mappings key by key, anything else replaced whole.
    overrides : iterable of str
        ``section.key=value``; the value is YAML.

    Raises
    ------
    ConfigError
        Naming the file (or override), the path and the nearest valid key.
    """
    overrides = list(overrides)
    for text in overrides:
        if "=" not in text and text.endswith((".yaml", ".yml")):
            raise ConfigError(f"{text} is given as an override; a settings file is given with -c: -c {text}")
    if not files:
        raise ConfigError(
            "no settings: give a file with -c, for example -c conf/demo/run.yaml; `faculty init` writes one for your "
            "images and teachers"
        )
    merged: dict[str, Any] = {}
    origin: dict[tuple[str, ...], str] = {}
    for file in files:
        _merge(merged, _read(file), str(file), origin)
    return _build(merged, parse_overrides(overrides), origin)


def overlay(settings: Settings, file: str | Path) -> Settings:
    """Return settings with those of a YAML file laid over them, as one more file of a command line is.

    Raises
    ------
    ConfigError
        If the file can't be read, names what is no setting, or the result is not valid.
    """
    merged: dict[str, Any] = settings.dump()
    origin: dict[tuple[str, ...], str] = {}
    _merge(merged, _read(file), str(file), origin)
    return _build(merged, {}, origin)


def apply(settings: Settings, values: Mapping[str, Any]) -> Settings:
    """Return settings with some values replaced: the one way for overrides and for samples of a search.

    Parameters
    ----------
    settings : Settings
    values : mapping of str
        From a dotted path to a plain value.

    Raises
    ------
    ConfigError
        If a path is not a setting, or the result is not valid.
    """
    return _build(settings.dump(), values, {})


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """Parse ``section.key=value`` strings; values are YAML, so ``3e-4`` is a float and ``[a, b]`` a list."""
    values: dict[str, Any] = {}
    for text in overrides:
        path, separator, value = text.partition("=")
        if not separator or not all(path.split(".")):
            raise ConfigError(f"override {text!r} is not of the form section.key=value")
        if path in values:
            raise ConfigError(f"override {path!r} is given twice; keep one")
        values[path] = parse_yaml(value, where=f"override {text!r}")
    return values


def _read(file: str | Path) -> dict[str, Any]:
    data = load_yaml(file)
    if not isinstance(data, dict):
        raise ConfigError(f"{file}: must hold a mapping of settings, got {type(data).__name__}")
    return _absolute_paths(data, Path(file).absolute().parent)


def _build(data: dict[str, Any], values: Mapping[str, Any], origin: Mapping[tuple[str, ...], str]) -> Settings:
    data, origin = copy.deepcopy(data), dict(origin)
    for path, value in values.items():
        keys = path.split(".")
        nested: Any = value
        for key in reversed(keys):
            nested = {key: nested}
        _merge(data, nested, f"override {path}={value}", origin)
    return validate(Settings, data, where=lambda location: _origin_of(location, origin))


def _merge(into: dict[str, Any], data: Mapping[str, Any], where: str, origin: dict, path: tuple[str, ...] = ()) -> None:
    # A mapping with another discriminator is another thing: its old keys would only be in the way.
    if "type" in data and "type" in into and data["type"] != into["type"]:
        into.clear()
    for key, value in data.items():
        here = (*path, str(key))
        origin[here] = where
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value, where, origin, here)
        elif isinstance(value, Mapping):
            into[key] = {}
            _merge(into[key], value, where, origin, here)
        else:
            into[key] = copy.deepcopy(value)


def _origin_of(location: Sequence[Any], origin: Mapping[tuple[str, ...], str]) -> str:
    """Return the file or override that set a value, or the one nearest above it."""
    names = [str(part) for part in location]
    known = [path for path in origin if all(part in names for part in path) and names[:1] == list(path[:1])]
    if known:
        return origin[max(known, key=len)]
    return " + ".join(dict.fromkeys(origin.values())) or "settings"


def _absolute_paths(data: Any, base: Path) -> Any:
    if isinstance(data, dict):
        return {
            key: str(base / os.path.expanduser(value))
            if key in _PATH_KEYS and isinstance(value, str) and "://" not in value
            else _absolute_paths(value, base)
            for key, value in data.items()
        }
    if isinstance(data, list):
        return [_absolute_paths(value, base) for value in data]
    return data
