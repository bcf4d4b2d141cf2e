"""A teacher's view of a task: whitened features, class centres among them, and how far each sample is from each.

Shapes: N labelled samples, D features, C_s target classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.transport import _checks
from pipeline.transport.ground_cost import class_centres, cosine_cost

# Values of τ to choose from: cosines lie in [−1, 1], beyond 2 every relation is flat.
_TEMPERATURES = torch.logspace(-1.5, 0.3, 37)
_UNCALIBRATED = 0.1
# Values of λ to choose from, in units of the mean variance.
_RIDGES = (1.0, 0.01, 0.03, 0.1, 0.3, 3.0, 10.0, 100.0)


@dataclass(frozen=True)
class HeldOut:
    """What a teacher's view says of labelled samples that it was not fitted on.

    Attributes
    ----------
    rows : (R,) tensor
        The samples in question: all but those that are the only one of their class.
    p : (R, C_s) tensor
        Distributions over the target's classes.
    y : (R,) tensor
        Their classes.
    M : (C_s, C_s) tensor in [0, 1]
        Ground cost between the centres of all samples.
    ridge : float
        λ of the whitening.
    temperature : float
        τ.
    """

    rows: Tensor
    p: Tensor
    y: Tensor
    M: Tensor
    ridge: float
    temperature: float


def whitening(features: Tensor, ridge: float) -> Tensor:
    """Return (Cov(f) / v + λ I)^(−1/2), v being the mean variance within the span of the samples.

    v = tr Cov(f) / min(N − 1, D): with fewer samples than features nothing is known outside of their span, and a mean
    over all D dimensions would make λ the weaker the less there is to go by. The identity where features do not vary.

    Parameters
    ----------
    features : (N, D) tensor
    ridge
        λ > 0; a large one leaves the features as they are, up to scale.

    Returns
    -------
    (D, D) tensor
    """
    ridge = _checks.positive("ridge", ridge)
    count, width = features.shape
    centred = (features - features.mean(0)).double()
    scale = _mean_variance(centred)
    identity = torch.eye(width, dtype=torch.float64, device=features.device)
    if scale <= 0:
        return identity.to(features)
    # Divided by the scale first: features of any magnitude keep the eigenvalues well within range.
    if count < width:
        _, singular, rows = torch.linalg.svd(centred, full_matrices=False)
        values = singular.square() / (count * scale) + ridge
        inside = (rows.t() * (values.rsqrt() - ridge**-0.5)) @ rows
        return (inside + ridge**-0.5 * identity).to(features)
    values, vectors = torch.linalg.eigh(centred.t() @ centred / (count * scale))
    return ((vectors * (values.clamp_min(0) + ridge).rsqrt()) @ vectors.t()).to(features)


def _mean_variance(centred: Tensor) -> float:
    count, width = centred.shape
    return float(centred.square().sum()) / (count * max(min(count - 1, width), 1))


def centre_cost(directions: Tensor) -> Tensor:
    """Return M_jk = (1 − cos(c_j, c_k)) / 2 off the diagonal and 0 on it, for (C_s, D) centres less their mean."""
    return cosine_cost(directions, directions).fill_diagonal_(0)


def held_out(
    features: Tensor, labels: Tensor, num_classes: int, *, ridge: float | None = None, folds: int = 5
) -> HeldOut:
    """Return what the ``"centres"`` bridge says of labelled samples that it was not fitted on.

    Each fold is told by a whitening and by centres that come from the others. λ of the whitening and τ are those that
    give all labels their highest likelihood. The whitening must not see a sample either: with fewer samples than
    features it shrinks exactly the directions in which those samples differ from their centres, and a sample would look
    less like its class than a new one does. Ours.

    Parameters
    ----------
    features : (N, D) tensor
    labels : (N,) tensor
        Target classes, each with at least one sample.
    num_classes
        C_s.
    ridge
        λ of the whitening, see `whitening`; by default chosen.
    folds
        ≥ 2; the n-th sample of class k is in fold (n + k) mod `folds`.

    Raises
    ------
    ValueError
        For shapes that do not match, non-finite features, a class without a sample, λ ≤ 0 and fewer than two folds.
    """
    x, labels, rows, told, ridge, temperature = _told(features, labels, num_classes, ridge, folds)
    centres = class_centres(x @ whitening(x, ridge), labels, num_classes)
    M = centre_cost(F.normalize(centres - centres.mean(0), dim=1))
    return HeldOut(rows, torch.softmax(told / temperature, dim=1), labels[rows], M, ridge, temperature)


def held_out_distributions(
    features: Tensor, labels: Tensor, num_classes: int, *, folds: int = 5
) -> tuple[Tensor, Tensor]:
    """Return `rows` and `p` of `held_out`, at three quarters of its cost: without the ground cost."""
    _, _, rows, told, _, temperature = _told(features, labels, num_classes, None, folds)
    return rows, torch.softmax(told / temperature, dim=1)


def _told(
    features: Tensor, labels: Tensor, num_classes: int, ridge: float | None, folds: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, float, float]:
    """Return features to compare and labels, rows (R,), relations of these (R, C_s) under the best λ, λ, τ."""
    if folds < 2:
        raise ValueError(f"folds must be >= 2, got {folds}")
    ridges = _RIDGES if ridge is None else (_checks.positive("ridge", ridge),)
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    class_centres(features, labels, num_classes)  # checks features and labels
    labels = labels.long()
    x = features.double() - features.double().mean(0)
    x = x / x.square().mean().sqrt().clamp_min(torch.finfo(x.dtype).tiny)  # of any magnitude, in single precision too
    if len(x) < x.shape[1]:
        # Coordinates within the span of the samples: nothing else is compared here, and it is far smaller.
        left, singular, _ = torch.linalg.svd(x, full_matrices=False)
        x = left * singular
    x = x.to(features)  # the decompositions of the folds take half the time in single precision
    fold = _folds(labels, num_classes, folds)
    relations = x.new_zeros(len(ridges), len(x), num_classes)
    for number in range(folds):
        asked = torch.nonzero(fold == number)[:, 0]
        if len(asked):
            known = fold != number
            relations[:, asked] = _relations(x[known], labels[known], x[asked], num_classes, ridges)
    rows = torch.nonzero(fold >= 0)[:, 0]
    told, y = relations[:, rows], labels[rows]
    best, temperature = (0, _UNCALIBRATED) if not len(rows) else _most_likely(told, y)
    return x, labels, rows, told[best], ridges[best], temperature


def _folds(labels: Tensor, num_classes: int, folds: int) -> Tensor:
    """Return each sample's fold, −1 for the only one of its class: held out, it would leave its class without any."""
    fold = torch.full_like(labels, -1)
    for k in range(num_classes):
        members = torch.nonzero(labels == k)[:, 0]
        if len(members) > 1:
            # Classes start at different folds, so that few samples a class do not all end up in the first ones.
            fold[members] = (torch.arange(len(members), device=labels.device) + k) % folds
    return fold


