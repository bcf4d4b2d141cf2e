"""All scores of one teacher from what it says of a task's images.

Shapes: N samples, D features, C_t teacher classes, C_s target classes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.assessment.combined import transfer_score
from pipeline.assessment.estimate import Estimate, bootstrap_mean
from pipeline.assessment.feature_scores import gbc, h_score, logme
from pipeline.assessment.label_scores import nce, num_parameters, otce, source_accuracy
from pipeline.assessment.scores import knn, leep
from pipeline.transport.cost import transport_cost, transport_gain
from pipeline.transport.ground_cost import prototype_cost

TRANSPORT = ("transport_cost", "transport_gain")
LITERATURE = ("knn", "leep", "nce", "logme", "h_score", "gbc", "otce", "source_accuracy", "num_parameters")
NEED_LABELS = frozenset({"bridge_gain", *TRANSPORT, *LITERATURE} - {"source_accuracy", "num_parameters"})


@dataclass(frozen=True)
class Said:
    """What a teacher says of labelled samples, and what is known of it.

    Attributes
    ----------
    logits : (N, C_t) tensor
    features : (N, D) tensor
    labels : (N,) tensor
        Target classes.
    fitted : (N,) bool tensor
        Samples that a ground cost may be fitted on; it is tried on the others.
    classifier_weight : (C_t, D) tensor, optional
    parameters : int
    accuracy : float, optional
        On its own classes.
    """

    logits: Tensor
    features: Tensor
    labels: Tensor
    fitted: Tensor
    classifier_weight: Tensor | None = None
    parameters: int = 0
    accuracy: float | None = None


def score_labelled(
    said: Said, num_classes: int, *, scores: Collection[str] = LITERATURE, neighbours: int = 5, seed: int = 0
) -> tuple[Estimate, dict[str, float]]:
    """Return the combined score with its interval, and the transport scores and those of `scores` by name.

    A score that a teacher has no ground for (no linear classifier, no accuracy in its catalogue entry) is left out.
    """
    found = _transport(said, num_classes)
    p = said.logits.softmax(1)
    weight = said.classifier_weight
    known: dict[str, Callable[[], float] | None] = {
        "knn": lambda: knn(said.features, said.labels, k=neighbours),
        "leep": lambda: leep(p, said.labels),
        "nce": lambda: nce(p, said.labels),
        "logme": lambda: logme(said.features, said.labels),
        "h_score": lambda: h_score(said.features, said.labels),
        "gbc": lambda: gbc(said.features, said.labels),
        "otce": None if weight is None else lambda: otce(weight, torch.arange(len(weight)), said.features, said.labels),
        "source_accuracy": None if said.accuracy is None else lambda: source_accuracy(said.accuracy),
        "num_parameters": lambda: num_parameters(said.parameters),
    }
    for name in scores:
        score = known[name]
        if score is not None:
            found[name] = score()
    samples = transfer_score(said.logits, said.features, said.labels, num_classes)
    return bootstrap_mean(samples, seed=seed), found


def _transport(said: Said, num_classes: int) -> dict[str, float]:
    """Return cost and gain under the prototype ground cost, fitted on some samples and taken on the others."""
    if said.classifier_weight is None:
        return {}
    fitted, probe = said.fitted, ~said.fitted
    M = prototype_cost(said.classifier_weight, said.features[fitted], said.labels[fitted], num_classes)
    p, y = said.logits[probe].softmax(1), said.labels[probe]
    return {"transport_cost": float(transport_cost(p, y, M).mean()), "transport_gain": transport_gain(p, y, M)}
