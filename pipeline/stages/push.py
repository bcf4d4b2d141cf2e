"""A zoo's teachers into a model registry, each a version that loads without pickle; what is there already stays."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from pipeline.errors import ConfigError, FacultyError, StageError, UserError
from pipeline.report.console import Display
from pipeline.stages.artefacts import digest_of
from pipeline.stages.tables import table

if TYPE_CHECKING:
    from pipeline.models.cards import Card, CardStore
    from pipeline.models.spec import TeacherSpec
    from pipeline.models.teacher import Teacher
    from pipeline.models.zoo import Zoo
    from pipeline.tracking.mlflow import MlflowTracker

_FORMAT = 1  # raised when the same teacher makes another version: the program, what is kept beside it
_LOST = 3  # refusals of the registry in a row after which it is asked no more
_EXPERIMENT = "faculty-zoo"


@dataclasses.dataclass(frozen=True)
class Push:
    """What is pushed, and how.

    Attributes
    ----------
    only : sequence of str, optional
        These teachers alone.
    prefix : str
        Put before a teacher's name, which makes the model's.
    alias : str, optional
        Moved to the version of each.
    tags : mapping of str to str
        Of model and version, by which a query finds them.
    tracking_uri : str, optional
        Default: the environment's ``MLFLOW_TRACKING_URI``.
    experiment : str
        Where the files of the models are kept.
    trusted : sequence of str
        Module prefixes that a `factory` may come from, besides the built-in ones.
    reference : str, optional
        The teacher in whose features the cards' class centres are; None: the pixels.
    """

    only: Sequence[str] | None = None
    prefix: str = ""
    alias: str | None = None
    tags: dict[str, str] = dataclasses.field(default_factory=dict)
    tracking_uri: str | None = None
    experiment: str = _EXPERIMENT
    trusted: Sequence[str] = ()
    reference: str | None = None


def push_zoo(path: Path, push: Push, display: Display | None = None) -> int:
    """Register each local teacher of a zoo; return the exit code: 0 if all are registered, 1 if one is not.

    A teacher whose weights, spec, licence, accuracy and examples are those of a version that is there adds none; tags
    and alias are set all the same. A teacher that can't be exported is a row with the reason.

    Parameters
    ----------
    path : Path
        The zoo.
    push : Push

    Raises
    ------
    UserError
        When the zoo, a name, an alias or a tag can't be used, or the registry can't be reached.
    """
    from pipeline.models.cards import CardStore, cards_path
    from pipeline.models.reference import reference_id
    from pipeline.models.zoo import load_zoo
    from pipeline.tracking.connect import open_tracker
    from pipeline.tracking.mlflow import MlflowTracker
    from pipeline.tracking.spec import TrackingSpec

    display, zoo = display or Display(), load_zoo(path)
    shared = None if push.reference is None else zoo[push.reference]
    if push.only is not None:
        zoo = zoo.only(push.only)
    _check(zoo, push)
    spec = TrackingSpec(uri=push.tracking_uri, experiment=push.experiment)
    contents = _contents(zoo, reference_id(shared))
    key = f"push-{digest_of(sorted(content for content, _ in contents.values()))[:32]}"
    rows: dict[str, tuple[str, ...]] = {}
    # Its folder is used by no store: where none is named nothing is pushed.
    with (
        tempfile.TemporaryDirectory(prefix="faculty-push-") as scratch,
        open_tracker(spec, scratch, name="zoo push", key=key, params={"zoo": path.name}) as tracker,
    ):
        if not isinstance(tracker, MlflowTracker):
            raise ConfigError("--tracking-uri (or MLFLOW_TRACKING_URI) names no MLflow, so that there is no registry")
        pusher = _Pusher(tracker, push, CardStore(cards_path(path)), shared)
        lost = 0
        with display.bar("teachers", len(zoo)) as advance:
            for name in zoo:
                content, problem = contents[name]
                try:
                    rows[name] = _problem(problem) if problem else pusher.push(zoo[name], content)
                    lost = 0
                except StageError as error:  # the registry's
                    lost += 1
                    rows[name] = _problem(str(error))
                    if lost >= _LOST:
                        raise StageError(f"{error}; run the same command again: what is registered stays") from None
                except FacultyError as error:
                    rows[name] = _problem(str(error))
                except Exception as error:
                    # A teacher's code is anyone's code; one that breaks must not take the others along.
                    text = " ".join(str(error).split())[:240]
                    rows[name] = _problem(f"teacher {name!r}: {type(error).__name__} ({text})")
                advance(1, name)
        shown = tracker.uri
    return _show(rows, shown, display)


class _Pusher:
    """Pushes one teacher after the other."""

    def __init__(self, tracker: MlflowTracker, push: Push, cards: CardStore, shared: TeacherSpec | None) -> None:
        from pipeline.models.reference import reference_embedding, reference_id
        from pipeline.models.spec import TRUSTED_FACTORIES
        from pipeline.tracking.versions import Registry

        self._tracker, self._push, self._cards = tracker, push, cards
        self._registry = Registry.of(tracker)
        self._trusted = (*TRUSTED_FACTORIES, *push.trusted)
        self._reference = reference_id(shared)
        self._embed = lambda: reference_embedding(shared, trusted_factories=self._trusted)[0]

    def push(self, spec: TeacherSpec, content: str) -> tuple[str, ...]:
        """Return the teacher's row."""
        from pipeline.tracking.publish import tell, version_with

        if spec.source.type == "mlflow":
            return "", "", "in a registry already", ""
        model = self._push.prefix + spec.name
        version = version_with(self._registry, model, content)
        state = "unchanged"
        if version is None:
            version, state = self._add(spec, model, content), "[green]new[/]"
        tell(self._registry, version, self._push.tags, self._push.alias)
        return escape(model), str(version.version), state, ""

    def _add(self, spec: TeacherSpec, model: str, content: str) -> Any:
        from pipeline.models.cards import CardStore
        from pipeline.models.description import TeacherMetadata
        from pipeline.models.program import export_teacher
        from pipeline.models.sources import load_teacher
        from pipeline.models.zoo import teacher_fingerprint
        from pipeline.tracking.publish import CARD_FILE, PROGRAM, add_version, write_model
        from pipeline.tracking.redact import redact

        teacher = load_teacher(spec, trusted_factories=self._trusted)
        with tempfile.TemporaryDirectory(prefix="faculty-push-") as place:
            folder = Path(place)
            (folder / PROGRAM).parent.mkdir()
            exported = export_teacher(teacher, folder / PROGRAM)
            card = self._card(spec, teacher)
            with tempfile.TemporaryDirectory(prefix="faculty-card-") as beside:  # where its lock file stays
                CardStore(Path(beside) / CARD_FILE).add([card])
                (Path(beside) / CARD_FILE).replace(folder / CARD_FILE)
            about = TeacherMetadata(
                preprocessing=spec.preprocessing,
                outputs=exported.outputs,
                classifier=exported.classifier,
                sha256=hashlib.sha256((folder / PROGRAM).read_bytes()).hexdigest(),
                fingerprint=teacher_fingerprint(spec),
                card=card.reference,
                licence=redact(spec.licence),
                notes=redact(spec.notes),
                accuracy=spec.accuracy if spec.accuracy is not None else card.accuracy,
            )
            write_model(folder, exported, teacher.classes, about)
            text = redact(model_card(model, spec, card, self._push.alias))
            (folder / "model_card.md").write_text(text, encoding="utf-8")
            return add_version(self._tracker, model, folder, content, text)

    def _card(self, spec: TeacherSpec, teacher: Teacher) -> Card:
        """Return the teacher's card: that which `faculty zoo cards` made, where it is up to date, or a new one."""
        from pipeline.models.cards import make_card
        from pipeline.models.examples import read_examples
        from pipeline.models.zoo import teacher_fingerprint
        from pipeline.stages.zoo import card_origin

        fingerprint, origin = teacher_fingerprint(spec), card_origin(spec)
        kept = self._cards.get(fingerprint, self._reference)
        if kept is not None and kept.origin == origin:
            return kept
        images, labels = read_examples(spec, teacher.classes) or (None, None)
        return make_card(
            teacher,
            fingerprint=fingerprint,
            declared_accuracy=spec.accuracy,
            images=images,
            labels=labels,
            embed=self._embed(),
            reference=self._reference,
            origin=origin,
        )


