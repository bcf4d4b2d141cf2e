"""Scores of what a teacher says of images without labels, carried to the target's classes. Higher is better.

None of them sees whether the teacher is right: a teacher that is sure, versatile and wrong scores well.

Shapes: T teachers, N samples, C_s target classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.amalgamation.ambiguity import ambiguity
from pipeline.transport import _checks


def certainty(carried: Tensor) -> float:
    """Return 1 − mean_b H(r_b) / log C_s: one minus the mean ambiguity of the distributions r, (N, C_s) tensor."""
    return float(1 - ambiguity(_some("carried", carried)).double().mean())


def information(carried: Tensor) -> float:
    """Return (H(r̄) − mean_b H(r_b)) / log C_s, in [0, 1]: what one image tells of its class, by the teacher's account.

    The mutual information between image and class [1]_, as a share of the largest possible: high for a teacher that is
    sure of each image and divides them among the classes; 0 for one that says the same of all.

    Parameters
    ----------
    carried : (N, C_s) tensor
        r, the teacher's distributions over the target's classes.

    Raises
    ------
    ValueError
        For rows that are no distributions, and when there is none.

    References
    ----------
    .. [1] Bridle, Heading, MacKay, "Unsupervised Classifiers, Mutual Information and 'Phantom Targets'", NIPS 1991.
    """
    each = ambiguity(_some("carried", carried)).double().mean()
    return float((ambiguity(carried.double().mean(0, keepdim=True))[0] - each).clamp_min(0))


def agreement(carried: Tensor) -> Tensor:
    """Return how far each teacher agrees with the others, beyond what their class frequencies explain.

    a_t = (mean_b r_tb · c_tb − r̄_t · c̄_t) / (1 − r̄_t · c̄_t) with c_t the mean of the other teachers' distributions: a
    chance-corrected agreement in the manner of Cohen's κ, at most 1, 0 for a teacher that is unrelated to the others.
    Ours.

    Parameters
    ----------
    carried : (T, N, C_s) tensor

    Returns
    -------
    (T,) tensor, zeros for a single teacher.

    Raises
    ------
    ValueError
        For another shape, and rows that are no distributions.
    """
    if carried.ndim != 3 or 0 in carried.shape:
        raise ValueError(f"carried must have shape (T, N, C_s) without an empty side, got shape {tuple(carried.shape)}")
    teachers, _, classes = carried.shape
    _checks.distributions("carried", carried.reshape(-1, classes))
    r = carried.double()
    if teachers == 1:
        return r.new_zeros(1)
    others = (r.sum(0) - r) / (teachers - 1)
    together = (r * others).sum(2).mean(1)
    chance = (r.mean(1) * others.mean(1)).sum(1)
    return (together - chance) / (1 - chance).clamp_min(torch.finfo(r.dtype).eps)


def _some(name: str, value: Tensor) -> Tensor:
    _checks.distributions(name, value)
    if not len(value) or value.shape[1] < 2:
        raise ValueError(f"{name} must have rows and at least 2 classes, got shape {tuple(value.shape)}")
    return value
