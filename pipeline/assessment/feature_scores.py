"""Transferability scores of a teacher's features against the target's labels. Higher is better.

Shapes: N samples, D features, C target classes present, K the rank of the features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.transport import _checks

# Eigenvalues of a Gram matrix in float64 are known to about 1e-15 of the largest; below this share they are zero.
_RANK = 1e-12
# Centring leaves this share of a constant, which scaling to unit variance would otherwise make a feature of.
_CONSTANT = 1e-9
# LogME's authors add this to the residual sum of squares: labels that are met exactly have no largest β. Here it is
# spread over the N directions and counts in those that the features do not reach: where they reach all, the evidence
# is bounded, and keeps its exact maximum.
_RESIDUAL = 1e-5
_FIXED_POINT_STEPS = 11
# Least variance of a class along a component, as a share of the mean variance of the components.
_VARIANCE_FLOOR = 1e-6


def logme(features: Tensor, y: Tensor) -> float:
    """Return the largest log evidence of a Bayesian linear model of the labels, per sample and averaged over classes.

    max over α, β of log p(y_c | F, α, β) / N with y_c = F w + e, w ~ N(0, I/α), e ~ N(0, I/β) and y_c the 0/1 labels
    of class c [1]_. Features are neither centred nor given a bias. With σ_k the squared singular values of F, U its
    left singular vectors and t = α/β, β has a closed form, and t is a fixed point of t = γ r / ((N − γ) m), where
    γ = Σ_k σ_k / (σ_k + t), r the residual sum of squares and m = |E w|²; at most 11 steps. The steps begin at the
    best of a grid instead of at t = 1, and the best value met is kept (ours): from t = 1 they may end far from the
    maximum, where N < D or where features are small.

    Parameters
    ----------
    features : (N, D) tensor
    y : (N,) tensor
        Target classes ≥ 0.

    Returns
    -------
    float
        Nats per sample, of either sign as densities are; invariant to the scale and to rotations of the features.

    Raises
    ------
    ValueError
        For shapes that do not match, non-finite features, and fewer than two classes in y.

    References
    ----------
    .. [1] You et al., "LogME: practical assessment of pre-trained models for transfer learning", ICML 2021,
       arXiv 2102.11005. The fixed point in t: You et al., JMLR 23(209), 2022.
    """
    f, classes, counts = labelled(features, y)
    values, x = _coordinates(_unit(f), F.one_hot(classes).double())
    energy = x.square()
    # What rounding takes below zero would be large beside a small t.
    outside = (counts - energy.sum(0)).clamp_min(0) + _RESIDUAL * (1 - len(values) / len(f))
    unit = float(max(f.shape))  # the mean of the eigenvalues, where the rank is full
    best, t = torch.full_like(counts, -torch.inf), torch.full_like(counts, unit)
    for exponent in torch.linspace(-8, 8, 33).tolist():
        trial = torch.full_like(counts, unit * 10**exponent)
        evidence, _ = _evidence(trial, values, energy, outside, len(f))
        t = torch.where(evidence > best, trial, t)
        best = torch.maximum(evidence, best)
    for _ in range(_FIXED_POINT_STEPS):
        evidence, moved = _evidence(t, values, energy, outside, len(f))
        best = torch.maximum(evidence, best)
        moved = moved.clamp(1e-12 * unit, 1e12 * unit)
        if bool(((moved - t).abs() <= 1e-3 * t).all()):
            break
        t = moved
    return float(best.mean())


def h_score(features: Tensor, y: Tensor, shrinkage: float | None = None) -> float:
    """Return the H-score (1 − a) tr(Σ_a⁺ cov(E[f | y])), with the shrunk covariance Σ_a = (1 − a) cov(f) + a μ I.

    μ = tr cov(f) / D, and covariances are divided by N. Without shrinkage this is Bao et al.'s score [1]_, and C − 1
    for any features of rank N − 1, informative or not; by default a is Ledoit and Wolf's [2]_, as in [3]_.

    Parameters
    ----------
    features : (N, D) tensor
    y : (N,) tensor
        Target classes ≥ 0.
    shrinkage
        a, in [0, 1]; None for the estimate from the features.

    Returns
    -------
    float
        In [0, C − 1], invariant to shifts, to the scale and to rotations of the features.

    Raises
    ------
    ValueError
        For shapes that do not match, non-finite features, fewer than two classes in y, and shrinkage outside [0, 1].

    References
    ----------
    .. [1] Bao et al., "An information-theoretic approach to transferability in task transfer learning", ICIP 2019.
    .. [2] Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", J. Multivariate
       Analysis 88, 2004.
    .. [3] Ibrahim, Ponomareva and Mazumder, "Newer is not always better: rethinking transferability metrics, their
       peculiarities, stability and performance", arXiv 2110.06893.
    """
    if shrinkage is not None and not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage must be in [0, 1], got {shrinkage}")
    f, classes, counts = labelled(features, y)
    f = _unit(centred(f))
    # cov(E[f | y]) is a sum over classes, so the trace is one of squares in the singular basis: no (D, D) inverse.
    values, x = _coordinates(f, F.one_hot(classes).double() / counts.sqrt())
    variances = values / len(f)  # of mean 1 over the D dimensions: μ = 1
    a = _ledoit_wolf(f, variances) if shrinkage is None else float(shrinkage)
    weights = variances / ((1 - a) * variances + a)
    return float((1 - a) * (weights @ x.square()).sum())


def gbc(features: Tensor, y: Tensor, *, dims: int = 64, prior: float = 10.0) -> float:
    """Return the Gaussian Bhattacharyya coefficient −Σ_{i≠j} exp(−D_B(i, j)) over the ordered pairs of classes.

    D_B(i, j) = ⅛ Σ_d (μ_id − μ_jd)² / v_d + ½ Σ_d log(v_d / √(v_id v_jd)), v = (v_i + v_j) / 2, for the classes' means
    and diagonal covariances along the leading principal components [1]_. The variance of a class is shrunk as by
    `prior` more samples of the pooled variance within classes, and floored (ours): the second sum grows with the noise
    of the estimates, by about 16 / (n − 1) for two classes of n samples in 64 dimensions.

    Parameters
    ----------
    features : (N, D) tensor
    y : (N,) tensor
        Target classes ≥ 0.
    dims
        Principal components kept, no more than there are.
    prior
        Samples' worth of the pooled variance, > 0. At 10 that noise stays below 0.4 for classes of any size.

    Returns
    -------
    float
        In [−C (C − 1), 0], invariant to shifts, to the scale and to rotations of the features. 0 where all pairs are
        further apart than 745.

    Raises
    ------
    ValueError
        For shapes that do not match, non-finite features, fewer than two classes in y, dims < 1 and prior ≤ 0.

    References
    ----------
    .. [1] Pándy et al., "Transferability estimation using Bhattacharyya class separability", CVPR 2022,
       arXiv 2111.12780.
    """
    if dims < 1:
        raise ValueError(f"dims must be >= 1, got {dims}")
    prior = _checks.positive("prior", prior)
    f, classes, counts = labelled(features, y)
    f = _unit(centred(f))
    values, vectors = _gram_eigen(f)
    values, vectors = values[-dims:], vectors[:, -dims:]
    z = vectors * values.sqrt() if _wide(f) else f @ vectors

    size = counts[:, None]
    means = torch.zeros(len(counts), z.shape[1]).to(z).index_add_(0, classes, z) / size
    squares = torch.zeros_like(means).index_add_(0, classes, (z - means[classes]).square())
    pooled = squares.sum(0) / max(len(z) - len(counts), 1)
    variances = (squares + prior * pooled) / (size - 1 + prior)
    if z.shape[1]:
        variances = variances.clamp_min(_VARIANCE_FLOOR * float(z.square().mean()))
    logs = variances.log().sum(1)

    distances = []
    for i in range(len(counts) - 1):  # all pairs at once would be a tensor of C × C × dims
        mixed = (variances[i] + variances[i + 1 :]) / 2
        apart = ((means[i] - means[i + 1 :]).square() / mixed).sum(1)
        distances.append(apart / 8 + (mixed.log().sum(1) - (logs[i] + logs[i + 1 :]) / 2) / 2)
    return -2 * math.exp(float(torch.logsumexp(-torch.cat(distances), 0)))


def labelled(
    features: Tensor,
    y: Tensor,
    *,
    name: str = "features",
    label_name: str = "y",
    least_classes: int = 2,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the features in double precision, the classes renumbered without gaps and the samples of each.

    Parameters
    ----------
    features : (N, D) tensor
    y : (N,) tensor
        Classes ≥ 0.
    name, label_name
        What errors call them.
    least_classes
        That must be present: with one class a score is the same for all features.

    Returns
    -------
    (N, D) tensor, (N,) tensor, (C,) tensor
        Float64, int64 and float64. Classes that are not in `y` are not counted.

    Raises
    ------
    ValueError
        For shapes that do not match, non-finite features, labels that are no class indices, and too few classes.
    """
    if features.ndim != 2 or features.numel() == 0:
        raise ValueError(f"{name} must have shape (N, D) with N, D >= 1, got shape {tuple(features.shape)}")
    f = _checks.finite(name, features.detach()).double()
    classes, counts = present_classes(label_name, y.to(f.device), len(f), least_classes)
    return f, classes, counts


