"""Means over a probe with their intervals, by bootstrap over its samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A mean and an interval that holds the central share `level` of its bootstrap distribution."""

    value: float
    low: float
    high: float


def bootstrap_mean(samples: Tensor, *, level: float = 0.9, resamples: int = 1000, seed: int = 0) -> Estimate:
    """Return mean_b x_b with its percentile interval over resamples of the samples [1]_.

    Parameters
    ----------
    samples : (N,) tensor
        x, one value a sample.
    level
        Share of the resamples within the interval, in (0, 1).
    resamples
        ≥ 1.
    seed

    Raises
    ------
    ValueError
        For no samples, values that are not finite and a level out of range.

    References
    ----------
    .. [1] Efron, "Bootstrap Methods: Another Look at the Jackknife", Annals of Statistics, 1979.
    """
    if samples.ndim != 1 or not len(samples):
        raise ValueError(f"samples must have shape (N,) with N >= 1, got shape {tuple(samples.shape)}")
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    if resamples < 1:
        raise ValueError(f"resamples must be >= 1, got {resamples}")
    values = samples.detach().double().cpu()
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"samples must be finite, got {values[~torch.isfinite(values)][0].item()}")
    generator = torch.Generator().manual_seed(seed)
    # How often each sample is drawn, by blocks: the draws themselves would be (resamples, N) integers at once.
    means = torch.cat(
        [
            values[torch.randint(len(values), (min(100, resamples - start), len(values)), generator=generator)].mean(1)
            for start in range(0, resamples, 100)
        ]
    )
    low, high = torch.quantile(means, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=means.dtype)).tolist()
    return Estimate(float(values.mean()), low, high)
