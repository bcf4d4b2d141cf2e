"""Which sample is looked at from which rung of a search on: nested, and every class on every rung."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def rung_of(groups: Tensor, shares: Sequence[float]) -> Tensor:
    """Return the first rung, from 0, on which each sample is looked at.

    Of each group ⌈s_r n⌉ samples belong to rung r and those below it, in the order that they are given in: at least one
    on the lowest rung.

    Parameters
    ----------
    groups : (N,) tensor
        Which samples are to be thinned alike: their class, say.
    shares
        s_r, rising to 1.

    Raises
    ------
    ValueError
        For shares that do not rise to 1.
    """
    if not shares or shares[-1] != 1 or min(shares) <= 0 or list(shares) != sorted(set(shares)):
        raise ValueError(f"shares must rise from above 0 to 1, got {list(shares)}")
    rungs = torch.empty(len(groups), dtype=torch.int8)
    for group in torch.unique(groups).tolist():
        members = torch.nonzero(groups == group)[:, 0]
        bounds = torch.tensor([math.ceil(share * len(members) - 1e-9) for share in shares])
        rungs[members] = torch.searchsorted(bounds, torch.arange(len(members)), right=True).to(torch.int8)
    return rungs
