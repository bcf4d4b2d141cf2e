"""Mixup and cutmix, with what the teachers say mixed in the same measure as the images."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.engine.sampling import seed_of


@dataclass(frozen=True)
class Mix:
    """How the images of a step are mixed.

    Attributes
    ----------
    share : float
        λ, how much of each image stays; the loss is λ L(its own targets) + (1 − λ) L(its partner's).
    partner : (n,) int64 tensor
        Row that each image is mixed with: a labelled one with a labelled one, a taught one with a taught one.
    """

    share: float
    partner: Tensor


def mixed(
    images: Tensor, labelled: int, *, mixup: float, cutmix: float, seed: int, step: int, rank: int
) -> tuple[Tensor, Mix | None]:
    """Mix the images of a step.

    Mixup: x ← λ x + (1 − λ) x' with λ ~ Beta(α, α) for the whole batch [1]_. Cutmix: a box of 1 − λ of the area comes
    from x', and λ is what is left after clipping it at the border [2]_. Where both are asked for, each has every second
    step, by lot. The random numbers are a function of seed, step and rank alone.

    Parameters
    ----------
    images : (n, C, H, W) tensor
        uint8; labelled ones first.
    labelled : int
        How many of them there are.
    mixup, cutmix : float
        α of each; 0: none.

    Returns
    -------
    images : (n, C, H, W) tensor
        Float in 0..255 after mixup.
    mix : Mix or None

    References
    ----------
    .. [1] Zhang et al., "mixup: Beyond empirical risk minimization", ICLR 2018.
    .. [2] Yun et al., "CutMix: Regularization strategy to train strong classifiers with localizable features",
       ICCV 2019.
    """
    if not (mixup or cutmix):
        return images, None
    random = np.random.default_rng(seed_of(seed, 5, step, rank))
    cut = bool(cutmix) and (not mixup or random.random() < 0.5)
    alpha = cutmix if cut else mixup
    share, n = float(random.beta(alpha, alpha)), len(images)
    order = np.concatenate([random.permutation(labelled), labelled + random.permutation(n - labelled)])
    partner = torch.from_numpy(order).to(images.device)
    if not cut:
        whole = images.float()
        return torch.lerp(whole[partner], whole, share), Mix(share, partner)
    height, width = images.shape[2:]
    side = math.sqrt(1 - share)
    y, x = int(random.integers(height)), int(random.integers(width))
    top, left = max(y - int(side * height / 2), 0), max(x - int(side * width / 2), 0)
    bottom, right = min(y + int(side * height / 2), height), min(x + int(side * width / 2), width)
    images = images.clone()
    images[:, :, top:bottom, left:right] = images[partner, :, top:bottom, left:right]
    return images, Mix(1 - (bottom - top) * (right - left) / (height * width), partner)
