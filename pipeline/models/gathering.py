"""Outputs that come batch by batch, put together without holes in the memory between them."""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST, _LARGEST = 32, 64 << 20  # batches that the first piece has room for; bytes of any piece that takes several


class Rows:
    """Rows of N samples, given a batch at a time and kept on the CPU in a few large pieces.

    Small tensors that stay, made between large ones that go, leave holes that the next large ones do not fit into: a
    process that kept the outputs of 128 batches of 6 MB, one tensor each, grew by 400 MB. Each piece has room for as
    many rows as all before it, up to 64 MiB.
    """

    def __init__(self) -> None:
        self._pieces: list[Tensor] = []
        self._used = self._total = 0

    def add(self, rows: Tensor) -> None:
        """Take over the next rows, an (n, …) tensor; all have the same shape but for n, and the same type."""
        first = 0
        while first < len(rows):
            if not self._pieces or self._used == len(self._pieces[-1]):
                wanted = max(_LEAST * len(rows), self._total)
                room = max(len(rows), min(wanted, _LARGEST // max(1, rows[0].numel() * rows.element_size())))
                self._pieces.append(torch.empty((room, *rows.shape[1:]), dtype=rows.dtype))
                self._used = 0
            piece = self._pieces[-1]
            taken = min(len(rows) - first, len(piece) - self._used)
            piece[self._used : self._used + taken].copy_(rows[first : first + taken])
            self._used, self._total, first = self._used + taken, self._total + taken, first + taken

    def all(self) -> Tensor:
        """Return all N rows, a tensor of its own.

        Raises
        ------
        ValueError
            When there is none.
        """
        if not self._pieces:
            raise ValueError("batches must not be empty")
        return torch.cat([*self._pieces[:-1], self._pieces[-1][: self._used]])
