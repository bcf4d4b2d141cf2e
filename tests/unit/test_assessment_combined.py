"""The combined score, its parts and its interval, against direct computations."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

from pipeline.assessment.class_level import class_level_score
from pipeline.assessment.combined import transfer_score
from pipeline.assessment.estimate import bootstrap_mean
from pipeline.assessment.linear import linear_gain
from pipeline.assessment.probe import LITERATURE, Said, score_labelled
from pipeline.assessment.rungs import rung_of
from pipeline.assessment.scores import leep
from pipeline.assessment.unlabelled import agreement, certainty, information
from pipeline.transport.centres import held_out


def task(count=48, width=8, *, classes=4, signal=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % classes
    centres = torch.randn(classes, width, generator=g)
    features = signal * centres[y] + torch.randn(count, width, generator=g)
    logits = features @ torch.randn(width, 5, generator=g)
    return logits, features, y


def ridge_errors(x, y, classes, penalty):
    """Refit without each sample, by the normal equations."""
    errors = []
    for b in range(len(x)):
        rest = torch.arange(len(x)) != b
        X, Y = x[rest], one_hot(y[rest], classes).double()
        gram = (X - X.mean(0)).T @ (X - X.mean(0)) + penalty * torch.eye(x.shape[1], dtype=torch.float64)
        W = torch.linalg.solve(gram, (X - X.mean(0)).T @ (Y - Y.mean(0)))
        answer = (x[b] - X.mean(0)) @ W + Y.mean(0)
        errors.append((one_hot(y[b], classes) - answer).square().sum())
    return torch.stack(errors)


@pytest.mark.parametrize(("count", "width"), [(30, 50), (60, 8)], ids=["wide", "tall"])
def test_linear_gain_equals_refitting_without_each_sample(count, width):
    _, features, y = task(count, width, classes=3)
    x = features.double()
    squares = torch.linalg.svdvals(x - x.mean(0)).square()
    squares = squares[squares > squares.max() * 1e-12]
    fits = [ridge_errors(x, y, 3, 10 ** (k / 2) * squares.mean()) for k in range(-8, 5)]
    best = min(fits, key=lambda errors: float(errors.mean()))
    target = one_hot(y, 3).double()
    without = torch.stack([(target[b] - target[torch.arange(count) != b].mean(0)).square().sum() for b in range(count)])
    torch.testing.assert_close(linear_gain(features, y, 3), 1 - best / without.mean(), atol=1e-5, rtol=1e-4)


def test_linear_gain_is_one_for_a_linear_map_and_none_for_noise_or_constants():
    _, _, y = task()
    assert float(linear_gain(one_hot(y).float() @ torch.randn(4, 9), y, 4).mean()) > 0.99
    noise = torch.randn(48, 20, generator=torch.Generator().manual_seed(5))
    assert float(linear_gain(noise, y, 4).mean()) < 0.1
    assert linear_gain(torch.ones(48, 3), y, 4).tolist() == [0.0] * 48


def test_the_score_is_the_sum_of_its_three_accounts():
    logits, features, y = task()
    view = held_out(features, y, 4)
    told = view.p[torch.arange(48), y].double().log()
    expected = told.mean() + 0.5 * leep(logits.softmax(1), y) + 2 * linear_gain(features, y, 4).mean()
    assert float(transfer_score(logits, features, y, 4).mean()) == pytest.approx(float(expected), abs=1e-5)


def test_the_score_rises_with_what_the_features_tell_and_ignores_order_and_scale():
    values = [float(transfer_score(*task(signal=signal), 4).mean()) for signal in (0.0, 0.5, 1.0, 2.0)]
    assert values == sorted(values)
    logits, features, y = task()
    _, again, _ = task()
    assert float(transfer_score(logits, 1e3 * again, y, 4).mean()) == pytest.approx(values[2], abs=1e-3)
    shifted = float(transfer_score(logits, features, (y + 1) % 4, 4).mean())  # classes in another order: other folds
    assert shifted == pytest.approx(values[2], abs=0.1)


def test_a_single_sample_of_a_class_counts_at_its_frequency():
    logits, features, y = task(9, 4, classes=4)
    assert torch.bincount(y).tolist() == [3, 2, 2, 2]
    y = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 3])
    found = transfer_score(logits, features, y, 4)
    assert bool(torch.isfinite(found).all())
    assert float(found[8]) <= math.log(1 / 9) + 2 * float(linear_gain(features, y, 4)[8])  # the other account is <= 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(5, 3)}, r"logits must have shape \(48, C_t\), got shape \(5, 3\)"),
        ({"logits": torch.full((48, 3), torch.inf)}, "logits must be finite"),
        ({"y": torch.zeros(48, dtype=torch.long)}, "y must hold at least 2 classes"),
        ({"num_classes": 1}, "num_classes must be >= 2"),
        ({"num_classes": 5}, r"classes \[4\] have none"),
        ({"features": torch.full((48, 3), torch.nan)}, "features must be finite"),
    ],
)
def test_bad_input_of_the_score_is_named(change, message):
    logits, features, y = task()
    with pytest.raises(ValueError, match=message):
        transfer_score(**({"logits": logits, "features": features, "y": y, "num_classes": 4} | change))


def test_all_scores_of_a_teacher_together():
    logits, features, y = task(80)
    said = Said(logits, features, y, torch.arange(80) < 40, torch.randn(5, 8), parameters=1000, accuracy=0.9)
    estimate, found = score_labelled(said, 4)
    assert set(found) == {"transport_cost", "transport_gain", *LITERATURE}
    assert estimate.low < estimate.value < estimate.high
    assert estimate.value == pytest.approx(float(transfer_score(logits, features, y, 4).mean()))
    assert found["num_parameters"] == pytest.approx(3.0) and found["source_accuracy"] == 0.9
    bare = Said(logits, features, y, torch.arange(80) < 40)
    assert set(score_labelled(bare, 4, scores=("knn", "otce", "source_accuracy"))[1]) == {"knn"}


# --- the interval, the rungs ------------------------------------------------------------------------------------------


def test_the_interval_is_that_of_the_mean_of_resamples():
    x = torch.randn(60, generator=torch.Generator().manual_seed(0))
    found = bootstrap_mean(x, resamples=4000)
    rng = np.random.default_rng(1)
    means = rng.choice(x.numpy(), (20_000, 60)).mean(1)
    assert found.value == pytest.approx(float(x.mean()))
    assert (found.low, found.high) == pytest.approx(np.quantile(means, [0.05, 0.95]).tolist(), abs=0.02)
    assert bootstrap_mean(x, resamples=4000) == found
    constant = bootstrap_mean(torch.full((5,), 2.0))
    assert (constant.low, constant.high) == (2.0, 2.0)


@pytest.mark.parametrize(
    ("samples", "keywords", "message"),
    [
        (torch.zeros(0), {}, "samples must have shape"),
        (torch.tensor([1.0, torch.nan]), {}, "samples must be finite, got nan"),
        (torch.zeros(3), {"level": 1.0}, "level must be in"),
        (torch.zeros(3), {"resamples": 0}, "resamples must be >= 1"),
    ],
)
def test_bad_input_of_the_interval_is_named(samples, keywords, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_mean(samples, **keywords)


def test_rungs_are_nested_and_hold_every_group():
    groups = torch.tensor([0] * 10 + [1] * 3 + [2])
    found = rung_of(groups, (0.25, 0.5, 1.0))
    counts = [[int((found[groups == g] <= r).sum()) for g in range(3)] for r in range(3)]
    assert counts == [[3, 1, 1], [5, 2, 1], [10, 3, 1]]
    assert rung_of(groups, (1.0,)).tolist() == [0] * 14
    with pytest.raises(ValueError, match="must rise from above 0 to 1"):
        rung_of(groups, (0.5, 0.4, 1.0))


# --- without labels, without forward passes ---------------------------------------------------------------------------


def test_information_is_high_for_the_sure_and_versatile_alone():
    sure = torch.eye(4).repeat(5, 1)
    one = torch.eye(4)[:1].repeat(20, 1)
    flat = torch.full((20, 4), 0.25)
    assert [round(information(r), 6) for r in (sure, one, flat)] == [1.0, 0.0, 0.0]
    assert [round(certainty(r), 6) for r in (sure, one, flat)] == [1.0, 1.0, 0.0]
    mixed = torch.softmax(torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), 1).double()
    entropy = lambda p: float(-(p * p.log()).sum(-1).mean() / math.log(4))  # noqa: E731
    assert information(mixed) == pytest.approx(entropy(mixed.mean(0)) - entropy(mixed), abs=1e-6)


def test_agreement_is_corrected_for_chance():
    truth = torch.eye(3)[torch.arange(30) % 3]
    wrong = truth.roll(1, 1)
    lazy = torch.tensor([1.0, 0, 0]).expand(30, 3)
    found = agreement(torch.stack([truth, truth, wrong, lazy]))
    assert found[0] == found[1] and float(found[0]) > 0
    assert float(found[2]) < 0
    assert float(found[3]) == pytest.approx(0, abs=1e-9)
    assert agreement(torch.stack([truth, truth])).tolist() == pytest.approx([1.0, 1.0])
    assert agreement(truth[None]).tolist() == [0.0]


@pytest.mark.parametrize("score", [information, certainty])
def test_scores_without_labels_refuse_what_is_no_distribution(score):
    with pytest.raises(ValueError, match="must sum to 1"):
        score(torch.ones(3, 2))
    with pytest.raises(ValueError, match="at least 2 classes"):
        score(torch.ones(3, 1))
    with pytest.raises(ValueError, match="rows"):
        score(torch.ones(0, 2))


def test_class_level_score_is_the_transport_with_a_free_teacher_side():
    g = torch.Generator().manual_seed(0)
    M, r = torch.rand(6, 3, generator=g) / 2, torch.tensor([0.5, 0.3, 0.2])
    from scipy.optimize import linprog

    # min <P, M> over P >= 0 with column sums r.
    rows = np.kron(np.ones(6), np.eye(3))
    plan = linprog(M.double().numpy().ravel(), A_eq=rows, b_eq=r.double().numpy())
    assert class_level_score(M, r) == pytest.approx(1 - 2 * plan.fun, abs=1e-6)
    assert class_level_score(torch.zeros(2, 3)) == 1.0
    with pytest.raises(ValueError, match="must sum to 1"):
        class_level_score(M, torch.ones(3))
