"""How much of the labels a linear map of the features explains, sample by sample, each left out of its own fit.

Shapes: N samples, D features, C_s target classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.assessment.feature_scores import centred, labelled

# Values of λ to choose from, in units of the mean squared singular value.
_RIDGES = tuple(10.0 ** (exponent / 2) for exponent in range(-8, 5))


def linear_gain(features: Tensor, y: Tensor, num_classes: int) -> Tensor:
    """Return 1 − e_b / ē_0, with e_b the squared error of ridge regression on the one-hot label, b left out.

    Leave-one-out residuals in closed form (PRESS) [1]_: e_b = ‖(Y − Ŷ)_b / (1 − H_bb)‖² with the hat matrix
    H = 1 1ᵀ / N + U diag(s² / (s² + λ)) Uᵀ of the centred features U diag(s) Vᵀ. ē_0 is the mean error of the class
    frequencies, left out alike. The mean over b is a cross-validated R²: 1 for labels that are a linear map of the
    features, 0 for features that tell nothing. λ is the one with the least error.

    Parameters
    ----------
    features : (N, D) tensor
    y : (N,) tensor
        Target classes, at least two of them present.
    num_classes
        C_s.

    Returns
    -------
    (N,) float64 tensor, each entry ≤ 1

    Raises
    ------
    ValueError
        For shapes that do not match, features that are not finite, fewer than two classes.

    References
    ----------
    .. [1] Allen, "The relationship between variable selection and data augmentation and a method for prediction",
       Technometrics, 1974.
    """
    x, _, _ = labelled(features, y)
    x = centred(x)
    count = len(x)
    targets = F.one_hot(y.long(), num_classes).double()
    targets = targets - targets.mean(0)
    if count <= x.shape[1]:
        squares, basis = torch.linalg.eigh(x @ x.t())
    else:
        squares, vectors = torch.linalg.eigh(x.t() @ x)
        basis = x @ vectors / squares.clamp_min(torch.finfo(x.dtype).tiny).sqrt()
    kept = squares > squares[-1].clamp_min(0) * 1e-12
    squares, basis = squares[kept], basis[:, kept]
    without = targets.square().sum(1).mean() * (count / (count - 1)) ** 2
    if not len(squares):
        return torch.zeros(count, dtype=torch.float64, device=x.device)
    within, leverage = basis.t() @ targets, basis.square()
    best: Tensor | None = None
    for ridge in _RIDGES:
        share = squares / (squares + ridge * squares.mean())
        free = (1 - 1 / count - leverage @ share).clamp_min(1e-9)
        errors = (targets - basis @ (share[:, None] * within)).square().sum(1) / free.square()
        if best is None or float(errors.mean()) < float(best.mean()):
            best = errors
    assert best is not None
    return 1 - best / without
