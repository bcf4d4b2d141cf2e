"""Look at a zoo: list its teachers, load and try each one, pack it into a catalogue, make its teachers' cards."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from pipeline.errors import ConfigError, DataError, FacultyError, UserError
from pipeline.models.spec import TeacherSpec
from pipeline.report.console import Display
from pipeline.stages.tables import table

if TYPE_CHECKING:
    from pipeline.data.spec import SourceSpec
    from pipeline.models.cards import Card, CardStore
    from pipeline.models.check import TeacherCheck
    from pipeline.models.zoo import Zoo

_SHOWN = 50


@dataclass(frozen=True)
class Access:
    """What a command may use to load teachers.

    Attributes
    ----------
    trusted : tuple of str
        Module prefixes that a `factory` may come from, besides the built-in ones.
    tracking_uri : str, optional
        Where registered teachers are; default: the environment's ``MLFLOW_TRACKING_URI``.
    allow_pickle : tuple of str
        Teachers whose registered model may be unpickled, which runs its author's code.
    """

    trusted: tuple[str, ...] = ()
    tracking_uri: str | None = None
    allow_pickle: tuple[str, ...] = ()


_SAVE_SECONDS = 30.0  # between two writes of the cards; more where writing takes longer than a twentieth of it


def list_zoo(path: Path, display: Display | None = None, *, everything: bool = False, as_json: bool = False) -> int:
    """Print the teachers that a zoo names, without loading any; return the exit code: 2 if an entry is not valid.

    The first 50, unless `everything` is asked for; all of them `as_json`.
    """
    from pipeline.models.zoo import load_zoo

    display, zoo = display or Display(), load_zoo(path)
    if as_json:
        rows = [_row(zoo, name) for name in zoo.names]
        print(json.dumps({"zoo": str(path), "teachers": rows}, indent=2))
        return 2 if any("error" in row for row in rows) else 0
    names = zoo.names if everything else zoo.names[:_SHOWN]
    found = table("teacher", "source", "classes", "licence", "notes", title=f"{len(zoo)} teachers in {path}")
    broken = 0
    for name in names:
        try:
            spec = zoo[name]
        except ConfigError as error:
            broken += 1
            found.add_row(escape(name), "[red]not valid[/]", "", "", escape(str(error)))
            continue
        classes = spec.classes if isinstance(spec.classes, str) else ", ".join(spec.classes or ("from the source",))
        found.add_row(escape(name), spec.source.type, escape(_short(classes)), escape(spec.licence), escape(spec.notes))
    display.table(found)
    if len(names) < len(zoo):
        display.note(f"the first {len(names)} of {len(zoo)} teachers; --all lists every one")
    return 2 if broken else 0


def _row(zoo: Zoo, name: str) -> dict[str, Any]:
    try:
        return zoo[name].model_dump(mode="json")
    except ConfigError as error:  # an entry of a catalogue is read only now
        return {"name": name, "error": str(error)}


def check_zoo(
    path: Path, access: Access | None = None, display: Display | None = None, *, as_json: bool = False
) -> int:
    """Load every teacher and run a probe batch; return the exit code: 0 if all are well, 2 if one is not.

    `as_json`: what was found goes to standard output as JSON, the progress to standard error.
    """
    from pipeline.models.zoo import load_zoo

    display = display or Display(Console(stderr=True, highlight=False) if as_json else None)
    zoo = load_zoo(path)
    load_kwargs = _load_kwargs(access or Access(), zoo)
    checks: list[TeacherCheck] = []
    with display.bar("teachers", len(zoo)) as advance:
        for name in zoo.names:
            checks.append(_checked(zoo, name, load_kwargs))
            advance(1, name)
    if as_json:
        print(json.dumps({"zoo": str(path), "teachers": [dataclasses.asdict(check) for check in checks]}, indent=2))
    else:
        _show_checks(checks, display)
    return 0 if all(check.ok for check in checks) else 2


def _checked(zoo: Zoo, name: str, load_kwargs: dict[str, Any]) -> TeacherCheck:
    from pipeline.models.check import TeacherCheck, check_teacher

    try:
        return check_teacher(zoo[name], **load_kwargs)
    except ConfigError as error:  # an entry of a catalogue is read only now
        return TeacherCheck(name, False, str(error), None, None, None, 0.0, None)


def _show_checks(checks: Sequence[TeacherCheck], display: Display) -> None:
    found = table("teacher", "ok", "classes", "params", "features", "MB", "s", "problem")
    for column in found.columns[2:7]:
        column.justify = "right"
    for check in checks:
        found.add_row(
            escape(check.name),
            "[green]yes[/]" if check.ok else "[red]no[/]",
            _number(check.classes, "d"),
            _number(check.parameters, ",d"),
            _number(check.feature_dim, "d"),
            _number(check.megabytes, ".1f"),
            _number(check.seconds, ".2f"),
            escape(check.error or ""),
        )
    display.table(found)
    display.note(f"{sum(check.ok for check in checks)} of {len(checks)} teachers can teach")


def pack_zoo(path: Path, out: Path, *, force: bool = False, display: Display | None = None) -> None:
    """Write a zoo as a Parquet catalogue.

    Raises
    ------
    ConfigError
        When the zoo is not valid, or `out` is there and `force` is not given.
    """
    from pipeline.models.catalogue import write_catalogue
    from pipeline.models.zoo import load_zoo

    display = display or Display()
    if out.exists() and not force:
        raise ConfigError(f"{out}: is there already; overwrite it with --force, or choose another -o")
    zoo = load_zoo(path)
    with display.working("writing the catalogue"):
        write_catalogue(zoo, out)
    display.note(f"{len(zoo)} teachers in {escape(str(out))}")


def make_cards(
    path: Path, reference: str | None = None, access: Access | None = None, display: Display | None = None
) -> int:
    """Make the cards that a zoo's teachers lack; return the exit code: 0 if all have one, 2 if one fails.

    Parameters
    ----------
    path : Path
        The zoo; its cards lie beside it.
    reference : str, optional
        The teacher of the zoo whose features the class centres are taken in; None: the pixels.
    access : Access, optional

    Raises
    ------
    UserError
        When the zoo or the reference can't be used, or the cards can't be read or written.
    """
    from pipeline.models.cards import CardStore, cards_path
    from pipeline.models.reference import reference_id
    from pipeline.models.zoo import load_zoo

    display, zoo = display or Display(), load_zoo(path)
    store = CardStore(cards_path(path))
    shared = None if reference is None else zoo[reference]
    rows, missing = _standing(zoo, store, reference_id(shared))
    kept = len(zoo) - len(missing) - sum(problem != "" for *_, problem in rows.values())
    if missing:
        if not os.access(store.path.absolute().parent, os.W_OK):
            raise UserError(f"{store.path}: can't be written; give its folder write permission, or move the zoo")
        _make_missing(zoo, missing, store, shared, rows, _load_kwargs(access or Access(), zoo), display)
    failed = sum(problem != "" for *_, problem in rows.values())
    _show_cards(zoo, rows, display)
    made = len(zoo) - kept - failed
    display.note(f"{made} cards made, {kept} up to date, {failed} teachers without; in {escape(str(store.path))}")
    return 2 if failed else 0


_Row = tuple[str, ...]  # classes, params, accuracy, examples, centres, problem


def _standing(zoo: Zoo, store: CardStore, reference: str) -> tuple[dict[str, _Row], dict[str, tuple[str, str]]]:
    """Return rows of the teachers that have a card or can have none, and fingerprint and origin of the others."""
    rows: dict[str, _Row] = {}
    missing: dict[str, tuple[str, str]] = {}
    identities: dict[str, str] = {}
    for name in zoo:
        try:
            fingerprint, origin = zoo.fingerprint_of(name), card_origin(zoo[name], identities)
        except FacultyError as error:
            rows[name] = _failed(str(error))
            continue
        card = store.get(fingerprint, reference)
        if card is not None and card.origin == origin:
            rows[name] = _cells(card)
        else:
            missing[name] = fingerprint, origin
    return rows, missing


def _make_missing(
    zoo: Zoo,
    missing: dict[str, tuple[str, str]],
    store: CardStore,
    shared: TeacherSpec | None,
    rows: dict[str, _Row],
    load_kwargs: dict[str, Any],
    display: Display,
) -> None:
    from pipeline.models.cards import make_card
    from pipeline.models.examples import read_examples
    from pipeline.models.reference import reference_embedding
    from pipeline.models.sources import load_teacher

    embed, reference = reference_embedding(shared, **load_kwargs)
    waiting: list[Card] = []
    saved, cost = time.monotonic(), 0.0
    try:
        with display.bar("cards", len(missing)) as advance:
            for name, (fingerprint, origin) in missing.items():
                try:
                    spec = zoo[name]
                    teacher = load_teacher(spec, **load_kwargs)
                    images, labels = read_examples(spec, teacher.classes) or (None, None)
                    card = make_card(
                        teacher,
                        fingerprint=fingerprint,
                        declared_accuracy=spec.accuracy,
                        images=images,
                        labels=labels,
                        embed=embed,
                        reference=reference,
                        origin=origin,
                    )
                except FacultyError as error:
                    rows[name] = _failed(str(error))
                except Exception as error:
                    # A teacher's code is anyone's code; one that breaks must not take the others along.
                    text = " ".join(str(error).split())[:240]
                    rows[name] = _failed(f"teacher {name!r}: {type(error).__name__} on its examples ({text})")
                else:
                    rows[name] = _cells(card)
                    waiting.append(card)
                if time.monotonic() - saved > max(_SAVE_SECONDS, 20 * cost):
                    began = time.monotonic()
                    store.add(waiting)
                    waiting, saved = [], time.monotonic()
                    cost = saved - began
                advance(1, name)
    finally:
        store.add(waiting)  # also what an interrupted call has made


def _show_cards(zoo: Zoo, rows: dict[str, _Row], display: Display) -> None:
    found = table("teacher", "classes", "params", "accuracy", "examples", "centres", "problem")
    for column in found.columns[1:5]:
        column.justify = "right"
    well = [name for name in zoo if not rows[name][-1]]
    ill = [name for name in zoo if rows[name][-1]]
    shown = {*well[:_SHOWN], *ill[:_SHOWN]}
    for name in zoo:
        if name in shown:
            found.add_row(escape(name), *rows[name][:-1], escape(rows[name][-1]))
    display.table(found)
    if len(shown) < len(zoo):
        display.note(f"the first {_SHOWN} teachers with a card, and the first {_SHOWN} without, of {len(zoo)}")


def _cells(card: Card) -> _Row:
    return (
        str(len(card.classes)),
        f"{card.parameters:,d}",
        _number(card.accuracy, ".3f"),
        str(card.examples),
        "no" if card.centres is None else "yes",
        "",
    )


def _failed(problem: str) -> _Row:
    return (*"-----", problem)


def card_origin(spec: TeacherSpec, identities: dict[str, str] | None = None) -> str:
    """Hash what a card is made from besides the teacher: the declared accuracy, and the examples wherever they lie.

    Parameters
    ----------
    spec : TeacherSpec
    identities : dict of str to str, optional
        Of sources that were looked at before; what is found is added.
    """
    content: list[Any] = [spec.accuracy]
    identities = {} if identities is None else identities
    if spec.examples is not None:
        place = spec.examples.model_dump_json(exclude={"only", "classes"})
        if place not in identities:  # many teachers may have their examples in one file
            identities[place] = _identity(spec.examples)
        content += [spec.examples.model_dump(mode="json", exclude={"path", "root"}), identities[place]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _identity(source: SourceSpec) -> str:
    from pipeline.stages.ingest import source_identity

    try:
        return source_identity(source)
    except DataError:  # told when they are read
        return "absent"


def _load_kwargs(access: Access, zoo: Zoo) -> dict[str, Any]:
    """Return how teachers are loaded: what code is trusted, and where registered ones come from."""
    from pipeline.models.spec import TRUSTED_FACTORIES
    from pipeline.stages.teachers import source_options

    pickled = {getattr(zoo[name].source, "uri", "") for name in access.allow_pickle}
    return source_options((*TRUSTED_FACTORIES, *access.trusted), access.tracking_uri, pickled)


def _number(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


def _short(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
