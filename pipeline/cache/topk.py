"""Logits of many classes in the space of few: the k likeliest classes and the mass of the others.

Shapes: n images, C classes, k classes kept.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def compress_logits(logits: Tensor, k: int) -> dict[str, Tensor]:
    """Keep the k largest log-probabilities of each row, and the log of what the other classes have together.

    With ℓ = log softmax(z) and K the k classes of the largest ℓ:

        values = ℓ_K,    rest = log Σ_{c ∉ K} exp ℓ_c = log(1 − Σ_{c ∈ K} exp ℓ_c)

    The softmax does not change when a constant is added to all logits, so that ℓ is z up to a shift. It is ℓ that is
    kept: the classes that matter have values near 0, where half precision is finest.

    Parameters
    ----------
    logits : (n, C) tensor
        Finite, or -inf for a class that is excluded.
    k
        Classes to keep; with k ≥ C all are kept.

    Returns
    -------
    compressed : dict
        ``values`` (n, min(k, C)), in descending order; ``indices`` of the same shape, their class numbers, int16 where
        C ≤ 32768 and int32 above; ``rest`` (n,), -inf where nothing is left. Values and rest are float32, float64 for
        float64 logits.

    Raises
    ------
    ValueError
        If logits is no (n, C) floating-point tensor with C ≥ 1, or k < 1.
    """
    log_p = _log_softmax(logits)
    if k < 1:
        raise ValueError(f"k must be >= 1, got {k}")
    classes = log_p.shape[1]
    values, indices = log_p.topk(min(k, classes), dim=1)
    # 1 − Σ_K would cancel to 0 where the others have little; their own sum keeps its digits.
    rest = log_p.scatter(1, indices, -math.inf).logsumexp(1)
    narrow = torch.int16 if classes <= torch.iinfo(torch.int16).max + 1 else torch.int32
    return {"values": values, "indices": indices.to(narrow), "rest": rest}


def expand_logits(values: Tensor, indices: Tensor, rest: Tensor, C: int) -> Tensor:
    """Return log-probabilities over all classes; what the others have together is spread evenly over them.

        log p̂_c = v_c − log Z for c ∈ K,    log p̂_c = rest − log(C − k) − log Z otherwise

    where Z = Σ_K exp v + exp rest makes p̂ sum to 1 after values were rounded. They serve as logits at temperature 1:
    a softmax is the same for logits that differ by a constant, so the constant that was in the teacher's logits is
    gone. At a temperature above 1 the rest weighs somewhat more than it should, as an even spread has the largest
    Σ p^(1/T). With k ≥ C the result is log softmax of what was compressed.

    Parameters
    ----------
    values, indices : (n, k) tensor
        Of `compress_logits`, in whatever precision they were stored.
    rest : (n,) tensor
    C
        Classes.

    Returns
    -------
    log_p : (n, C) tensor
        float32, or float64 where `values` are. -inf where the others have nothing.

    Raises
    ------
    ValueError
        For shapes that do not match, or k > C.
    """
    if values.ndim != 2 or values.shape != indices.shape or rest.shape != values.shape[:1]:
        raise ValueError(
            "values and indices must have shape (n, k) and rest (n,), "
            f"got {tuple(values.shape)}, {tuple(indices.shape)} and {tuple(rest.shape)}"
        )
    k = values.shape[1]
    if not 1 <= k <= C:
        raise ValueError(f"k must be in [1, C], got k = {k} and C = {C}")
    dtype = torch.promote_types(values.dtype, torch.float32)
    values, rest = values.to(dtype), rest.to(dtype)
    log_z = torch.logaddexp(values.logsumexp(1), rest)
    others = rest - log_z - math.log(max(C - k, 1))
    return others[:, None].repeat(1, C).scatter(1, indices.long(), values - log_z[:, None])


def compression_error(logits: Tensor, k: int) -> Tensor:
    """Return KL(p ‖ p̂) of each image, in nats: what is lost when k classes are kept.

    p = softmax(z) and p̂ is what `expand_logits` gives. Only the others contribute; with H their entropy among
    themselves and m their mass, KL = m (log(C − k) − H).

    Parameters
    ----------
    logits : (n, C) tensor
    k

    Returns
    -------
    lost : (n,) float64 tensor
        ≥ 0.

    Raises
    ------
    ValueError
        As `compress_logits`.
    """
    logits = logits.double()
    log_p = _log_softmax(logits)
    log_q = expand_logits(**compress_logits(logits, k), C=logits.shape[1])
    p = log_p.exp()
    divergence = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(1)
    return divergence.clamp_min(0)


def _log_softmax(logits: Tensor) -> Tensor:
    if logits.ndim != 2 or not logits.shape[1] or not logits.is_floating_point():
        raise ValueError(
            f"logits must be a floating-point tensor of shape (n, C), got {logits.dtype} of shape {tuple(logits.shape)}"
        )
    return logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