def model_card(model: str, spec: TeacherSpec, card: Card, alias: str | None) -> str:
    """Return a registered teacher's description in Markdown."""
    classes = card.classes
    uri = f"models:/{model}@{alias}" if alias else f"models:/{model}/<version>"
    size = "as stored" if spec.preprocessing is None else spec.preprocessing.model_dump_json(exclude_none=True)
    accuracy = "not stated" if card.accuracy is None else f"{100 * card.accuracy:.1f} %"
    measured = f", measured on {card.examples} examples" if card.examples else ""
    lines = [
        f"# {model}",
        "",
        f"Teacher {spec.name}: an image classifier with {len(classes)} classes: "
        f"{', '.join(classes[:50])}{' …' if len(classes) > 50 else ''}.",
        "",
        *([spec.notes, ""] if spec.notes else []),
        f"- Licence: {spec.licence or 'not stated'}",
        f"- Accuracy on its own classes: {accuracy}{measured}",
        f"- Parameters: {card.parameters:,d}; features: {card.feature_dim or 'unknown'}",
        f"- Input: {size}; output: logits, features{''.join(f', {name}' for name in spec.taps)}",
        f"- Fingerprint: `{card.fingerprint}`",
        "",
        "A traced graph without code and without pickle. In a zoo file of Faculty:",
        "",
        "```yaml",
        f"- name: {spec.name}",
        f'  source: {{type: mlflow, uri: "{uri}"}}',
        "```",
        "",
    ]
    return "\n".join(lines)


