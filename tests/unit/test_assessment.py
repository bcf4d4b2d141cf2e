"""Scores against direct computations, and the choice of the set."""

import math

import pytest
import torch

from pipeline.assessment.scores import knn, leep
from pipeline.assessment.selection import select_set


def softmax(seed, rows, classes, scale=2.0):
    return torch.softmax(scale * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed)), 1)


def test_knn_equals_a_loop():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(24) % 3
    features = torch.randn(24, 5, generator=g) + 2 * torch.eye(5)[y]
    hits = 0
    for b in range(24):
        cosine = [
            (float(torch.nn.functional.cosine_similarity(features[b], features[o], dim=0)), int(y[o]))
            for o in range(24)
            if o != b
        ]
        votes = [0.0, 0.0, 0.0]
        for similarity, label in sorted(cosine, reverse=True)[:5]:
            votes[label] += 1 + similarity
        hits += votes.index(max(votes)) == int(y[b])
    assert knn(features, y, k=5) == pytest.approx(hits / 24)
    assert 0.5 < hits / 24 < 1  # a case in which a mistake would show


def test_knn_with_queries_classifies_them_by_all_of_the_base():
    base, y = torch.eye(3), torch.tensor([0, 1, 2])
    assert knn(base, y, k=1, queries=base * 7, query_y=y) == 1
    assert knn(base, y, k=1, queries=base, query_y=(y + 1) % 3) == 0
    assert knn(base, y, k=1) in (0.0, 1 / 3)  # leave one out never finds the sample itself


def test_knn_ignores_the_length_of_features_and_caps_k():
    g = torch.Generator().manual_seed(1)
    y = torch.arange(12) % 2
    features = torch.randn(12, 4, generator=g) + 3 * torch.eye(4)[y]
    stretched = features * torch.rand(12, 1, generator=g).add(0.1)
    assert knn(features, y, k=3) == knn(stretched, y, k=3) > 0.5
    assert knn(features, y, k=1000) == knn(features, y, k=11)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k must be >= 1, got 0"),
        ({"features": torch.zeros(4)}, r"features must have shape \(N, D\)"),
        ({"features": torch.full((4, 2), float("inf"))}, "features must be finite"),
        ({"features": torch.zeros(1, 2), "y": torch.tensor([0])}, "at least 2 rows"),
        ({"y": torch.tensor([0, 1, -1, 0])}, "y must lie in"),
        ({"queries": torch.zeros(2, 2)}, "given together"),
        ({"queries": torch.zeros(2, 3), "query_y": torch.tensor([0, 1])}, r"queries must have shape \(Q, 2\)"),
    ],
)
def test_knn_names_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        knn(**({"features": torch.eye(4)[:, :2], "y": torch.tensor([0, 1, 0, 1])} | change))


def test_leep_equals_its_definition():
    p, y = softmax(0, 10, 4), torch.arange(10) % 3
    joint = [[sum(float(p[b, i]) for b in range(10) if y[b] == j) / 10 for j in range(3)] for i in range(4)]
    expected = 0.0
    for b in range(10):
        expected += math.log(sum(joint[i][int(y[b])] / sum(joint[i]) * float(p[b, i]) for i in range(4))) / 10
    assert leep(p, y) == pytest.approx(expected, abs=1e-6)


def test_leep_orders_teachers_and_its_ends_are_known():
    y = torch.arange(30) % 3
    perfect, blind = torch.eye(3)[y], torch.full((30, 3), 1 / 3)
    assert leep(perfect, y) == pytest.approx(0, abs=1e-9)
    assert leep(blind, y) == pytest.approx(math.log(1 / 3))
    assert leep(perfect, y) > leep(0.5 * perfect + 0.5 * blind, y) > leep(blind, y)
    assert leep(perfect[:, [2, 0, 1]], y) == pytest.approx(leep(perfect, y))
    # On other samples the table is smoothed, so that a class never met costs much and not everything.
    far = leep(perfect, y, probe_p=perfect, probe_y=(y + 1) % 3)
    assert math.isfinite(far) and far < leep(blind, y)
    assert leep(perfect, y, probe_p=perfect, probe_y=y) == pytest.approx(math.log((10 + 1 / 3) / 11))


