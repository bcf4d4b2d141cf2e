"""Transferability scores from a teacher's labels, and the two that do not look at the data. Higher is better.

Shapes: N target samples, S source samples, D features, C_t teacher classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.assessment.feature_scores import centred, labelled, present_classes
from pipeline.transport import _checks
from pipeline.transport.sinkhorn import sinkhorn


def nce(p: Tensor, y: Tensor) -> float:
    """Return the negative conditional entropy −H(Y | Z), with Z the teacher's first choice, Z = argmax p.

    −H(Y | Z) = Σ_{z, y} P̂(z, y) log (P̂(z, y) / P̂(z)) [1]_.

    Parameters
    ----------
    p : (N, C_t) tensor
        The teacher's distributions over its own label space.
    y : (N,) tensor
        Target classes ≥ 0.

    Returns
    -------
    float
        Nats, in [−H(Y), 0]. A teacher of one class, or of one answer, has −H(Y).

    Raises
    ------
    ValueError
        For values that are no distributions, shapes that do not match, and fewer than two classes in y.

    References
    ----------
    .. [1] Tran, Nguyen and Hassner, "Transferability and hardness of supervised classification tasks", ICCV 2019,
       arXiv 1908.08142.
    """
    _checks.distributions("p", p)
    if len(p) == 0:
        raise ValueError(f"p must have at least one row, got shape {tuple(p.shape)}")
    classes, counts = present_classes("y", y.to(p.device), len(p), 2)
    joint = torch.zeros(p.shape[1], len(counts)).to(counts)
    joint.index_put_((p.detach().argmax(1), classes), torch.ones_like(classes).to(counts), accumulate=True)
    return _negative_conditional_entropy(joint / len(p))


def otce(
    source_features: Tensor,
    source_y: Tensor,
    features: Tensor,
    y: Tensor,
    reg: float = 0.1,
    *,
    max_iter: int = 2000,
    tol: float = 1e-3,
) -> float:
    """Return −H(Y_t | Y_s) under the plan between source and target features: F-OTCE.

    P = argmin ⟨P, M⟩ + ε Σ P (log P − 1) between the uniform distributions over source and target samples, M the
    squared Euclidean distance; P̂(y_s, y_t) is the sum of P_ij over the samples of these labels [1]_, [2]_.

    M enters as −⟨x_i − x̄, f_j − f̄⟩, which has the plan of the squared distance since the two differ by terms of a row
    or of a column, divided by its root mean square (ours). So `reg` means the same for features of any scale and
    offset; in the unit of the distance itself, offsets and lengths that no plan can change would drown the rest.

    Where the teacher's source data are not at hand, the rows of its classifier's weight may stand in for them, one
    source sample a class: ``otce(weight, torch.arange(len(weight)), features, y)`` (ours).

    Parameters
    ----------
    source_features : (S, D) tensor
    source_y : (S,) tensor
        Source classes ≥ 0; one class is enough.
    features : (N, D) tensor
        Of the same teacher on the target's samples.
    y : (N,) tensor
        Target classes ≥ 0.
    reg
        ε, in root mean squares of the centred cost.
    max_iter, tol
        As for `pipeline.transport.sinkhorn.sinkhorn`, which warns where the limit comes first.

    Returns
    -------
    float
        Nats, in [−H(Y_t), 0].

    Raises
    ------
    ValueError
        For shapes that do not match, non-finite features, fewer than two classes in y, and as for `sinkhorn`.

    References
    ----------
    .. [1] Tan, Li and Huang, "OTCE: a transferability metric for cross-domain cross-task representations", CVPR 2021,
       arXiv 2103.13843.
    .. [2] Tan et al., "Transferability-guided cross-domain cross-task transfer learning", arXiv 2207.05510 (F-OTCE).
    """
    reg = _checks.positive("reg", reg)
    x, source_classes, source_counts = labelled(
        source_features, source_y, name="source_features", label_name="source_y", least_classes=1
    )
    f, classes, counts = labelled(features, y)
    if x.shape[1] != f.shape[1]:
        raise ValueError(
            f"source_features and features must have as many columns, got shapes {tuple(x.shape)} and {tuple(f.shape)}"
        )
    M = -centred(x) @ centred(f.to(x.device)).t()
    scale = M.square().mean().sqrt()
    M = (M - M.min()) / scale if scale > 0 else M
    a, b = (torch.full((1, size), 1 / size).to(M) for size in M.shape)
    plan = sinkhorn(a, b, M, reg, max_iter=max_iter, tol=tol).plan()[0]
    by_target = plan @ F.one_hot(classes, len(counts)).to(M)
    joint = by_target.new_zeros(len(source_counts), len(counts)).index_add_(0, source_classes.to(M.device), by_target)
    return _negative_conditional_entropy(joint / joint.sum())


def source_accuracy(accuracy: float | None) -> float:
    """Return the teacher's accuracy on its own source task, which looks at no target data.

    Parameters
    ----------
    accuracy
        In [0, 1].

    Raises
    ------
    ValueError
        For None, and outside [0, 1].
    """
    if accuracy is None:
        raise ValueError("source accuracy is not known: the teacher's catalogue entry must give it")
    if not 0 <= accuracy <= 1:
        raise ValueError(f"source accuracy must be in [0, 1], got {accuracy}")
    return float(accuracy)


def num_parameters(count: int) -> float:
    """Return log10 of the teacher's parameter count, which looks at no data.

    Raises
    ------
    ValueError
        For a count below 1.
    """
    if count < 1:
        raise ValueError(f"count must be >= 1, got {count}")
    return math.log10(count)


def _negative_conditional_entropy(joint: Tensor) -> float:
    """Return Σ P(s, t) log (P(s, t) / P(s)) of a joint distribution, at most 0."""
    given = joint.sum(1, keepdim=True).clamp_min(torch.finfo(joint.dtype).tiny)
    return min(float(torch.xlogy(joint, joint / given).sum()), 0.0)
