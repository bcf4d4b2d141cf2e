"""Class-centre relations: what a teacher's embedding says of the task's classes, without its own classes.

Shapes: B taught images, T teachers, D_t features of teacher t, C_s classes of the task, A labelled images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.distillation.kd import no_loss, softened_divergence, weighted_mean
from pipeline.distillation.step import About, Objective, Step, TeacherAbout
from pipeline.transport import _checks
from pipeline.transport.ground_cost import class_centres


def relation_distribution(features: Tensor, mean: Tensor, centres: Tensor, temperature: float) -> Tensor:
    """Return softmax_c(cos(f_b − mean, centre_c − mean) / τ).

    Parameters
    ----------
    features : (B, D) tensor
        f. No gradient flows to them.
    mean : (D,) tensor
    centres : (C_s, D) tensor
    temperature
        τ > 0.

    Returns
    -------
    (B, C_s) tensor of float32, or float64 when the features are. Features at the mean are as near to all classes.

    Raises
    ------
    ValueError
        For shapes that do not match, features that are not finite, and τ ≤ 0.
    """
    temperature = _checks.positive("temperature", temperature)
    if features.ndim != 2 or centres.ndim != 2 or not features.shape[1:] == mean.shape == centres.shape[1:]:
        raise ValueError(
            "features, mean and centres must have shapes (B, D), (D,) and (C, D), got "
            f"{tuple(features.shape)}, {tuple(mean.shape)} and {tuple(centres.shape)}"
        )
    f = _checks.finite("features", features.detach())
    f = f.to(torch.promote_types(f.dtype, torch.float32))
    directions = F.normalize(centres.detach().to(f) - mean.detach().to(f), dim=1)
    cosines = F.normalize(f - mean.detach().to(f), dim=1) @ directions.t()
    return torch.softmax(cosines / temperature, dim=1)


def relation_loss(logits: Tensor, relations: Sequence[Tensor], shares: Tensor) -> Tensor:
    """Return mean_b Σ_t w_tb KL(relation_tb ‖ softmax(z_b)).

    Parameters
    ----------
    logits : (B, C_s) tensor
        z, the student's.
    relations : T tensors (B, C_s)
        Distributions. No gradient flows to them.
    shares : (T, B) tensor
        w ≥ 0.

    Raises
    ------
    ValueError
        For shapes that do not match, rows that are no distributions, and shares that are negative or not finite.
    """
    if logits.ndim != 2 or shares.shape != (len(relations), len(logits)):
        raise ValueError(
            f"logits and shares must have shapes (B, C) and ({len(relations)}, B), got {tuple(logits.shape)} and "
            f"{tuple(shares.shape)}"
        )
    total = logits[:0].sum()
    for relation, share in zip(relations, shares, strict=True):
        total = total + weighted_mean(softened_divergence(logits, relation, 1.0), share)
    return total


class ClassCentreRelations(Objective):
    """The student's distribution follows how near a teacher's embedding of an image is to those of the classes.

    loss = mean_b Σ_t w_tb KL(softmax_c(cos(f_tb − μ_t, μ_tc − μ_t) / τ) ‖ softmax(z_b)), with the mean μ_t of teacher
    t's features of the labelled images, those of class c alone μ_tc, and the shares w. Part: ``relations``.

    The objective is ours in this form: the teacher's classes and the ground cost have no part in it, only its
    penultimate features and some labels.

    Parameters
    ----------
    about : About
        Its teachers' features of the labelled images, and the labels.
    temperature
        τ > 0 of the softmax over cosines.

    Raises
    ------
    ValueError
        When a class has no labelled image, a teacher has no labelled features, the student has several heads, and for
        τ ≤ 0.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"said", "said.features", "labelled"})

    def __init__(self, about: About, *, temperature: float = 0.1) -> None:
        super().__init__()
        self.temperature = _checks.positive("temperature", temperature)
        if about.heads:
            raise ValueError(f"relations need a single task, got {len(about.heads)} heads")
        for number, teacher in enumerate(about.teachers):
            features, labels = labelled_of(teacher)
            features = features.to(torch.promote_types(features.dtype, torch.float32))
            self.register_buffer(f"mean_{number}", features.mean(0), persistent=False)
            centres = class_centres(features, labels, len(about.classes))
            self.register_buffer(f"centres_{number}", centres, persistent=False)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return ``{"loss", "relations"}``; 0 when nobody is taught."""
        if step.said is None:
            return no_loss(step, "relations")
        assert step.said.features is not None
        relations = [
            relation_distribution(
                features, self.get_buffer(f"mean_{number}"), self.get_buffer(f"centres_{number}"), self.temperature
            )
            for number, features in enumerate(step.said.features)
        ]
        loss = relation_loss(step.logits[step.taught], relations, step.said.shares)
        return {"loss": loss, "relations": loss.detach()}


def labelled_of(teacher: TeacherAbout) -> tuple[Tensor, Tensor]:
    """Return a teacher's features of the labelled images (A, D_t), without a gradient, and the labels (A,).

    Raises
    ------
    ValueError
        When it has none.
    """
    if teacher.labelled_features is None or teacher.labels is None or not len(teacher.labels):
        raise ValueError(f"teacher {teacher.name!r} has no features of labelled images")
    return teacher.labelled_features.detach(), teacher.labels
