"""The rows of all data-parallel ranks, for a loss that is no mean over rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed


class _Gather(torch.autograd.Function):
    """Concatenate the rows of all ranks. The adjoint: a rank's rows get the sum of the gradients that all ranks sent.

    torch.distributed.nn.functional.all_gather does the same; it is deprecated.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.count = len(rows)
        pieces = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
        distributed.all_gather(pieces, rows)
        return torch.cat(pieces)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        distributed.all_reduce(total)
        first = distributed.get_rank() * ctx.count
        return total[first : first + ctx.count]


def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows of all ranks of the default process group, rank after rank; without one, the rows themselves.

    A loss of these is the same number on every rank. Its gradient reaches the own rows of every rank, summed over the W
    ranks; averaged over ranks, as data-parallel training does, it is the gradient of one process on the whole batch.

    Every rank must call this equally often, and with tensors of one shape: ranks wait for each other.

    Parameters
    ----------
    rows : (B, …) tensor

    Returns
    -------
    (W · B, …) tensor
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return rows
    gather: Callable[[Tensor], Tensor] = _Gather.apply
    return gather(rows.contiguous())
