"""Successive halving: who climbs does not depend on who comes first, and nobody runs a rung in vain."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.assessment.halving import Standing, survivors


@pytest.mark.parametrize(
    ("candidates", "rungs", "eta", "least", "expected"),
    [
        (200, 2, 8, 4, (25,)),
        (200, 3, 4, 1, (50, 13)),
        (10, 2, 4, 16, (10,)),
        (100, 2, 8, 16, (16,)),
        (7, 1, 4, 1, ()),
        (0, 2, 4, 16, (0,)),
    ],
)
def test_survivors(candidates, rungs, eta, least, expected):
    assert survivors(candidates, rungs=rungs, eta=eta, least=least) == expected


@pytest.mark.parametrize("change", [{"candidates": -1}, {"rungs": 0}, {"eta": 0.5}, {"least": 0}])
def test_survivors_refuse_what_is_out_of_range(change):
    values = {"candidates": 10, "rungs": 2, "eta": 2, "least": 1} | change
    with pytest.raises(ValueError, match=next(iter(change))):
        survivors(values.pop("candidates"), **values)


class World:
    """Candidates with a score a rung, run `slots` at a time in an order drawn by the test."""

    def __init__(self, scores, climbing, failing=()):
        self.scores, self.climbing, self.failing = scores, climbing, set(failing)
        self.standing = Standing(len(scores), climbing)
        self.ready = [(name, 0) for name in scores]
        self.runs, self.dropped, self.finished = [], {}, []

    def run(self, draw):
        while self.ready:
            name, rung = self.ready.pop(draw(len(self.ready)))
            self.runs.append((name, rung))
            if (name, rung) in self.failing:
                self.standing.leave(name)
            elif rung == len(self.climbing):
                self.finished.append(name)
                self.standing.leave(name)
            else:
                self.standing.enter(name, rung, self.scores[name][rung])
            for decision in self.standing.settle():
                at = max(r for n, r in self.runs if n == decision.name)
                if decision.climbs:
                    self.ready.append((decision.name, at + 1))
                else:
                    self.dropped[decision.name] = decision.reason


@st.composite
def worlds(draw):
    count, rungs = draw(st.integers(1, 12)), draw(st.integers(1, 3))
    values = st.one_of(st.none(), st.floats(-1, 1, width=16))
    scores = {f"t{i:02d}": [draw(values) for _ in range(rungs)] for i in range(count)}
    climbing, left = [], count
    for _ in range(rungs - 1):
        left = draw(st.integers(1, left))
        climbing.append(left)
    failing = draw(st.sets(st.tuples(st.sampled_from(sorted(scores)), st.integers(0, rungs - 1)), max_size=3))
    return scores, climbing, failing


def expected(scores, climbing, failing):
    """Rung by rung, all at once."""
    field = list(scores)
    ran = []
    for rung in range(len(climbing) + 1):
        ran += [(name, rung) for name in field]
        field = [name for name in field if (name, rung) not in failing]
        if rung == len(climbing):
            return set(ran), field
        value = {n: -math.inf if scores[n][rung] is None else scores[n][rung] for n in field}
        field = sorted(field, key=lambda name: (-value[name], name))[: climbing[rung]]
    raise AssertionError


@given(worlds(), st.randoms(use_true_random=False))
def test_any_order_gives_the_outcome_of_halving_in_lockstep(world, random):
    scores, climbing, failing = world
    ours = World(scores, climbing, failing)
    ours.run(lambda n: random.randrange(n))
    ran, finished = expected(scores, climbing, failing)
    assert set(ours.runs) == ran and len(ours.runs) == len(ran)
    assert sorted(ours.finished) == sorted(finished)
    failed = {name for name, rung in failing if (name, rung) in ran}
    assert set(ours.dropped) == set(scores) - set(finished) - failed


def test_a_reason_says_score_rung_and_cut():
    world = World({"a": [0.5, 0], "b": [0.25, 0], "c": [None, 0]}, [1])
    world.run(lambda n: 0)
    assert world.dropped == {
        "b": "score 0.250 on rung 1 of 2, not among the best 1 of 3",
        "c": "no score on rung 1 of 2, not among the best 1 of 3",
    }


def test_a_candidate_that_is_lost_while_it_waits_holds_no_place():
    standing = Standing(3, [1])
    standing.enter("a", 0, 1.0)
    assert standing.settle() == []
    standing.leave("a")
    standing.enter("b", 0, 0.5)
    standing.enter("c", 0, 0.4)
    assert [(d.name, d.climbs) for d in standing.settle()] == [("b", True), ("c", False)]


def test_a_decision_falls_as_soon_as_it_is_certain():
    standing = Standing(4, [2])
    standing.enter("a", 0, 1.0)
    assert standing.settle() == []  # three others may still be better
    standing.enter("b", 0, 0.9)
    standing.enter("c", 0, 0.8)
    assert [(d.name, d.climbs) for d in standing.settle()] == [("a", True), ("c", False)]
    standing.leave("d")
    assert [(d.name, d.climbs) for d in standing.settle()] == [("b", True)]
