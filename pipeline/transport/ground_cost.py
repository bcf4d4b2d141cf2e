"""Ground costs: how far a teacher's class is from a target class, always in [0, 1] and comparable between teachers.

Every provider returns M : (C_t, C_s) tensor. The scale is fixed (half a cosine distance, or one minus a probability),
never a maximum taken per teacher, which would make a teacher without relation look as near as one with.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.transport import _checks


def class_centres(features: Tensor, y: Tensor, num_classes: int) -> Tensor:
    """Return the mean feature of each class.

    Parameters
    ----------
    features : (N, D) tensor
    y : (N,) tensor
    num_classes
        C_s; every class needs at least one sample.

    Returns
    -------
    (C_s, D) tensor

    Raises
    ------
    ValueError
        For non-finite features, labels outside the classes and a class without a sample.
    """
    if features.ndim != 2:
        raise ValueError(f"features must have shape (N, D), got shape {tuple(features.shape)}")
    _checks.finite("features", features)
    y = _checks.labels("y", y, features.shape[0], num_classes)
    return _class_means(features, y, num_classes)


def _class_means(rows: Tensor, y: Tensor, num_classes: int) -> Tensor:
    counts = torch.bincount(y, minlength=num_classes)
    if int(counts.min()) == 0:
        missing = torch.nonzero(counts == 0).flatten().tolist()
        raise ValueError(f"every target class needs a labelled sample, classes {missing} have none")
    sums = torch.zeros(num_classes, rows.shape[1], dtype=rows.dtype, device=rows.device).index_add_(0, y, rows)
    return sums / counts[:, None].to(sums)


def cosine_cost(rows: Tensor, columns: Tensor) -> Tensor:
    """Return M_ij = (1 − cos(rows_i, columns_j)) / 2.

    Parameters
    ----------
    rows : (C_t, D) tensor
    columns : (C_s, D) tensor

    Returns
    -------
    (C_t, C_s) tensor in [0, 1]; a zero vector is at distance 1/2 from everything.
    """
    if rows.ndim != 2 or columns.ndim != 2 or rows.shape[1] != columns.shape[1]:
        raise ValueError(
            "rows and columns must have shapes (C_t, D) and (C_s, D), got "
            f"{tuple(rows.shape)} and {tuple(columns.shape)}"
        )
    _checks.finite("rows", rows)
    _checks.finite("columns", columns)
    cosine = F.normalize(rows, dim=1) @ F.normalize(columns, dim=1).t()
    return ((1 - cosine) / 2).clamp(0, 1)


def prototype_cost(classifier_weight: Tensor, features: Tensor, y: Tensor, num_classes: int) -> Tensor:
    """Return half the cosine distance between a teacher's classifier rows and the target's class centres.

    M_ij = (1 − cos(W_i, mean of f over target class j)) / 2. Needs some labels and nothing of the teacher's data.

    Parameters
    ----------
    classifier_weight : (C_t, D) tensor
    features : (N, D) tensor
    y : (N,) tensor
    num_classes
        C_s.
    """
    return cosine_cost(classifier_weight.to(features), class_centres(features, y, num_classes))


def conditional_probabilities(p: Tensor, y: Tensor, num_classes: int, *, smoothing: float = 1.0) -> Tensor:
    """Return P̂(target class j | teacher class i), smoothed towards the class frequencies.

    P̂(j | i) = (Σ_b p_bi 1[y_b = j] + s r_j) / (Σ_b p_bi + s), with r the label frequencies and s the smoothing in
    samples: a teacher class that the probe hardly touches says nothing about the target.

    Parameters
    ----------
    p : (N, C_t) tensor
        The teacher's distributions over its label space.
    y : (N,) tensor
    num_classes
        C_s; every class needs at least one sample.
    smoothing
        s > 0.

    Returns
    -------
    (C_t, C_s) tensor with rows on the simplex.
    """
    smoothing = _checks.positive("smoothing", smoothing)
    _checks.distributions("p", p)
    y = _checks.labels("y", y, p.shape[0], num_classes)
    # Frequency-weighted class means rather than one-hot products: the check for absent classes comes along.
    frequencies = torch.bincount(y, minlength=num_classes).to(p)
    joint = (_class_means(p, y, num_classes) * frequencies[:, None]).t()
    prior = frequencies / len(y)
    return (joint + smoothing * prior) / (joint.sum(1, keepdim=True) + smoothing)


def conditional_cost(p: Tensor, y: Tensor, num_classes: int, *, smoothing: float = 1.0) -> Tensor:
    """Return M_ij = 1 − P̂(target class j | teacher class i); see `conditional_probabilities`."""
    return (1 - conditional_probabilities(p, y, num_classes, smoothing=smoothing)).clamp(0, 1)


def reference_cost(teacher_centres: Tensor, target_centres: Tensor) -> Tensor:
    """Return half the cosine distance between class centres in one shared reference network.

    Parameters
    ----------
    teacher_centres : (C_t, D) tensor
        Carried by the teacher's card: the mean reference feature of each of its classes.
    target_centres : (C_s, D) tensor
        `class_centres` of the target in the same network.
    """
    return cosine_cost(teacher_centres, target_centres)
