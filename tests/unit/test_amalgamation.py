"""Ambiguity and who teaches which sample."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.amalgamation.ambiguity import ambiguity, ambiguity_of_logits, assign


def distributions(seed, teachers, samples, classes):
    g = torch.Generator().manual_seed(seed)
    return torch.softmax(3 * torch.randn(teachers, samples, classes, generator=g), 2)


def test_ambiguity_equals_its_definition_and_its_ends():
    p = torch.tensor([[0.7, 0.2, 0.1], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    expected = -(0.7 * math.log(0.7) + 0.2 * math.log(0.2) + 0.1 * math.log(0.1)) / math.log(3)
    torch.testing.assert_close(ambiguity(p), torch.tensor([expected, 0.0, 1.0]))
    assert ambiguity(torch.ones(2, 1)).tolist() == [0, 0]


def test_ambiguity_of_logits_is_stable_for_extreme_logits():
    z = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [1e4, 1e4, -1e4]])
    expected = torch.tensor([0.0, 1.0, math.log(2) / math.log(3)])
    torch.testing.assert_close(ambiguity_of_logits(z), expected)
    torch.testing.assert_close(ambiguity_of_logits(z.half()), expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(-50, 50), st.floats(0.2, 5))
def test_ambiguity_of_logits_ignores_a_shift_and_equals_that_of_the_softmax(seed, shift, temperature):
    z = 3 * torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
    plain = ambiguity_of_logits(z, temperature=temperature)
    torch.testing.assert_close(ambiguity_of_logits(z + shift, temperature=temperature), plain, atol=1e-4, rtol=0)
    torch.testing.assert_close(ambiguity((z / temperature).softmax(1)), plain, atol=1e-5, rtol=0)


def test_bad_ambiguity_is_named():
    with pytest.raises(ValueError, match="temperature must be a finite number > 0, got -1"):
        ambiguity_of_logits(torch.zeros(2, 3), temperature=-1)
    with pytest.raises(ValueError, match="logits must be finite, got nan"):
        ambiguity_of_logits(torch.full((2, 3), float("nan")))
    with pytest.raises(ValueError, match=r"logits must have shape \(B, C\)"):
        ambiguity_of_logits(torch.zeros(3))


def test_the_least_ambiguous_teacher_teaches():
    carried = distributions(0, 4, 50, 6)
    found = assign(carried)
    entropies = -(carried * carried.log()).sum(2)
    assert torch.equal(found.teacher, entropies.argmin(0))
    for b in range(50):
        assert torch.equal(found.target[b], carried[found.teacher[b], b])
        assert float(found.confidence[b]) == pytest.approx(1 - float(entropies[:, b].min()) / math.log(6), abs=1e-5)
    assert found.ambiguity.shape == (4, 50)


def test_ties_go_to_the_first_teacher():
    one = distributions(0, 1, 20, 5)
    assert assign(one.expand(3, -1, -1)).teacher.unique().tolist() == [0]


def test_the_batch_does_not_matter():
    carried = distributions(1, 3, 31, 7)
    together = assign(carried)
    for size in (1, 4, 30):
        parts = [assign(part) for part in carried.split(size, dim=1)]
        assert torch.equal(torch.cat([part.teacher for part in parts]), together.teacher)
        torch.testing.assert_close(torch.cat([part.confidence for part in parts]), together.confidence)


def test_reordering_the_set_reorders_the_answer():
    carried = distributions(2, 3, 40, 5)
    order = torch.tensor([2, 0, 1])
    assert torch.equal(order[assign(carried[order]).teacher], assign(carried).teacher)


def test_gains_keep_a_confident_stranger_from_teaching():
    stranger, expert = torch.tensor([[0.99, 0.01]]), torch.tensor([[0.05, 0.95]])
    carried = torch.stack([stranger, expert])
    assert assign(carried).teacher.tolist() == [0]
    assert assign(carried, gains=[0.1, 0.9]).teacher.tolist() == [1]
    assert torch.equal(assign(carried, gains=[0.5, 0.5]).teacher, assign(carried).teacher)


@pytest.mark.parametrize(
    ("carried", "gains", "message"),
    [
        (torch.zeros(0, 2, 3), None, "T >= 1"),
        (torch.full((2, 3), 1 / 3), None, r"shape \(T, B, C_s\)"),
        (torch.ones(2, 2, 3), None, "must sum to 1"),
        (torch.full((2, 2, 2), 0.5), [1.0], r"gains must have shape \(2,\)"),
        (torch.full((2, 2, 2), 0.5), [1.0, -1.0], "gains must not be negative, got -1"),
    ],
)
def test_bad_input_is_named(carried, gains, message):
    with pytest.raises(ValueError, match=message):
        assign(carried, gains=gains)
