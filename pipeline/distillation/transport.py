"""Transport distillation: the student's distribution is moved onto its teachers', each in its own label space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from pipeline.distillation.step import About, Objective, Step
from pipeline.transport import _checks
from pipeline.transport.sinkhorn import transport_loss


def transport_distillation(
    logits: Tensor,
    p: Sequence[Tensor],
    shares: Tensor,
    costs: Sequence[Tensor],
    reg: float,
    *,
    max_iter: int = 100,
    tol: float = 1e-2,
) -> Tensor:
    """Return mean_b Σ_t w_tb S_ε(p_tb, q_b; M_t) with q = softmax(logits).

    A teacher costs solver time for those images alone that it has a share in.

    Parameters
    ----------
    logits : (B, C_s) tensor
        The student's.
    p : T tensors (B, L_t)
        Distributions over the teachers' label spaces.
    shares : (T, B) tensor
        w ≥ 0.
    costs : T tensors (L_t, C_s)
        Ground costs M.
    reg
        ε, in the unit of the costs.
    max_iter, tol
        Of the solver, see `transport_loss`.

    Raises
    ------
    ValueError
        For shapes that do not match, and rows of p that are no distributions.
    """
    if logits.ndim != 2 or shares.shape != (len(costs), len(logits)) or len(p) != len(costs):
        raise ValueError(
            f"logits, p and shares must have shapes (B, C_s), {len(costs)} times (B, L_t) and ({len(costs)}, B), got "
            f"{tuple(logits.shape)}, {[tuple(one.shape) for one in p]} and {tuple(shares.shape)}"
        )
    q = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(1)
    total = q.sum() * 0  # keeps the graph, so that a batch without teachers has a backward pass too
    for said, share, cost in zip(p, shares, costs, strict=True):
        rows = torch.nonzero(share > 0)[:, 0]
        if len(rows):
            each = transport_loss(said[rows].to(q), q[rows], cost.to(q), reg, "none", max_iter=max_iter, tol=tol)
            total = total + (each * share[rows]).sum()
    return total / max(len(logits), 1)


class TransportDistillation(Objective):
    """The student learns from its teachers in their own label spaces.

    loss = mean_b Σ_t w_tb S_ε(p_tb, q_b; M_t), w the shares: one teacher an image, or all with weights of their own.

    Parameters
    ----------
    about : About
        Its teachers' ground costs.
    reg
        ε, in the unit of the costs. For a sure teacher S_ε / ε is a reverse KL divergence plus a constant, so that a
        weight of 1 / ε puts the loss on the scale of a cross-entropy.
    max_iter, tol
        Of the solver, see `transport_loss`.

    Notes
    -----
    The loss is that of SCTD (Lu et al., arXiv 2204.11526); one teacher a sample comes from adaptive amalgamation (Shen
    et al., arXiv 1908.07121). Joining the two, and the shares, are ours.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"said"})

    def __init__(self, about: About, *, reg: float = 0.1, max_iter: int = 100, tol: float = 1e-2) -> None:
        super().__init__()
        self.reg, self.max_iter, self.tol = _checks.positive("reg", reg), max_iter, _checks.positive("tol", tol)
        self._teachers = len(about.teachers)
        for number, teacher in enumerate(about.teachers):
            cost = _checks.ground_cost(teacher.cost, (len(teacher.cost), len(about.classes)))
            self.register_buffer(f"cost_{number}", cost.clone(), persistent=False)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """Return ``{"loss", "transport"}``."""
        if step.said is None:
            loss = step.logits.sum() * 0
        else:
            costs = [self.get_buffer(f"cost_{number}") for number in range(self._teachers)]
            said, logits = step.said, step.logits[step.taught]
            loss = transport_distillation(
                logits, said.p, said.shares, costs, self.reg, max_iter=self.max_iter, tol=self.tol
            )
        return {"loss": loss, "transport": loss.detach()}
