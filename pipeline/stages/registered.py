"""A run's zoo: read from its file, or asked of a model registry; what an alias names is fixed when the run begins.

In the run folder lie, where registered models are teachers::

    registered.json        which registry was asked what and when, what was left out, which version each alias named
    registered.parquet     the teachers that a query found, a zoo of its own
    registered.cards.arrow their cards

A run that is continued reads these, so that it sees the same versions whatever has been registered meanwhile. Delete
``registered.json`` to ask again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from pipeline.config import Settings
from pipeline.data.whole import replacing
from pipeline.errors import ConfigError, TeacherError, UserError
from pipeline.places import local_place
from pipeline.report.console import Display

if TYPE_CHECKING:
    from pipeline.models.spec import TeacherSpec
    from pipeline.models.zoo import Zoo
    from pipeline.models.zoo_spec import RegistryQuery
    from pipeline.tracking.teachers import Teachers
    from pipeline.tracking.versions import Registry

_SHOWN = 20


@dataclass
class _Notes:
    """`registered.json`.

    Attributes
    ----------
    registry : str
        The registry, without credentials.
    query : mapping or None
        What it was asked, where the zoo is a query.
    asked : str
        When.
    teachers, left_out : mapping of str to str
        Name to URI of those that were found, URI to reason of those that can't teach.
    aliases : mapping of str to str
        Of a zoo file: URIs with an alias to URIs with the version that it named.
    """

    registry: str = ""
    query: Mapping[str, Any] | None = None
    asked: str = ""
    teachers: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)


def zoo_of(settings: Settings, display: Display | None = None) -> Zoo:
    """Return the zoo of a run, every registered teacher with its version and what its model says of itself.

    Raises
    ------
    ConfigError
        When the zoo can't be read, holds nobody, or the registry does not understand the query.
    UserError
        When the registry can't be reached.
    """
    from pipeline.models.zoo import load_zoo

    display = display or Display()
    if settings.zoo.source is not None:
        zoo = _asked(settings, display)
    else:
        zoo = load_zoo(settings.zoo_file)
    if settings.zoo.only is not None:
        zoo = zoo.only(settings.zoo.only)
    if settings.zoo.source is not None:
        return zoo
    registered = {name: spec for name, spec in zoo.items() if spec.source.type == "mlflow"}
    return zoo.with_specs(_fixed(registered, settings, display)) if registered else zoo


def pull_zoo(
    query: RegistryQuery,
    out: Path,
    *,
    tracking_uri: str | None = None,
    force: bool = False,
    display: Display | None = None,
) -> int:
    """Write a zoo of what a registry answers, with the teachers' cards beside it; return the exit code.

    Parameters
    ----------
    query : RegistryQuery
    out : Path
        ``.yaml``, or ``.parquet`` for a catalogue.
    tracking_uri : str, optional
        Default: the environment's ``MLFLOW_TRACKING_URI``.
    force : bool
        Overwrite `out`.

    Returns
    -------
    int
        0; 1 where somebody was left out.

    Raises
    ------
    UserError
        When `out` is there already or can't be written, the registry can't be reached, or nobody is found.
    """
    display = display or Display()
    if out.exists() and not force:
        raise ConfigError(f"{out}: is there already; overwrite it with --force, or choose another -o")
    registry = open_registry(tracking_uri)
    found = _find(registry, query, display)
    if not found.specs:
        raise _nobody(registry, query, found)
    _write(found, out)
    _tell_left_out(found.left_out, display)
    display.note(f"{len(found.specs)} teachers of {escape(registry.uri)} in {escape(str(out))}")
    return 1 if found.left_out else 0


def open_registry(tracking_uri: str | None) -> Registry:
    """Open the registry of a command; where none is named, that of the environment.

    Raises
    ------
    UserError
        When none is named, or it can't be reached.
    """
    import os

    from pipeline.tracking.spec import TrackingSpec
    from pipeline.tracking.versions import open_registry

    if not (tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "").strip()):
        raise ConfigError("no model registry: name it with --tracking-uri, or set MLFLOW_TRACKING_URI")
    return open_registry(TrackingSpec(uri=tracking_uri), "")


def _asked(settings: Settings, display: Display) -> Zoo:
    """Return the teachers that a registry answers; what it answered when the run began."""
    from pipeline.models.zoo import load_zoo
    from pipeline.tracking.connect import find_store
    from pipeline.tracking.versions import open_registry

    run_dir, query = local_place(settings.run_dir), settings.zoo.query
    store, place = find_store(settings.tracking, settings.run_dir), run_dir / "registered.json"
    if store.kind in ("none", "jsonl"):
        raise ConfigError(
            "zoo.source: mlflow needs a model registry; set tracking.enabled=true and tracking.uri to MLflow's"
        )
    notes = _read(place)
    if notes.query == query.model_dump(mode="json") and notes.registry == store.shown:
        display.note(
            f"zoo: {len(notes.teachers)} registered teachers as of {notes.asked}; to ask again, delete "
            f"{escape(str(place))}"
        )
        _tell_left_out(notes.left_out, display)
        return load_zoo(settings.zoo_file)
    registry = open_registry(settings.tracking, settings.run_dir)
    found = _find(registry, query, display)
    if not found.specs:
        _tell_left_out(found.left_out, display)
        raise _nobody(registry, query, found)
    _write(found, Path(settings.zoo_file))
    now = datetime.now().strftime("%Y-%m-%d %H:%M")
    uris = {spec.name: getattr(spec.source, "uri", "") for spec in found.specs}
    _save(place, _Notes(store.shown, query.model_dump(mode="json"), now, uris, found.left_out))
    display.note(f"zoo: {len(found.specs)} registered teachers of {escape(registry.uri)}")
    _tell_left_out(found.left_out, display)
    return load_zoo(settings.zoo_file)


def _fixed(registered: Mapping[str, TeacherSpec], settings: Settings, display: Display) -> dict[str, TeacherSpec]:
    """Return a zoo file's registered teachers with versions in the place of aliases, and what their models tell."""
    from pipeline.models.description import completed
    from pipeline.models.factories import Refused
    from pipeline.models.zoo import with_uri
    from pipeline.tracking.connect import check_server, find_store
    from pipeline.tracking.resolve import describe, pinned

    store = find_store(settings.tracking, settings.run_dir)
    if store.kind == "server":
        check_server(store.uri, settings.tracking.timeout)
    uri = store.uri if store.kind in ("database", "server", "other") else None
    place = local_place(settings.run_dir) / "registered.json"
    notes = _read(place)
    known = notes.aliases if notes.registry == store.shown else {}
    aliases, result = dict(known), {}
    for name, spec in registered.items():
        asked = spec.source.uri  # type: ignore[union-attr]
        # An alias may move while the run goes on; the version that it names now is what every worker loads.
        version = pinned(asked, uri)
        if asked in known and version not in (asked, known[asked]):
            display.warn(
                f"{asked} names {version} now; this run keeps {known[asked]} (delete {escape(str(place))} to change it)"
            )
        if version != asked:
            aliases.setdefault(asked, version)
        spec = with_uri(spec, aliases.get(asked, asked))
        if spec.classes is None or spec.source.described:  # type: ignore[union-attr]
            try:
                spec = completed(spec, describe(aliases.get(asked, asked), uri))
            except (TeacherError, Refused):  # it is told when the teacher is loaded
                pass
        result[name] = spec
    if aliases != known:
        _save(place, _Notes(store.shown, aliases=aliases, asked=datetime.now().strftime("%Y-%m-%d %H:%M")))
    return result