def specialists(per_class=10, classes=6):
    """Three teachers that each know two of six classes and are unsure of the others, and useless ones."""
    y = torch.arange(classes).repeat(per_class)
    flat = torch.full((len(y), classes), 1 / classes)
    sharp = 0.9 * torch.eye(classes)[y] + 0.1 * flat
    known = {f"knows {2 * k}-{2 * k + 1}": (y // 2 == k)[:, None] for k in range(3)}
    carried = {name: torch.where(rows, sharp, flat) for name, rows in known.items()}
    return carried, y, flat


def test_a_complementary_set_is_chosen_and_covers_every_class():
    carried, y, flat = specialists()
    carried["same again"] = carried["knows 0-1"].clone()
    carried["flat"] = flat
    found = select_set(carried, y)
    assert len(found.chosen) == 3 and set(found.chosen) & {"knows 0-1", "same again"}
    assert {"knows 2-3", "knows 4-5"} <= set(found.chosen)
    expected = 0.9 + 0.1 / 6
    assert found.score == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(found.coverage, torch.full((6,), expected, dtype=torch.float64))
    assert [round(pick.gain, 3) for pick in found.picks] == [0.25] * 3
    assert sum(pick.gain for pick in found.picks) == pytest.approx(found.score - 1 / 6, abs=1e-6)
    assert found.verdicts["flat"].reason == "no relation"
    left = ({"knows 0-1", "same again"} - set(found.chosen)).pop()
    assert found.verdicts[left].reason == "no marginal gain" and found.verdicts[left].gain == pytest.approx(0, abs=1e-9)
    assert sum(found.shares.values()) == pytest.approx(1)


def test_budgets_hold_and_are_named():
    carried, y, _ = specialists()
    two = select_set(carried, y, max_teachers=2)
    assert len(two.chosen) == 2
    assert [verdict.reason for verdict in two.verdicts.values()].count("over budget") == 1
    sizes = {"knows 0-1": 10, "knows 2-3": 20, "knows 4-5": 70}
    small = select_set(carried, y, parameters=sizes, max_params=40)
    assert set(small.chosen) == {"knows 0-1", "knows 2-3"} and small.chosen[0] == "knows 0-1"
    assert small.verdicts["knows 4-5"].reason == "over budget"
    with pytest.raises(ValueError, match="parameters must be given"):
        select_set(carried, y, max_params=40)


def test_none_is_chosen_when_none_helps():
    _, y, flat = specialists()
    noise = {f"noise {k}": softmax(k, len(y), 6, scale=1.0) for k in range(5)}
    found = select_set(noise, y, reference=0.5 * torch.eye(6)[y] + 0.5 * flat)
    assert found.chosen == () and found.shares == {}
    assert found.score == found.reference_score
    assert {verdict.reason for verdict in found.verdicts.values()} <= {
        "no relation",
        "no marginal gain",
        "set no better than no teacher",
    }
    assert found.best_single is not None
    assert select_set({"flat": flat}, y).chosen == ()


def test_a_set_worse_than_no_teacher_is_turned_down_whole():
    carried, y, flat = specialists()
    strong = 0.99 * torch.eye(6)[y] + 0.01 * flat
    found = select_set(carried, y, reference=strong)
    assert found.chosen == () and len(found.picks) == 3 and found.confidence == 0
    assert {verdict.reason for verdict in found.verdicts.values()} == {"set no better than no teacher"}


def test_noise_rarely_passes_the_bootstrap():
    y = torch.arange(6).repeat(8)
    passed = sum(bool(select_set({"noise": softmax(seed, len(y), 6, scale=1.0)}, y).chosen) for seed in range(60))
    assert passed <= 15  # one in ten is expected


def test_the_choice_does_not_depend_on_the_order_of_the_repository():
    carried, y, _ = specialists()
    names = list(carried)
    assert select_set(carried, y).chosen == select_set({name: carried[name] for name in names[::-1]}, y).chosen


def test_an_unrelated_gain_excludes_a_teacher():
    carried, y, _ = specialists()
    found = select_set(carried, y, gains={"knows 0-1": -0.1, "knows 2-3": 0.5, "knows 4-5": 0.5})
    assert set(found.chosen) == {"knows 2-3", "knows 4-5"} and found.verdicts["knows 0-1"].reason == "no relation"


def test_an_empty_repository_chooses_none():
    found = select_set({}, torch.arange(3))
    assert found.chosen == () and found.best_single is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([0])}, r"labels must have shape \(2,\)"),
        ({"labels": torch.tensor([], dtype=torch.int64)}, "V >= 1"),
        ({"carried": {"one": torch.ones(2, 3)}}, "rows of carried\\['one'\\] must sum to 1"),
        ({"confidence": 1.0}, "confidence must be in"),
        ({"min_gain": -0.1}, "min_gain must be >= 0"),
        ({"max_teachers": 0}, "max_teachers must be >= 1"),
        ({"gains": {}}, "'one' is missing"),
        ({"reference": torch.full((3, 3), 1 / 3)}, "reference must have 2 rows"),
        ({"reference": torch.full((2, 4), 0.25)}, "reference must have 3 classes"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"carried": {"one": softmax(0, 2, 3)}, "labels": torch.tensor([0, 1])} | change
    with pytest.raises(ValueError, match=message):
        select_set(**arguments)
