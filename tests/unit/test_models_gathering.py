"""Outputs that come batch by batch: all of them, in order, in few pieces."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.models.gathering import Rows


@given(st.lists(st.integers(0, 9), min_size=1, max_size=200))
def test_all_rows_come_back_in_order(sizes: list[int]) -> None:
    given_rows = torch.arange(3 * sum(sizes)).reshape(-1, 3)
    rows = Rows()
    for batch in given_rows.split(sizes):
        rows.add(batch)
    if not sum(sizes):
        return
    found = rows.all()
    assert torch.equal(found, given_rows) and found.dtype == given_rows.dtype
    assert len(rows._pieces) <= 10  # not one for each batch
    rows.add(given_rows[:1])
    assert torch.equal(rows.all(), torch.cat([given_rows, given_rows[:1]]))


def test_nothing_is_no_tensor() -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        Rows().all()
