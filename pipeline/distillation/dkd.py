"""Decoupled knowledge distillation: how sure the teacher is of its class, and what it thinks of all others, apart.

Shapes: B taught images, C classes.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.distillation.kd import no_loss, weighted_mean
from pipeline.distillation.step import About, Objective, Step
from pipeline.transport import _checks


def dkd_parts(
    logits: Tensor,
    target: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 4.0,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the divergence on the target class and that on the others.

    With p = soften(target, T), q = softmax(z / T) and k the target class of a row [1]_:

    - TCKD = T² KL([p_k, 1 − p_k] ‖ [q_k, 1 − q_k]),
    - NCKD = T² KL(p_{j≠k} / (1 − p_k) ‖ q_{j≠k} / (1 − q_k)),

    so that T² KL(p ‖ q) = TCKD + (1 − p_k) NCKD. Both are means over the rows, Σ_b w_b (·)_b / B.

    The target class is the label where there is one; else it is the most probable class of the teacher, which is ours.
    NCKD of a row whose whole mass lies on the target class is 0 (ours).

    Parameters
    ----------
    logits : (B, C) tensor
        z, the student's; C ≥ 2.
    target : (B, C) tensor
        Distributions at temperature 1. No gradient flows to them.
    labels : (B,) tensor, optional
        Target classes, −1 for none.
    temperature
        T > 0.
    weights : (B,) tensor, optional
        w, ≥ 0; by default 1.

    Returns
    -------
    tckd, nckd : () tensors

    Raises
    ------
    ValueError
        For shapes that do not match, rows that are no distributions, labels that are neither −1 nor a class, fewer than
        two classes, bad weights, and T ≤ 0.

    References
    ----------
    .. [1] Zhao et al., "Decoupled knowledge distillation", CVPR 2022 (arXiv 2203.08679).
    """
    temperature = _checks.positive("temperature", temperature)
    if logits.ndim != 2 or target.shape != logits.shape:
        raise ValueError(
            f"logits and target must have one shape (B, C), got {tuple(logits.shape)} and {tuple(target.shape)}"
        )
    rows, classes = logits.shape
    if classes < 2:
        raise ValueError(f"logits must have at least 2 classes, got shape {tuple(logits.shape)}")
    target = _checks.distributions("target", target.detach())
    chosen = target.argmax(1)
    if labels is not None:
        if labels.shape != (rows,):
            raise ValueError(f"labels must have shape ({rows},), got shape {tuple(labels.shape)}")
        if rows and (int(labels.min()) < -1 or int(labels.max()) >= classes):
            raise ValueError(
                f"labels must lie in [-1, {classes}), got values in [{int(labels.min())}, {int(labels.max())}]"
            )
        chosen = torch.where(labels >= 0, labels, chosen)
    chosen = chosen[:, None]
    # The C − 1 other classes of each row are gathered, rather than masked with a large number or with −∞: the
    # log-softmax over them is exact, and so is its gradient, whatever the logits are.
    others = torch.arange(classes - 1, device=logits.device).expand(rows, -1)
    others = others + (others >= chosen).to(others.dtype)

    log_q = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, dim=1)
    log_p = torch.log_softmax(target.to(log_q).log() / temperature, dim=1)
    log_q_others, log_p_others = log_q.gather(1, others), log_p.gather(1, others)

    log_q_pair = torch.cat([log_q.gather(1, chosen), log_q_others.logsumexp(1, keepdim=True)], dim=1)
    # The sum of the others, not 1 − p_k, which would round to 0 long before they do.
    p_pair = torch.cat([log_p.gather(1, chosen).exp(), log_p_others.exp().sum(1, keepdim=True)], dim=1)
    tckd = F.kl_div(log_q_pair, p_pair, reduction="none").sum(1)

    empty = torch.isneginf(log_p_others).all(1)
    # From logarithms: the others may be tiny altogether and differ all the same. An empty row gets any distribution.
    p_others = torch.softmax(log_p_others.masked_fill(empty[:, None], 0.0), dim=1)
    nckd = F.kl_div(torch.log_softmax(log_q_others, dim=1), p_others, reduction="none").sum(1)
    nckd = nckd.masked_fill(empty, 0.0)
    return weighted_mean(tckd, weights) * temperature**2, weighted_mean(nckd, weights) * temperature**2


def dkd_loss(
    logits: Tensor,
    target: Tensor,
    labels: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    weights: Tensor | None = None,
) -> Tensor:
    """Return α TCKD + β NCKD of `dkd_parts`, with α, β ≥ 0."""
    tckd, nckd = dkd_parts(logits, target, labels, temperature=temperature, weights=weights)
    return _factor("alpha", alpha) * tckd + _factor("beta", beta) * nckd


def _factor(name: str, value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number >= 0, got {value}")
    return value


class DKD(Objective):
    """Decoupled knowledge distillation to one distribution an image, the mix of its teachers by their shares.

    loss = α TCKD + β NCKD [1]_, see `dkd_parts`. Parts: ``dkd``, and before their factors ``tckd`` and ``nckd``.

    The publication's target class is the label. For images without one it is the most probable class of the mix, which
    is ours, as are mixing the teachers and the weights.

    Parameters
    ----------
    about : About
    alpha, beta
        α, β ≥ 0.
    temperature
        T > 0.

    Raises
    ------
    ValueError
        For a task of fewer than two classes, negative α or β, and T ≤ 0.

    References
    ----------
    .. [1] Zhao et al., "Decoupled knowledge distillation", CVPR 2022 (arXiv 2203.08679).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"said"})

    def __init__(self, about: About, *, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0) -> None:
        super().__init__()
        if len(about.classes) < 2:
            raise ValueError(f"decoupled distillation needs at least 2 classes, got {len(about.classes)}")
        self.alpha, self.beta = _factor("alpha", alpha), _factor("beta", beta)
        self.temperature = _checks.positive("temperature", temperature)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return ``{"loss", "dkd", "tckd", "nckd"}``; 0 when nobody is taught."""
        if step.said is None:
            return no_loss(step, "dkd", "tckd", "nckd")
        target, weights = step.said.mixed()
        tckd, nckd = dkd_parts(
            step.logits[step.taught],
            target,
            step.labels[step.taught],
            temperature=self.temperature,
            weights=weights,
        )
        loss = self.alpha * tckd + self.beta * nckd
        return {"loss": loss, "dkd": loss.detach(), "tckd": tckd.detach(), "nckd": nckd.detach()}
