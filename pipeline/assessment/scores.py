"""Transferability scores: how well a teacher's outputs fit a task before anything is trained. Higher is better.

Shapes: N samples, D features, C_t teacher classes, C_s target classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.transport import _checks

_BLOCK = 1024  # queries at a time


def knn(
    features: Tensor,
    y: Tensor,
    *,
    k: int = 5,
    queries: Tensor | None = None,
    query_y: Tensor | None = None,
) -> float:
    """Return the accuracy of k nearest neighbours by cosine, each neighbour's vote weighted by its similarity.

    Without queries every sample is classified by the others (leave one out). A vote weighs 1 + cos, so that ties
    between classes are rare; those that remain go to the lower class.

    Parameters
    ----------
    features : (N, D) tensor
    y : (N,) tensor
        Target classes ≥ 0.
    k
        Neighbours, 1 ≤ k; no more than there are.
    queries : (Q, D) tensor, optional
        Samples to classify by all of `features` instead.
    query_y : (Q,) tensor, optional
        Their classes.

    Raises
    ------
    ValueError
        For shapes that do not match, non-finite features, fewer than two samples, k < 1, or queries without classes.
    """
    if k < 1:
        raise ValueError(f"k must be >= 1, got {k}")
    if (queries is None) != (query_y is None):
        raise ValueError("queries and query_y must be given together, got one of them")
    base, y = _embedding("features", "y", features, y)
    leave_one_out = queries is None or query_y is None
    asked, truth = base, y
    if leave_one_out:
        if len(base) < 2:
            raise ValueError(f"features must have at least 2 rows to leave one out, got shape {tuple(features.shape)}")
    else:
        assert queries is not None and query_y is not None
        if queries.ndim != 2 or queries.shape[1] != base.shape[1]:
            raise ValueError(f"queries must have shape (Q, {base.shape[1]}), got shape {tuple(queries.shape)}")
        asked, truth = _embedding("queries", "query_y", queries, query_y)
    k = min(k, len(base) - leave_one_out)
    classes = int(max(y.max(), truth.max())) + 1
    hits = 0
    for start in range(0, len(asked), _BLOCK):  # all similarities at once would be (Q, N)
        similarity = asked[start : start + _BLOCK] @ base.t()
        if leave_one_out:
            own = torch.arange(len(similarity), device=base.device)
            similarity[own, start + own] = -torch.inf
        nearest, rows = similarity.topk(k, dim=1)
        votes = nearest.new_zeros(len(similarity), classes).scatter_add_(1, y[rows], 1 + nearest)
        hits += int((votes.argmax(1) == truth[start : start + _BLOCK]).sum())
    return hits / len(truth)


def leep(p: Tensor, y: Tensor, *, probe_p: Tensor | None = None, probe_y: Tensor | None = None) -> float:
    """Return the log expected empirical prediction: mean_b log Σ_i P̂(y_b | i) p_bi.

    P̂(j | i) = Σ_b p_bi 1[y_b = j] / Σ_b p_bi [1]_.

    Parameters
    ----------
    p : (N, C_t) tensor
        The teacher's distributions over its own label space.
    y : (N,) tensor
        Target classes ≥ 0.
    probe_p : (Q, C_t) tensor, optional
        Evaluate on these samples, with P̂ from `p` and `y` smoothed by one sample of uniform classes (ours): a class
        that `p` never met would make the score minus infinity.
    probe_y : (Q,) tensor, optional
        Their classes.

    Returns
    -------
    float
        At most 0.

    Raises
    ------
    ValueError
        For values that are no distributions and shapes that do not match.

    References
    ----------
    .. [1] Nguyen et al., "LEEP: a new measure to evaluate transferability of learned representations", ICML 2020.
    """
    if (probe_p is None) != (probe_y is None):
        raise ValueError("probe_p and probe_y must be given together, got one of them")
    _checks.distributions("p", p)
    if len(p) == 0:
        raise ValueError(f"p must have at least one row, got shape {tuple(p.shape)}")
    theta = p.double()
    classes = int(max(y.max(), -1 if probe_y is None else probe_y.max())) + 1
    y = _checks.labels("y", y, len(p), max(classes, 1))
    if probe_p is None or probe_y is None:
        return float(leep_terms(theta, y).mean())
    joint = theta.t() @ F.one_hot(y, classes).double()
    _checks.distributions("probe_p", probe_p, p.shape[1])
    truth = _checks.labels("probe_y", probe_y, len(probe_p), classes)
    conditional = (joint + 1 / classes) / (joint.sum(1, keepdim=True) + 1)
    expected = probe_p.double() @ conditional
    return float(expected[torch.arange(len(truth)), truth].log().mean())


def leep_terms(p: Tensor, y: Tensor) -> Tensor:
    """Return log Σ_i P̂(y_b | i) p_bi for each sample, an (N,) float64 tensor: LEEP is its mean.

    Parameters
    ----------
    p : (N, C_t) tensor
        Distributions.
    y : (N,) tensor
        Target classes ≥ 0.
    """
    theta = p.double()
    joint = theta.t() @ F.one_hot(y.long()).double()
    conditional = joint / joint.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return (theta @ conditional)[torch.arange(len(y)), y].log()


def _embedding(name: str, label_name: str, features: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if features.ndim != 2 or len(features) == 0:
        raise ValueError(f"{name} must have shape (N, D) with N >= 1, got shape {tuple(features.shape)}")
    _checks.finite(name, features)
    classes = int(y.max()) + 1 if y.numel() else 1
    labels = _checks.labels(label_name, y, len(features), max(classes, 1))
    return F.normalize(features.double(), dim=1), labels
