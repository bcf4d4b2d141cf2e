"""What a student is trained on: modules that return named parts of the loss, among them ``"loss"``, their total.

Shapes: B samples, C_s target classes, T teachers, L label-space sizes (L_t each, L_max the largest).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.transport import _checks
from pipeline.transport.sinkhorn import transport_loss


def labelled_cross_entropy(logits: Tensor, y: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Return the mean cross-entropy of the rows that have a label; 0, with a gradient of 0, when none has.

    Parameters
    ----------
    logits : (B, C_s) tensor
    y : (B,) tensor
        Target classes, −1 for none.

    Raises
    ------
    ValueError
        For shapes that do not match and labels that are neither −1 nor a class.
    """
    if logits.ndim != 2 or y.shape != logits.shape[:1]:
        raise ValueError(
            f"logits and y must have shapes (B, C) and (B,), got {tuple(logits.shape)} and {tuple(y.shape)}"
        )
    if y.numel() and (int(y.min()) < -1 or int(y.max()) >= logits.shape[1]):
        raise ValueError(f"y must lie in [-1, {logits.shape[1]}), got values in [{int(y.min())}, {int(y.max())}]")
    # A sum over a count of at least one: the mean over no rows would be NaN, and a constant 0 would leave ranks of a
    # data-parallel run without a backward pass.
    total = F.cross_entropy(logits, y, ignore_index=-1, reduction="sum", label_smoothing=label_smoothing)
    return total / (y >= 0).sum().clamp_min(1)