def _relations(known: Tensor, y: Tensor, asked: Tensor, num_classes: int, ridges: Sequence[float]) -> Tensor:
    """Return cos(W (x − o), W (c_j − o)) for every λ, (len(ridges), B, C_s): one decomposition serves them all."""
    centres = class_centres(known, y, num_classes)
    origin = centres.mean(0)
    rows = torch.cat([asked - origin, centres - origin])
    centred = known - known.mean(0)
    scale = _mean_variance(centred)
    if scale <= 0:
        values = rows.new_zeros(rows.shape[1])
    else:
        values, vectors = torch.linalg.eigh(centred.t() @ centred / (len(known) * scale))
        rows = rows @ vectors
    found = []
    for ridge in ridges:
        whitened = F.normalize(rows * (values.clamp_min(0) + ridge).rsqrt(), dim=1)
        found.append(whitened[: len(asked)] @ whitened[len(asked) :].t())
    return torch.stack(found)


def _most_likely(relations: Tensor, y: Tensor) -> tuple[int, float]:
    """Return which of the relations, (R, N, C_s), and which τ give the labels their highest likelihood."""
    losses = torch.stack(
        [torch.stack([F.cross_entropy(each / float(tau), y) for tau in _TEMPERATURES]) for each in relations]
    )
    best = int(losses.argmin())
    return best // len(_TEMPERATURES), float(_TEMPERATURES[best % len(_TEMPERATURES)])
