"""Transport cost of a teacher on a labelled probe, and the gain over labels without relation to its predictions."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.transport import _checks


def transport_cost(p: Tensor, y: Tensor, M: Tensor) -> Tensor:
    """Return the cost of moving each distribution onto its label.

    cost_b = Σ_i p_bi M_{i, y_b}: for a one-hot target the plan is forced, and no solver is needed.

    Parameters
    ----------
    p : (B, C_t) tensor
        The teacher's distributions over its label space.
    y : (B,) tensor
        Target classes.
    M : (C_t, C_s) tensor
        Ground cost.

    Returns
    -------
    (B,) tensor

    Raises
    ------
    ValueError
        For values that are no distributions, a negative or non-finite cost, shapes that do not match and labels
        outside the target's classes.
    """
    _checks.distributions("p", p)
    M = _checks.ground_cost(M, (p.shape[1], M.shape[-1] if M.ndim else 0)).to(p)
    y = _checks.labels("y", y, p.shape[0], M.shape[1])
    return (p * M.t()[y]).sum(1)


def transport_gain(p: Tensor, y: Tensor, M: Tensor) -> float:
    """Return 1 − cost / (cost with the labels permuted, in expectation).

    The expectation over permutations needs the marginals only: p̄ᵀ M r, with p̄ the mean distribution and r the label
    frequencies. 0 means no relation to the task, 1 a free transport, less than 0 a relation that misleads. Unlike the
    cost, the gain does not favour a teacher that gives every image the same cheap answer. Ours.

    Parameters
    ----------
    p : (B, C_t) tensor
    y : (B,) tensor
    M : (C_t, C_s) tensor

    Raises
    ------
    ValueError
        As for `transport_cost`, and for an empty batch.
    """
    if p.ndim == 2 and p.shape[0] == 0:
        raise ValueError(f"p must have at least one row, got shape {tuple(p.shape)}")
    p = p.double()
    cost = transport_cost(p, y, M).mean()
    frequencies = torch.bincount(y.long(), minlength=M.shape[1]).to(p) / len(y)
    expected = p.mean(0) @ M.to(p) @ frequencies
    # Where even unrelated labels cost nothing, there is nothing to gain.
    return float(1 - cost / expected) if expected > 0 else 0.0
