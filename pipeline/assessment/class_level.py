"""Scores that need no forward pass: how near a teacher's label space lies to the task's, from the ground cost alone."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.transport import _checks


def class_level_score(M: Tensor, frequencies: Tensor | None = None) -> float:
    """Return 1 − 2 Σ_j r_j min_i M_ij: how well a label space covers the target's classes. Higher is better.

    Σ_j r_j min_i M_ij is the transport cost between the two label spaces when the target's classes must all be reached,
    in proportion to r, and the teacher's may be used as much as wanted: min ⟨P, M⟩ over P ≥ 0 with Pᵀ 1 = r. A teacher
    with a thousand classes is not blamed for those that the task does not have. With half a cosine distance as ground
    cost 1 stands for a class of the same meaning for every class of the target, 0 for none that is related. Ours.

    Parameters
    ----------
    M : (C_t, C_s) tensor in [0, 1]
        Ground cost, from `names_cost` or `reference_cost`.
    frequencies : (C_s,) tensor, optional
        r, how often each class of the target occurs; by default all alike.

    Raises
    ------
    ValueError
        For a cost that is negative or not finite, and frequencies that do not match it or do not sum to 1.
    """
    M = _checks.ground_cost(M)
    if frequencies is None:
        frequencies = torch.full((M.shape[1],), 1 / M.shape[1], dtype=M.dtype, device=M.device)
    _checks.distributions("frequencies", frequencies[None], M.shape[1])
    return float(1 - 2 * (frequencies.to(M) * M.amin(0)).sum())
