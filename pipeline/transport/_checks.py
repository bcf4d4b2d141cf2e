"""Validation of distributions, costs and scalars, so that every function of the room words its errors alike."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# How far a row may be from summing to one: softmax in bfloat16 is off by about 1e-2.
_SUM_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}


def positive(name: str, value: float) -> float:
    """Return `value`, or raise `ValueError` when it is not a finite number above zero."""
    if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a finite number > 0, got {value}")
    return float(value)


def distributions(name: str, p: Tensor, width: int | None = None) -> Tensor:
    """Return `p` when each row is a probability distribution.

    Parameters
    ----------
    p : (B, C) tensor
    width
        The C that is expected, where it is known.

    Raises
    ------
    ValueError
        With the shape, and the first value that is non-finite, negative or out of normalisation.
    """
    if p.ndim != 2:
        raise ValueError(f"{name} must have shape (B, C), got shape {tuple(p.shape)}")
    if not p.is_floating_point():
        raise ValueError(f"{name} must be a floating-point tensor, got {p.dtype}")
    if p.shape[1] == 0 or (width is not None and p.shape[1] != width):
        expected = "at least 1" if width is None else width
        raise ValueError(f"{name} must have {expected} classes, got shape {tuple(p.shape)}")
    value = p.detach()
    tolerance = _SUM_TOLERANCE.get(value.dtype, 2e-2)
    sums = value.float().sum(1) if value.dtype not in _SUM_TOLERANCE else value.sum(1)
    # One synchronisation with the device when all is well; which check failed is looked up only afterwards.
    # A NaN makes both comparisons false, an infinity the second.
    if bool(((value >= 0).all() & ((sums - 1).abs() <= tolerance).all()).item()):
        return p
    finite(name, value)
    if bool((value < 0).any()):
        raise ValueError(f"{name} must not be negative, got {value.min().item():g} in shape {tuple(p.shape)}")
    worst = sums[(sums - 1).abs().argmax()].item()
    raise ValueError(f"rows of {name} must sum to 1, got a sum of {worst:g} in shape {tuple(p.shape)}")


def finite(name: str, value: Tensor) -> Tensor:
    """Return `value`, or raise `ValueError` naming its first non-finite entry."""
    good = torch.isfinite(value)
    if not bool(good.all().item()):
        raise ValueError(f"{name} must be finite, got {value[~good][0].item()} in shape {tuple(value.shape)}")
    return value


def ground_cost(M: Tensor, shape: tuple[int, int] | None = None) -> Tensor:
    """Return `M` when it is a finite (C_t, C_s) matrix without negative entries, of `shape` where that is known.

    Raises
    ------
    ValueError
        With the shape, and the first entry that is not finite or the least that is negative.
    """
    if M.ndim != 2:
        raise ValueError(f"M must have shape (C_t, C_s), got shape {tuple(M.shape)}")
    if not M.is_floating_point():
        raise ValueError(f"M must be a floating-point tensor, got {M.dtype}")
    if shape is not None and tuple(M.shape) != shape:
        raise ValueError(f"M must have shape {shape} to match the distributions, got shape {tuple(M.shape)}")
    if M.numel() == 0:
        raise ValueError(f"M must have at least one class on either side, got shape {tuple(M.shape)}")
    value = M.detach()
    # As in `distributions`, one synchronisation when all is well. A NaN anywhere is both the least and the largest.
    least, largest = torch.aminmax(value)
    if bool(((least >= 0) & (largest < math.inf)).item()):
        return value
    finite("M", value)
    raise ValueError(f"M must not be negative, got {least.item():g} in shape {tuple(M.shape)}")


def labels(name: str, y: Tensor, size: int, num_classes: int) -> Tensor:
    """Return class indices `y` of length `size` in [0, num_classes); raise `ValueError` otherwise."""
    if y.shape != (size,):
        raise ValueError(f"{name} must have shape ({size},), got shape {tuple(y.shape)}")
    if y.is_floating_point() or y.dtype == torch.bool:
        raise ValueError(f"{name} must be class indices of an integer type, got {y.dtype}")
    if size and (int(y.min()) < 0 or int(y.max()) >= num_classes):
        raise ValueError(f"{name} must lie in [0, {num_classes}), got values in [{int(y.min())}, {int(y.max())}]")
    return y.long()
