"""The search's lowest rung: label spaces are compared with the task's, by names or by teacher cards; nobody is run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError, TeacherError, UserError
from pipeline.stages.artefacts import digest_of
from pipeline.stages.base import Run
from pipeline.stages.probe import LABELLED, class_names_of, word_vectors
from pipeline.stages.teachers import has_labels, load_options, table_of, vectors_identity

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from pipeline.models.cards import CardStore


def thin(run: Run) -> tuple[list[str], dict[str, float | None], dict[str, str]]:
    """Return the teachers that are worth running, the class-level scores, and why the others are not.

    Of the teachers whose label space is known the best share `keep` stays, but no fewer than `least`; those without
    class names, or without a card with centres, stay, too.

    Returns
    -------
    kept : list of str
        In the zoo's order.
    scores : dict of str to float or None
        Empty where the search has no such rung.
    dropped : dict of str to str
        Name to reason.
    """
    search = run.settings.assess.search
    names = list(run.zoo.names)
    if search.class_level is None:
        return names, {}, {}
    cost_of = (_by_names if search.class_level.cost == "names" else _by_centres)(run)
    from pipeline.assessment.class_level import class_level_score

    scores: dict[str, float | None] = {}
    with run.display.bar("label spaces", len(names)) as advance:
        for name in names:
            M = cost_of(name)
            scores[name] = None if M is None else class_level_score(M)
            advance(1, name)
    known = {name: score for name, score in scores.items() if score is not None}
    keep = max(math.ceil(search.class_level.keep * len(known)), search.least)
    last = set(sorted(known, key=lambda name: (-known[name], name))[keep:])
    dropped = {  # in the zoo's order, in which a catalogue is read fastest
        name: f"class-level score {known[name]:.3f}, not among the best {keep} of {len(known)}"
        for name in names
        if name in last
    }
    if not known:
        run.display.warn(
            "no teacher's label space is known, so that all are run: "
            + (
                "give `classes` in the zoo"
                if search.class_level.cost == "names"
                else "make cards with faculty zoo cards"
            )
        )
    return [name for name in names if name not in last], scores, dropped


def accuracy_of(run: Run) -> Callable[[str], float | None]:
    """Return a function that gives a teacher's accuracy on its own classes: its card's, or its catalogue entry's."""
    from pipeline.models.reference import reference_id

    store = _cards(run)
    reference = reference_id(_reference(run)) if len(store) else ""

    def accuracy(name: str) -> float | None:
        try:
            card = store.get(run.zoo.fingerprint_of(name), reference)
        except TeacherError:  # it fails by itself when it is loaded
            card = None
        return run.zoo[name].accuracy if card is None or card.accuracy is None else card.accuracy

    return accuracy


def identity(run: Run) -> dict[str, Any]:
    """Return what the results depend on beside settings and teachers: cards, accuracies, word vectors."""
    from pipeline.models.cards import cards_path
    from pipeline.models.files import file_sha256

    settings, found = run.settings.assess, {}
    cards = cards_path(run.settings.zoo_file)
    by_centres = settings.search.class_level is not None and settings.search.class_level.cost == "reference"
    if (by_centres or "source_accuracy" in settings.scores) and cards.exists():
        found["cards"] = file_sha256(cards)
    if "source_accuracy" in settings.scores:
        found["accuracies"] = digest_of([run.zoo[name].accuracy for name in run.zoo.names])
    return found | vectors_identity(run)


def _by_names(run: Run) -> Callable[[str], Tensor | None]:
    from pipeline.transport.names import names_cost

    classes = table_of(run).classes
    vectors = word_vectors(run, classes)

    def cost(name: str) -> Tensor | None:
        names = class_names_of(run.zoo[name])
        return names_cost(names, classes, vectors) if names else None

    return cost


def _by_centres(run: Run) -> Callable[[str], Tensor | None]:
    from pipeline.models.gathering import Rows
    from pipeline.models.reference import reference_embedding
    from pipeline.transport.ground_cost import class_centres, reference_cost

    if not has_labels(run):
        raise ConfigError(
            "assess.search.class_level.cost: reference needs labelled images (task.splits.probe is 0); use names"
        )
    store, table = _cards(run), table_of(run)
    with run.display.working("reading the task's class centres"):
        embed, reference = reference_embedding(_reference(run), **load_options(run))
        split = table.split(*LABELLED[:2])
        features = Rows()
        for _, images in split.batches(run.settings.assess.batch_size):
            features.add(embed(images))
        target = class_centres(features.all(), split.labels, len(table.classes))
    origin = target.mean(0)  # features are mostly positive: without an origin all directions are alike

    def cost(name: str) -> Tensor | None:
        try:
            card = store.get(run.zoo.fingerprint_of(name), reference)
        except TeacherError:
            return None
        if card is None or card.centres is None:
            return None
        centres = card.centres[card.centres.abs().sum(1) > 0]  # classes without an example have a zero row
        return reference_cost(centres - origin, target - origin) if len(centres) else None

    return cost


def _cards(run: Run) -> CardStore:
    from pipeline.models.cards import CardStore, cards_path

    return CardStore.open(cards_path(run.settings.zoo_file))


def _reference(run: Run) -> Any:
    name = run.settings.assess.reference
    if name is None:
        return None
    from pipeline.models.zoo import load_zoo

    try:
        return run.zoo[name] if name in run.zoo else load_zoo(run.settings.zoo_file)[name]  # `only` may leave it out
    except UserError as error:
        raise ConfigError(f"assess.reference: {error}") from None