def _check(zoo: Zoo, push: Push) -> None:
    from pipeline.tracking.spec import check_alias, check_model_name

    if not (push.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "").strip()):
        raise ConfigError("no model registry: name it with --tracking-uri, or set MLFLOW_TRACKING_URI")
    try:
        for name in zoo.names:
            check_model_name(push.prefix + name)
        if push.alias is not None:
            check_alias(push.alias)
    except ValueError as error:
        raise ConfigError(f"--prefix or --alias: {error}") from None


def parse_tags(given: Sequence[str]) -> dict[str, str]:
    """Return tags from ``key=value`` texts.

    Raises
    ------
    ConfigError
        When one has another form.
    """
    tags = {}
    for text in given:
        key, mark, value = text.partition("=")
        if not mark or not re.fullmatch(r"[\w.-]{1,250}", key):
            raise ConfigError(f"--tag {text!r} is not of the form key=value, the key of letters, digits, _, . and -")
        tags[key] = value
    return tags


def _contents(zoo: Zoo, reference: str) -> dict[str, tuple[str, str]]:
    """Return a hash of what each teacher's version is made from, and why it can't be told."""
    from pipeline.stages.zoo import card_origin

    found = {}
    for name in zoo:
        try:
            spec = zoo[name]
            about = [spec.licence, spec.notes, card_origin(spec), reference, _FORMAT]
            found[name] = digest_of([zoo.fingerprint_of(name), *about]), ""
        except UserError as error:
            found[name] = "", str(error)
    return found


def _problem(text: str) -> tuple[str, ...]:
    return "-", "-", "[red]no[/]", escape(text)


def _show(rows: dict[str, tuple[str, ...]], registry: str, display: Display) -> int:
    found = table("teacher", "model", "version", "pushed", "problem")
    for name, row in rows.items():
        found.add_row(escape(name), *row)
    display.table(found)
    states = [row[2] for row in rows.values()]
    failed = sum(bool(row[3]) for row in rows.values())
    display.note(
        f"{states.count('[green]new[/]')} new, {states.count('unchanged')} unchanged, {failed} not pushed; "
        f"in {escape(registry)}"
    )
    return 1 if failed else 0