class CrossEntropy(nn.Module):
    """Supervision alone: the mean cross-entropy over labelled rows."""

    def __init__(self, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Return ``{"loss", "cross_entropy"}`` for logits (B, C_s) and y (B,)."""
        loss = labelled_cross_entropy(logits, y, label_smoothing=self.label_smoothing)
        return {"loss": loss, "cross_entropy": loss.detach()}


class TransportDistillation(nn.Module):
    """Every sample learns from one teacher, in that teacher's own label space.

    loss = mean_b w_b S_ε(p_b, q_b; M_t(b)), with q = softmax(student logits) and t(b) the sample's teacher; λ and the
    ramp multiply it.

    Parameters
    ----------
    costs : sequence of (L_t, C_s) tensors
        Ground cost of each teacher.
    reg
        ε, in the unit of the costs.
    weight
        λ ≥ 0. For a sure teacher S_ε / ε is a reverse KL divergence plus a constant, so that λ = 1 / ε puts it on the
        scale of a cross-entropy.
    ramp
        Fraction of the training over which λ rises linearly from 0, in [0, 1].
    max_iter, tol
        Of the solver, see `transport_loss`.

    Notes
    -----
    The loss is that of SCTD (Lu et al., arXiv 2204.11526); one teacher a sample comes from adaptive amalgamation (Shen
    et al., arXiv 1908.07121). Joining the two, weights and ramp are ours.
    """

    def __init__(
        self,
        costs: Sequence[Tensor],
        *,
        reg: float = 0.1,
        weight: float = 10.0,
        ramp: float = 0.0,
        max_iter: int = 100,
        tol: float = 1e-2,
    ) -> None:
        super().__init__()
        if not costs:
            raise ValueError("costs must hold one matrix a teacher, got none")
        if not weight >= 0:
            raise ValueError(f"weight must be >= 0, got {weight}")
        if not 0 <= ramp <= 1:
            raise ValueError(f"ramp must be in [0, 1], got {ramp}")
        self.reg, self.weight, self.ramp = _checks.positive("reg", reg), weight, ramp
        self.max_iter, self.tol = max_iter, _checks.positive("tol", tol)
        self.teachers = len(costs)
        for number, cost in enumerate(costs):
            self.register_buffer(f"cost_{number}", _checks.ground_cost(cost, (len(cost), costs[0].shape[-1])).clone())

    def forward(
        self,
        logits: Tensor,
        teacher: Tensor,
        p: Tensor,
        *,
        weights: Tensor | None = None,
        progress: float = 1.0,
    ) -> dict[str, Tensor]:
        """Return ``{"loss", "transport"}``: the weighted part that is trained on, and the plain mean.

        Parameters
        ----------
        logits : (B, C_s) tensor
            The student's.
        teacher : (B,) tensor
            Index of each sample's teacher, −1 for none.
        p : (B, L_max) tensor
            Each sample's distribution over its teacher's label space, padded with zeros.
        weights : (B,) tensor, optional
            w, ≥ 0; by default 1.
        progress
            Part of the training done, in [0, 1].

        Raises
        ------
        ValueError
            For shapes that do not match, a teacher that does not exist, and rows of p that are no distributions.
        """
        if logits.ndim != 2 or teacher.shape != logits.shape[:1] or p.ndim != 2 or len(p) != len(logits):
            raise ValueError(
                "logits, teacher and p must have shapes (B, C_s), (B,) and (B, L_max), got "
                f"{tuple(logits.shape)}, {tuple(teacher.shape)} and {tuple(p.shape)}"
            )
        if weights is not None and weights.shape != teacher.shape:
            raise ValueError(f"weights must have shape ({len(logits)},), got shape {tuple(weights.shape)}")
        present = torch.unique(teacher).tolist()
        if present and not -1 <= present[0] <= present[-1] < self.teachers:
            raise ValueError(f"teacher must lie in [-1, {self.teachers}), got values in [{present[0]}, {present[-1]}]")
        q = logits.float().softmax(1)
        total = q.sum() * 0  # keeps the graph, so that a batch without teachers has a backward pass too
        for number in present:
            if number < 0:
                continue
            rows = torch.nonzero(teacher == number)[:, 0]
            cost = self.get_buffer(f"cost_{number}")
            each = transport_loss(
                p[rows, : len(cost)], q[rows], cost, self.reg, "none", max_iter=self.max_iter, tol=self.tol
            )
            total = total + (each if weights is None else each * weights[rows]).sum()
        mean = total / max(len(logits), 1)
        return {"loss": mean * (self.weight * ramped(progress, self.ramp)), "transport": mean.detach()}


class SoftTargets(nn.Module):
    """Knowledge distillation: mean_b w_b τ² KL(target_b ‖ softmax(z_b / τ)).

    Parameters
    ----------
    weight
        ≥ 0.
    temperature
        τ > 0 of the student's softmax; the factor τ² keeps the gradient's scale [1]_.

    References
    ----------
    .. [1] Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", 2015 (arXiv 1503.02531).
    """

    def __init__(self, *, weight: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        if not weight >= 0:
            raise ValueError(f"weight must be >= 0, got {weight}")
        self.weight, self.temperature = weight, _checks.positive("temperature", temperature)

    def forward(self, logits: Tensor, target: Tensor, *, weights: Tensor | None = None) -> dict[str, Tensor]:
        """Return ``{"loss", "soft_targets"}``.

        Parameters
        ----------
        logits : (B, C_s) tensor
        target : (B, C_s) tensor
            Distributions over the target's classes.
        weights : (B,) tensor, optional
        """
        _checks.distributions("target", target, logits.shape[-1])
        if target.shape != logits.shape:
            raise ValueError(f"logits and target must have one shape, got {tuple(logits.shape)}, {tuple(target.shape)}")
        log_q = torch.log_softmax(logits.float() / self.temperature, dim=1)
        each = F.kl_div(log_q, target.to(log_q), reduction="none").sum(1) * self.temperature**2
        mean = (each if weights is None else each * weights).sum() / max(len(logits), 1)
        return {"loss": self.weight * mean, "soft_targets": mean.detach()}


def ramped(progress: float, ramp: float) -> float:
    """Return the share, in [0, 1], that the teachers have at `progress` when it rises to 1 over the first `ramp`."""
    return min(progress / ramp, 1.0) if ramp > 0 else 1.0
