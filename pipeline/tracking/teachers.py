"""A registry as a zoo: which of its versions are teachers, what each says of itself, and its card."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from pipeline.errors import ConfigError, TeacherError, UserError
from pipeline.models.cards import Card, CardStore
from pipeline.models.description import Description, completed
from pipeline.models.factories import Refused
from pipeline.models.spec import MlflowModel, TeacherSpec
from pipeline.models.zoo import teacher_fingerprint
from pipeline.models.zoo_spec import RegistryQuery
from pipeline.tracking.publish import CARD_FILE
from pipeline.tracking.redact import redact
from pipeline.tracking.resolve import describe, download_model
from pipeline.tracking.versions import Registry

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

_PAGE = 500
_AT_ONCE = 8  # versions whose files are read side by side


@dataclass(frozen=True)
class Teachers:
    """What a registry answers.

    Attributes
    ----------
    specs : tuple of TeacherSpec
        Complete, with ``models:/name/version`` in the place of aliases; by name of the model, then version.
    left_out : dict of str to str
        Versions that can't teach: ``models:/name/version`` to why, and the remedy.
    cards : tuple of Card
        Of those that carry one; their fingerprints are those of the specs.
    """

    specs: tuple[TeacherSpec, ...]
    left_out: dict[str, str]
    cards: tuple[Card, ...] = field(compare=False)


def find_teachers(registry: Registry, query: RegistryQuery) -> Teachers:
    """Ask a registry for teachers, see `find_versions` and `read_teachers`."""
    return read_teachers(registry, find_versions(registry, query), numbered=query.versions == "all")


def read_teachers(
    registry: Registry, versions: Sequence[ModelVersion], *, numbered: bool, advance: Callable[..., None] | None = None
) -> Teachers:
    """Read what versions say of themselves: of each the ``MLmodel`` file, and its card; no weights.

    Parameters
    ----------
    registry : Registry
    versions : sequence of ModelVersion
    numbered : bool
        Whether the version is part of a teacher's name.
    advance : callable, optional
        Called as ``advance(done, note)`` for each version.

    Raises
    ------
    StageError
        When the registry does not answer any more.
    """
    names = teacher_names(versions, numbered=numbered)
    found: dict[str, tuple[TeacherSpec, Description, Card | None]] = {}
    left_out: dict[str, str] = {}

    def look(uri: str) -> tuple[TeacherSpec, Description, Card | None] | str:
        try:
            return _teacher(registry, uri, names[uri])
        except Refused as error:
            return str(error)
        except TeacherError:
            # Who is missed by chance would be missing all the run, so it matters why the file can't be read.
            with registry.asked():
                registry.client.search_registered_models(max_results=1)
        try:
            return _teacher(registry, uri, names[uri])
        except (Refused, TeacherError) as error:
            return str(error).removeprefix(f"the model {uri} ")

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for uri, answer in zip(names, pool.map(look, names), strict=True):
            if isinstance(answer, str):
                left_out[uri] = answer
            else:
                found[uri] = answer
            if advance is not None:
                advance(1, uri)
    return Teachers(tuple(spec for spec, _, _ in found.values()), left_out, tuple(_cards(found.values())))


def find_versions(registry: Registry, query: RegistryQuery) -> list[ModelVersion]:
    """Return the versions that a query means, by name of the model and number; no file is read.

    A version is meant when its registered model fits the filter, or the version itself does.

    Raises
    ------
    ConfigError
        When the registry does not understand the filter.
    StageError
        When it can't be reached.
    """
    with registry.asked():
        models, versions = _matching(registry, query.filter)
        chosen: list[ModelVersion] = []
        for name in sorted(models | {version.name for version in versions}):
            fitting = [version for version in versions if version.name == name]
            if query.alias is not None:
                numbers = {str(version.version) for version in fitting}
                named = _named(registry, name, query.alias)
                if named is not None and (name in models or str(named.version) in numbers):
                    chosen.append(named)
                continue
            if name in models:  # its versions need not have the tag themselves
                fitting = [*_pages(registry.client.search_model_versions, f"name = {_quoted(name)}")]
            ready = sorted((one for one in fitting if one.status == "READY"), key=lambda one: int(one.version))
            chosen += ready if query.versions == "all" else ready[-1:]
        return chosen


def teacher_names(versions: Sequence[ModelVersion], *, numbered: bool) -> dict[str, str]:
    """Return what the teachers are called: after their models, in the characters that a zoo admits.

    Parameters
    ----------
    versions : sequence of ModelVersion
    numbered : bool
        Whether the version is part of the name (``birds-v3``).

    Returns
    -------
    dict of str to str
        By ``models:/name/version``. Of names that would be the same, those that had to be changed get a hash.
    """
    plain: dict[str, str] = {}
    changed: set[str] = set()
    for version in versions:
        wanted = f"{version.name}-v{version.version}" if numbered else version.name
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", wanted).lstrip("_.-")[:80] or "model"
        uri = f"models:/{version.name}/{version.version}"
        plain[uri] = name
        if name != wanted:
            changed.add(uri)
    often = Counter(plain.values())
    return {
        uri: f"{name[:71]}-{hashlib.sha256(uri.encode()).hexdigest()[:8]}"
        if often[name] > 1 and uri in changed
        else name
        for uri, name in plain.items()
    }


def _matching(registry: Registry, filter_: str | None) -> tuple[set[str], list[ModelVersion]]:
    """Return the models that fit a filter, and the versions that do; of all models where there is no filter."""
    from mlflow.exceptions import MlflowException

    client, refusals = registry.client, []
    models: set[str] = set()
    versions: list[ModelVersion] = []
    try:
        models = {model.name for model in _pages(client.search_registered_models, filter_)}
    except MlflowException as error:
        if filter_ is None or error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        refusals.append(error)  # an attribute that only versions have, say
    if filter_ is None:
        return models, []
    try:
        versions = [*_pages(client.search_model_versions, filter_)]
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        refusals.append(error)
    if len(refusals) == 2:
        text = " ".join(redact(str(refusals[0])).split())[:300]
        raise ConfigError(
            f"zoo.filter: the registry does not understand {filter_!r} ({text}); write it in MLflow's search syntax, "
            "for example \"tags.task = 'birds' and name LIKE 'eu-%'\""
        )
    return models, versions


def _pages(search: Callable[..., Any], filter_: str | None) -> Iterator[Any]:
    token = None
    while True:
        page = search(filter_, max_results=_PAGE, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _named(registry: Registry, name: str, alias: str) -> ModelVersion | None:
    from mlflow.exceptions import MlflowException

    try:
        return registry.client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        # A missing alias of an existing model is reported as an invalid parameter.
        if error.error_code not in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
            raise
        return None


def _quoted(name: str) -> str:
    return f'"{name}"' if "'" in name else f"'{name}'"


def _teacher(registry: Registry, uri: str, name: str) -> tuple[TeacherSpec, Description, Card | None]:
    try:
        about = describe(uri, registry.secret_uri)
    except TeacherError as error:
        if isinstance(error.__context__, Refused):  # it was read, and is none
            raise error.__context__ from None
        raise
    if about.classes is None and about.count is None:
        raise Refused(
            "nothing tells its classes; set the version's tag faculty.classes to their names, for example [ant, bee]"
        )
    try:
        spec = completed(TeacherSpec(name=name, source=MlflowModel(uri=uri, described=True), preprocessing=None), about)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        field_ = ".".join(map(str, problem["loc"])) or "metadata"
        raise Refused(f"its {field_}: {problem['msg'].removeprefix('Value error, ')}") from None
    if about.teacher is None:
        return spec, about, None
    spec = spec.model_copy(update={"sha256": about.teacher.sha256})
    return spec, about, _card(registry, uri, about)


def _card(registry: Registry, uri: str, about: Description) -> Card | None:
    """Return the card that lies beside a pushed teacher, as it was written."""
    pushed = about.teacher
    if pushed is None or pushed.card is None:
        return None
    with tempfile.TemporaryDirectory(prefix="faculty-card-") as folder:
        try:
            path = download_model(uri, tracking_uri=registry.secret_uri, folder=folder, only=CARD_FILE) / CARD_FILE
            return CardStore(path).get(pushed.fingerprint, pushed.card)
        except UserError:  # a teacher without a card can teach; a new one is made by `faculty zoo cards`
            return None


def _cards(found: Iterable[tuple[TeacherSpec, Description, Card | None]]) -> Iterator[Card]:
    """Bring cards to the names and fingerprints that their teachers have here."""
    found = list(found)
    references = {}
    for spec, about, _ in found:
        if about.teacher is not None:
            # A reference is called by name and fingerprint, see `reference_id`; both are others here.
            references[about.teacher.fingerprint[:12]] = f"{spec.name}-{teacher_fingerprint(spec)[:12]}"
    for spec, _, card in found:
        if card is not None:
            known = references.get(card.reference.rpartition("-")[2], card.reference)
            yield dataclasses.replace(
                card, name=spec.name, fingerprint=teacher_fingerprint(spec), reference=known, origin=""
            )