def _find(registry: Registry, query: RegistryQuery, display: Display) -> Teachers:
    from pipeline.tracking.teachers import find_versions, read_teachers

    with display.working("asking the registry for teachers"):
        versions = find_versions(registry, query)
    with display.bar("registered models", len(versions)) as advance:
        return read_teachers(registry, versions, numbered=query.versions == "all", advance=advance)


def _write(found: Teachers, out: Path) -> None:
    """Write teachers as a zoo, YAML or a catalogue, and their cards beside it."""
    import yaml

    from pipeline.models.cards import CardStore, cards_path
    from pipeline.models.catalogue import write_catalogue
    from pipeline.models.zoo import Zoo
    from pipeline.stages.zoo import card_origin

    zoo = Zoo(found.specs, where=str(out))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix == ".parquet":
            write_catalogue(zoo, out)
        else:
            text = yaml.safe_dump(
                {"teachers": [_entry(spec) for spec in found.specs]}, sort_keys=False, allow_unicode=True
            )
            with replacing(out) as sink:
                sink.write(text.encode())
    except OSError as error:
        raise UserError(f"{out}: can't be written ({error.strerror or error}); choose another folder") from None
    cards = [dataclasses.replace(card, origin=card_origin(zoo[card.name])) for card in found.cards]
    CardStore(cards_path(out)).add(cards)


def _entry(spec: TeacherSpec) -> dict[str, Any]:
    """Return a zoo file's entry: what has a value, and the preprocessing in any case."""
    plain = spec.model_dump(mode="json")
    kept = {name: value for name, value in plain.items() if value not in (None, "", {}) or name == "preprocessing"}
    kept["source"] = {name: value for name, value in plain["source"].items() if value is not False}
    return kept


def _nobody(registry: Registry, query: RegistryQuery, found: Teachers) -> ConfigError:
    asked = (
        ", ".join(f"{name} {value!r}" for name, value in query.model_dump(exclude_defaults=True).items()) or "no filter"
    )
    if found.left_out:
        uri, why = next(iter(found.left_out.items()))
        return ConfigError(
            f"zoo.source: none of {len(found.left_out)} versions in {registry.uri} ({asked}) can teach; {uri}: {why}"
        )
    return ConfigError(
        f"zoo.source: {registry.uri} has no model for this query ({asked}); correct zoo.filter or zoo.alias, or "
        "register teachers with `faculty zoo push`"
    )


def _tell_left_out(left_out: Mapping[str, str], display: Display) -> None:
    for uri, why in list(left_out.items())[:_SHOWN]:
        display.warn(f"left out: {escape(uri)}: {escape(why)}")
    if len(left_out) > _SHOWN:
        display.warn(f"and {len(left_out) - _SHOWN} more left out")


def _read(place: Path) -> _Notes:
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return _Notes()
    except OSError as error:
        raise UserError(f"{place}: can't be read ({error.strerror or error})") from None
    except ValueError:
        content = None
    try:
        return _Notes(**content)
    except TypeError:
        raise UserError(f"{place}: is damaged; delete it to ask the registry again") from None


def _save(place: Path, notes: _Notes) -> None:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with replacing(place) as sink:
            sink.write((json.dumps(dataclasses.asdict(notes), indent=1, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise UserError(
            f"run_dir {place.parent}: can't be written ({error.strerror or error}); choose another run_dir or free it"
        ) from None
