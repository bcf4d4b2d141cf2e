"""DIST: the student keeps the teacher's relations, between the classes of an image and between the images of a class.

Shapes: B taught images of this process, N those of all data-parallel ranks, C classes.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from pipeline.distillation.gather import gather_rows
from pipeline.distillation.kd import checked_weights, no_loss, soften, weighted_mean
from pipeline.distillation.step import About, Objective, Step
from pipeline.transport import _checks


def pearson(x: Tensor, y: Tensor, weights: Tensor | None = None, *, eps: float = 1e-8) -> Tensor:
    """Return the correlation of each row of x with the same row of y.

    ρ = ⟨x̃, ỹ⟩ / (‖x̃‖ ‖ỹ‖ + eps), where x̃_n = √w_n (x_n − Σ w x / Σ w) and w is scaled to a mean of 1. A constant row
    has no correlation; it gets 0.

    Parameters
    ----------
    x, y : (R, N) tensors
    weights : (N,) tensor, optional
        w, ≥ 0; by default 1. With weights that are all 0 every correlation is 0.
    eps
        > 0.

    Returns
    -------
    (R,) tensor in [−1, 1], up to rounding.

    Raises
    ------
    ValueError
        For shapes that do not match, bad weights, and eps ≤ 0.
    """
    if x.ndim != 2 or y.shape != x.shape or not x.shape[1]:
        raise ValueError(
            f"x and y must have one shape (R, N) with N >= 1, got shapes {tuple(x.shape)} and {tuple(y.shape)}"
        )
    eps = _checks.positive("eps", eps)
    if weights is None:
        x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    else:
        w = checked_weights(weights, x.shape[1]).to(x)
        w = w / w.mean().clamp_min(torch.finfo(w.dtype).tiny)
        x, y = x - (w * x).mean(1, keepdim=True), y - (w * y).mean(1, keepdim=True)
        x, y = w.sqrt() * x, w.sqrt() * y
    # Not a clamp of the norms: the product plus eps is the published code's, and smooth.
    norms: Tensor = torch.linalg.vector_norm(x, dim=1) * torch.linalg.vector_norm(y, dim=1)
    return (x * y).sum(1) / (norms + eps)


def dist_parts(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return how far the student is from the teacher's relations between classes, and from those between samples.

    With q = softmax(z / T), p = soften(target, T) and the Pearson correlation ρ [1]_:

    - between classes, T² Σ_b w_b (1 − ρ(q_b:, p_b:)) / B,
    - between samples, T² w̄ mean_c (1 − ρ_w(q_:c, p_:c)) over the N images of all ranks.

    The weights are ours: they weigh the images in the correlation ρ_w, and their mean w̄ over the N images the whole of
    the second part, so that both parts scale with them alike. Gathering the ranks is ours too; it makes the second part
    and its gradient independent of how many there are. Every rank must hold equally many rows.

    Parameters
    ----------
    logits : (B, C) tensor
        z, the student's.
    target : (B, C) tensor
        Distributions at temperature 1. No gradient flows to them.
    temperature
        T > 0.
    weights : (B,) tensor, optional
        w, ≥ 0; by default 1.

    Returns
    -------
    inter_class, intra_class : () tensors
        In [0, 2 T²] for weights of 1. A constant row or column counts T².

    Raises
    ------
    ValueError
        For shapes that do not match, rows that are no distributions, bad weights, and T ≤ 0.

    References
    ----------
    .. [1] Huang et al., "Knowledge distillation from a stronger teacher", NeurIPS 2022 (arXiv 2205.10536).
    """
    temperature = _checks.positive("temperature", temperature)
    if logits.ndim != 2 or target.shape != logits.shape:
        raise ValueError(
            f"logits and target must have one shape (B, C), got {tuple(logits.shape)} and {tuple(target.shape)}"
        )
    q = torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, dim=1)
    p = soften(target, temperature).to(q)
    if not len(q):
        return q.sum(), q.sum()
    inter = weighted_mean(1 - pearson(q, p), weights)
    q, p = gather_rows(q), gather_rows(p)
    if weights is None:
        intra = (1 - pearson(q.T, p.T)).mean()
    else:
        w = gather_rows(weights.detach().to(q))
        intra = (1 - pearson(q.T, p.T, w)).mean() * w.mean()
    return inter * temperature**2, intra * temperature**2


def dist_loss(
    logits: Tensor,
    target: Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    weights: Tensor | None = None,
) -> Tensor:
    """Return β · between classes + γ · between samples of `dist_parts`, with β, γ ≥ 0."""
    inter, intra = dist_parts(logits, target, temperature=temperature, weights=weights)
    return _factor("beta", beta) * inter + _factor("gamma", gamma) * intra


def _factor(name: str, value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number >= 0, got {value}")
    return value


class DIST(Objective):
    """DIST to one distribution an image, the mix of its teachers by their shares.

    loss = β · inter-class + γ · intra-class [1]_, see `dist_parts`. Parts: ``dist``, and before their factors
    ``inter_class`` (over the classes of an image) and ``intra_class`` (over the images of all ranks, for a class).

    Mixing the teachers, the weights and the gathering of ranks are ours. When nobody is taught, that has to hold on
    every rank of the step.

    Parameters
    ----------
    about : About
    beta, gamma
        β, γ ≥ 0.
    temperature
        T > 0.

    Raises
    ------
    ValueError
        For negative β or γ, and T ≤ 0.

    References
    ----------
    .. [1] Huang et al., "Knowledge distillation from a stronger teacher", NeurIPS 2022 (arXiv 2205.10536).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"said"})

    def __init__(self, about: About, *, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        self.beta, self.gamma = _factor("beta", beta), _factor("gamma", gamma)
        self.temperature = _checks.positive("temperature", temperature)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return ``{"loss", "dist", "inter_class", "intra_class"}``; 0 when nobody is taught."""
        if step.said is None:
            return no_loss(step, "dist", "inter_class", "intra_class")
        target, weights = step.said.mixed()
        inter, intra = dist_parts(step.logits[step.taught], target, temperature=self.temperature, weights=weights)
        loss = self.beta * inter + self.gamma * intra
        return {
            "loss": loss,
            "dist": loss.detach(),
            "inter_class": inter.detach(),
            "intra_class": intra.detach(),
        }
