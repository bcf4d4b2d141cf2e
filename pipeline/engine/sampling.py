"""Which samples form which batch: the same global batches in the same order on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch


def epoch_order(n: int, *, seed: int, epoch: int) -> torch.Tensor:
    """Return the permutation of `n` samples for one epoch: a pure function of its arguments.

    Returns
    -------
    order : (n,) int64 tensor
    """
    generator = torch.Generator().manual_seed(_mix(seed, epoch))
    return torch.randperm(n, generator=generator)


class Picked(NamedTuple):
    """One rank's share of a global batch.

    Attributes
    ----------
    rows : (n,) int64 tensor
        Sample numbers.
    passes : (n,) int64 tensor
        How often each of them was picked before.
    """

    rows: torch.Tensor
    passes: torch.Tensor


class BatchSampler:
    """Batches of row numbers for one rank.

    The order of all samples is one endless stream of epoch permutations. Global batch k is the stream's k-th piece of
    `batch_size` rows; a rank takes every `world_size`-th row of it, so that the union over ranks does not depend on how
    many there are.

    Parameters
    ----------
    n : int
        Number of samples.
    batch_size : int
        Rows of a global batch, at least `world_size`. Shares differ by one row at most.
    seed : int
    rank, world_size : int

    Raises
    ------
    ValueError
        If there is no sample, or fewer rows than ranks.
    """

    def __init__(self, n: int, batch_size: int, *, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if n < 1:
            raise ValueError(f"n must be >= 1, got {n}")
        if batch_size < world_size:
            raise ValueError(f"batch_size must be at least world_size={world_size}, got {batch_size}")
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.rank, self.world_size = rank, world_size

    def batches(self, first: int, count: int) -> Iterator[Picked]:
        """Yield this rank's share of global batches `first` … `first + count - 1`."""
        cached: dict[int, torch.Tensor] = {}
        for number in range(first, first + count):
            start, stop = number * self.batch_size, (number + 1) * self.batch_size
            pieces, passes = [], []
            while start < stop:
                epoch, offset = divmod(start, self.n)
                if epoch not in cached:
                    cached = {k: v for k, v in cached.items() if k >= epoch - 1}
                    cached[epoch] = epoch_order(self.n, seed=self.seed, epoch=epoch)
                piece = cached[epoch][offset : offset + stop - start]
                pieces.append(piece)
                passes.append(torch.full_like(piece, epoch))
                start += len(piece)
            own = slice(self.rank, None, self.world_size)
            yield Picked(torch.cat(pieces)[own], torch.cat(passes)[own])


def _mix(*numbers: int) -> int:
    """Hash integers to one seed (splitmix64), so that neighbouring seeds give unrelated streams."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1  # torch seeds are signed


def seed_of(*numbers: int) -> int:
    """Return one well-mixed seed from several integers."""
    return _mix(*numbers)
