"""Knowledge distillation: the student's softmax follows the teachers', both made softer by a temperature.

Shapes: B taught images, C classes.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.distillation.step import About, Objective, Step
from pipeline.transport import _checks


def soften(p: Tensor, temperature: float) -> Tensor:
    """Return p^(1/T), normalised: softmax(z / T) where p is softmax(z).

    Computed from log p, so that small probabilities do not vanish; zeros stay zeros. No gradient flows to p.

    Parameters
    ----------
    p : (B, C) tensor
        Distributions.
    temperature
        T > 0.

    Returns
    -------
    (B, C) tensor of float32, or float64 when p is; its rows sum to 1.

    Raises
    ------
    ValueError
        When a row of p is no distribution, and for T ≤ 0.
    """
    temperature = _checks.positive("temperature", temperature)
    p = _checks.distributions("p", p.detach())
    return torch.softmax(p.to(torch.promote_types(p.dtype, torch.float32)).log() / temperature, dim=1)


def softened_divergence(logits: Tensor, softened: Tensor, temperature: float) -> Tensor:
    """Return T² KL(p_b ‖ softmax(z_b / T)) of each row, for p that is soft already.

    The factor T² keeps the scale of the gradient when T changes [1]_.

    Parameters
    ----------
    logits : (B, C) tensor
        z, the student's.
    softened : (B, C) tensor
        p, distributions at temperature T, for instance of `soften`; not checked again. No gradient flows to them.
    temperature
        T > 0.

    Returns
    -------
    (B,) tensor, ≥ 0 but for rounding; finite for all finite logits.

    Raises
    ------
    ValueError
        For shapes that do not match, and T ≤ 0.

    References
    ----------
    .. [1] Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", 2015 (arXiv 1503.02531).
    """
    temperature = _checks.positive("temperature", temperature)
    if logits.ndim != 2 or softened.shape != logits.shape:
        raise ValueError(
            f"logits and target must have one shape (B, C), got {tuple(logits.shape)} and {tuple(softened.shape)}"
        )
    log_q = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, dim=1)
    # kl_div takes 0 · log 0 as 0.
    return F.kl_div(log_q, softened.detach().to(log_q), reduction="none").sum(1) * temperature**2


def weighted_mean(each: Tensor, weights: Tensor | None) -> Tensor:
    """Return Σ_b w_b each_b / B: a mean over the rows, not over the sum of their weights.

    The divisor is fixed, so that the mean over data-parallel ranks is that of the whole batch. No gradient flows to
    the weights.

    Parameters
    ----------
    each : (B,) tensor
    weights : (B,) tensor, optional
        w, ≥ 0; by default 1.

    Returns
    -------
    () tensor; 0, with a gradient of 0, when B is 0.

    Raises
    ------
    ValueError
        For weights of another shape, that are negative or no numbers.
    """
    if weights is not None:
        each = each * checked_weights(weights, len(each)).to(each)
    return each.sum() / max(len(each), 1)


def checked_weights(weights: Tensor, rows: int) -> Tensor:
    """Return the weights without a gradient, or raise `ValueError` when they are not `rows` finite numbers ≥ 0."""
    weights = weights.detach()
    if weights.shape != (rows,):
        raise ValueError(f"weights must have shape ({rows},), got shape {tuple(weights.shape)}")
    # On a GPU a look at the values would wait for all that it has been given to do.
    if weights.device.type == "cpu" and not bool((weights >= 0).logical_and(weights < torch.inf).all()):
        _checks.finite("weights", weights)
        raise ValueError(f"weights must not be negative, got {weights.min().item():g}")
    return weights


def kd_loss(logits: Tensor, target: Tensor, temperature: float, weights: Tensor | None = None) -> Tensor:
    """Return mean_b w_b T² KL(soften(target_b, T) ‖ softmax(z_b / T)).

    Parameters
    ----------
    logits : (B, C) tensor
        z, the student's.
    target : (B, C) tensor
        Distributions at temperature 1. No gradient flows to them.
    temperature
        T > 0.
    weights : (B,) tensor, optional
        w, ≥ 0; by default 1. The mean is over the B rows.

    Raises
    ------
    ValueError
        For shapes that do not match, rows that are no distributions, bad weights, and T ≤ 0.
    """
    return weighted_mean(softened_divergence(logits, soften(target, temperature), temperature), weights)


def no_loss(step: Step, *names: str, objective: Objective | None = None) -> dict[str, Tensor]:
    """Return the parts of a step in which nobody is taught: all 0, the loss with a graph that gives gradients of 0.

    A data-parallel run waits for the gradient of every parameter, also of those that the objective has itself.
    """
    # Sums over no rows: 0 even where the sum of the logits would overflow.
    loss = step.logits[:0].sum()
    for parameter in objective.parameters() if objective is not None else ():
        loss = loss + parameter[:0].sum()
    return {"loss": loss} | {name: loss.detach() for name in names}


class KnowledgeDistillation(Objective):
    """Knowledge distillation to one distribution an image, the mix of its teachers by their shares.

    loss = mean_b w_b T² KL(soften(p_b, T) ‖ softmax(z_b / T)) [1]_, with (p, w) from `Said.mixed`. Part: ``kd``.

    Mixing the teachers first, and the weights, are ours.

    Parameters
    ----------
    about : About
    temperature
        T > 0.

    Raises
    ------
    ValueError
        For T ≤ 0.

    References
    ----------
    .. [1] Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", 2015 (arXiv 1503.02531).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"said"})

    def __init__(self, about: About, *, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = _checks.positive("temperature", temperature)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return ``{"loss", "kd"}``; 0 when nobody is taught."""
        if step.said is None:
            return no_loss(step, "kd")
        target, weights = step.said.mixed()
        loss = kd_loss(step.logits[step.taught], target, self.temperature, weights)
        return {"loss": loss, "kd": loss.detach()}
