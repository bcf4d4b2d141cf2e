"""How unsure a teacher is of a sample, and which teacher of a set is the surest.

Shapes: T teachers, B samples, C_s target classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.transport import _checks


def ambiguity_of_logits(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return the entropy of softmax(logits / τ), as a share of the largest possible.

    H_b = −Σ_i p_bi log p_bi / log C, from log-softmax: exact for logits as far apart as the type can hold.

    Parameters
    ----------
    logits : (B, C) tensor
    temperature
        τ > 0.

    Returns
    -------
    (B,) tensor in [0, 1]; all zeros when C is 1.

    Raises
    ------
    ValueError
        For logits of another shape or that are not finite, and for τ ≤ 0.
    """
    temperature = _checks.positive("temperature", temperature)
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must have shape (B, C) with C >= 1, got shape {tuple(logits.shape)}")
    _checks.finite("logits", logits)
    log_p = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, dim=1)
    return _entropy(log_p.exp(), log_p)


def ambiguity(p: Tensor) -> Tensor:
    """Return the entropy of each distribution, as a share of the largest possible.

    Parameters
    ----------
    p : (B, C) tensor

    Returns
    -------
    (B,) tensor in [0, 1]; all zeros when C is 1.

    Raises
    ------
    ValueError
        When a row of p is no distribution.
    """
    p = _checks.distributions("p", p).to(torch.promote_types(p.dtype, torch.float32))
    return _entropy(p, p.clamp_min(torch.finfo(p.dtype).tiny).log())


def _entropy(p: Tensor, log_p: Tensor) -> Tensor:
    classes = p.shape[1]
    if classes == 1:
        return torch.zeros_like(p[:, 0])
    # 0 · log 0 is 0: a class without mass has a finite log-probability here, or −inf after extreme logits.
    terms = torch.where(p > 0, p * log_p, torch.zeros_like(p))
    return (-terms.sum(1) / math.log(classes)).clamp(0, 1)


@dataclass(frozen=True)
class Assignment:
    """Who teaches which sample.

    Attributes
    ----------
    teacher : (B,) tensor
        Index of the teacher that is least ambiguous.
    ambiguity : (T, B) tensor in [0, 1]
        Of every teacher.
    confidence : (B,) tensor in [0, 1]
        1 − ambiguity of the chosen teacher.
    target : (B, C_s) tensor
        What the chosen teacher says of the target's classes.
    """

    teacher: Tensor
    ambiguity: Tensor
    confidence: Tensor
    target: Tensor


def assign(carried: Tensor, *, gains: Sequence[float] | Tensor | None = None) -> Assignment:
    """Give every sample to the teacher of the set that is the least unsure of it.

    argmin_t H_t(b) / log C_s over distributions that were carried to the target's classes [1]_; carrying them first,
    and with it the comparison across label spaces, is ours. With gains g it is argmax_t g_t (1 − H_t(b) / log C_s): a
    confident teacher that has little to do with the task does not win every sample (ours). Ties go to the teacher
    that comes first. Each sample is decided by itself, so that the batch it comes in does not matter.

    Parameters
    ----------
    carried : (T, B, C_s) tensor
        Every teacher's distribution over the target's classes.
    gains : (T,) sequence, optional
        Non-negative weights, for instance each teacher's transport gain.

    Raises
    ------
    ValueError
        For an empty set, values that are no distributions, and gains that are negative or not T in number.

    References
    ----------
    .. [1] Shen et al., "Customizing student networks from heterogeneous teachers via adaptive knowledge amalgamation",
       ICCV 2019 (arXiv 1908.07121).
    """
    if carried.ndim != 3 or carried.shape[0] == 0:
        raise ValueError(f"carried must have shape (T, B, C_s) with T >= 1, got shape {tuple(carried.shape)}")
    teachers, samples, classes = carried.shape
    amount = ambiguity(carried.reshape(-1, classes)).reshape(teachers, samples)
    certainty = 1 - amount
    if gains is not None:
        weights = torch.as_tensor(gains, dtype=certainty.dtype, device=certainty.device)
        if weights.shape != (teachers,):
            raise ValueError(f"gains must have shape ({teachers},), got shape {tuple(weights.shape)}")
        _checks.finite("gains", weights)
        if float(weights.min()) < 0:
            raise ValueError(f"gains must not be negative, got {float(weights.min()):g}")
        certainty = certainty * weights[:, None]
    first = certainty.argmax(dim=0)  # documented to be the first of equal maxima
    rows = torch.arange(samples, device=carried.device)
    return Assignment(teacher=first, ambiguity=amount, confidence=1 - amount[first, rows], target=carried[first, rows])