def present_classes(name: str, y: Tensor, size: int, least_classes: int) -> tuple[Tensor, Tensor]:
    """Return the classes in `y` renumbered without gaps, (size,) int64, and the samples of each, (C,) float64.

    Raises
    ------
    ValueError
        For another length than `size`, labels that are no class indices, and fewer classes than `least_classes`.
    """
    indices = y.numel() > 0 and not y.is_floating_point()
    y = _checks.labels(name, y, size, max(int(y.max()) + 1, 1) if indices else 1)
    found, classes, counts = torch.unique(y, return_inverse=True, return_counts=True)
    if len(found) < least_classes:
        raise ValueError(
            f"{name} must hold at least {least_classes} classes, got class {int(found[0])} alone "
            f"in shape {tuple(y.shape)}"
        )
    return classes, counts.double()


def centred(f: Tensor) -> Tensor:
    """Return f less its mean row; exactly zero, not what rounding leaves, where all rows are one."""
    rest = f - f.mean(0)
    return rest if rest.norm() > _CONSTANT * f.norm() else torch.zeros_like(f)


def _evidence(t: Tensor, values: Tensor, energy: Tensor, outside: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the evidence per sample at α/β = t and the best β, and the next t: (C,) tensors, of t (C,).

    `values` (K,) are σ, `energy` (K, C) is (Uᵀ y_c)², `outside` (C,) the rest of |y_c|², which no feature reaches.
    """
    left = t / (values[:, None] + t)  # share of each coordinate that stays in the residual
    explained = values[:, None] / (values[:, None] + t)
    residual = (left.square() * energy).sum(0) + outside
    penalty = (left * explained * energy).sum(0)  # t m
    variance = (residual + penalty) / size  # 1 / β
    evidence = -0.5 * (2 * math.pi * math.e * variance).log() + 0.5 * left.log().sum(0) / size
    gamma = explained.sum(0)
    freedom = size - len(values) + left.sum(0)  # N − γ, without the cancellation
    tiny = torch.finfo(t.dtype).tiny
    return evidence, t * gamma * residual / (freedom * penalty).clamp_min(tiny)


def _ledoit_wolf(f: Tensor, variances: Tensor) -> float:
    """Return the shrinkage of least expected squared error for centred f (N, D) whose covariance has trace D."""
    size, width = f.shape
    squares = float(variances.square().sum())
    spread = squares - width  # |cov(f) − I|²
    if spread <= _RANK * squares:
        return 0.0  # a multiple of the identity already, for instance of one feature
    noise = (float(f.square().sum(1).square().mean()) - squares) / size
    return min(max(noise / spread, 0.0), 1.0)


def _unit(f: Tensor) -> Tensor:
    """Return f of root mean square 1, so that float64 holds its fourth powers; zero where it is zero."""
    peak = f.abs().max()
    if not peak > 0:
        return f
    f = f / peak
    return f / f.square().mean().sqrt()


def _wide(f: Tensor) -> bool:
    return f.shape[0] <= f.shape[1]


def _gram_eigen(f: Tensor) -> tuple[Tensor, Tensor]:
    """Return the squared singular values of f above zero, ascending (K,), and the vectors of its smaller side.

    The vectors are left ones (N, K) where `_wide(f)`, and else right ones (D, K). Several times as fast as an SVD.
    """
    values, vectors = torch.linalg.eigh(f @ f.t() if _wide(f) else f.t() @ f)
    kept = values > _RANK * values[-1].clamp_min(0)
    return values[kept], vectors[:, kept]


def _coordinates(f: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the squared singular values of f (K,), and Uᵀ targets (K, C) of its left singular vectors."""
    values, vectors = _gram_eigen(f)
    if _wide(f):
        return values, vectors.t() @ targets
    return values, (vectors.t() @ (f.t() @ targets)) / values.sqrt()[:, None]
