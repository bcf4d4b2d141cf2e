"""The transferability scores of features and of labels, against computations that are written differently."""

import math
from collections import Counter

import numpy as np
import ot
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import multivariate_normal
from sklearn.covariance import ledoit_wolf

from pipeline.assessment.feature_scores import gbc, h_score, labelled, logme
from pipeline.assessment.label_scores import nce, num_parameters, otce, source_accuracy


def task(seed=0, size=60, dims=8, classes=3, signal=1.0):
    """Features around a centre of their class, and classes of unequal size."""
    g = torch.Generator().manual_seed(seed)
    y = (torch.arange(size) % (classes + 1)).clamp_max(classes - 1)
    mixing = torch.eye(dims) + 0.3 * torch.randn(dims, dims, generator=g)
    centres = signal * torch.randn(classes, dims, generator=g)
    return torch.randn(size, dims, generator=g) @ mixing + centres[y] + 0.5, y


def source(seed=5, size=24, dims=8, classes=4):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(size, dims, generator=g) - 2, torch.arange(size) % classes


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4))


def constant(*shape):
    """Rows that are one, and whose mean is not: 60 of them leave 7e-12 when it is taken away."""
    return torch.full(shape, 1e5 / 3, dtype=torch.float64)


def probabilities(seed, rows, classes):
    return torch.softmax(2 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed)), 1)


def entropy(y):
    counts = Counter(y.tolist())
    return -sum(n / len(y) * math.log(n / len(y)) for n in counts.values())


def of_features(score):
    """Return the score as a function of features and labels alone."""
    return (lambda f, y: otce(*source(dims=f.shape[1]), f, y)) if score is otce else score


def largest_log_evidence(features, y):
    """Return the mean over classes of max log N(y_c; 0, F Fᵀ / α + I / β) / N, by a search over log α and log β."""
    f, size = features.double().numpy(), len(y)
    values = []
    for c in sorted(set(y.tolist())):
        target = (y == c).double().numpy()

        def loss(logs, target=target):
            covariance = f @ f.T * math.exp(-logs[0]) + np.eye(size) * math.exp(-logs[1])
            return -multivariate_normal.logpdf(target, cov=covariance) / size

        starts = [(a, b) for a in (-2.0, 3.0, 8.0) for b in (1.0, 4.0)]
        found = [
            minimize(loss, start, method="Nelder-Mead", options={"xatol": 1e-4, "fatol": 1e-9}) for start in starts
        ]
        values.append(-min(result.fun for result in found))
    return sum(values) / len(values)


@pytest.mark.parametrize(
    ("size", "dims", "signal"),
    [(30, 4, 1.0), (30, 4, 0.2), (24, 24, 0.5), (24, 40, 0.3), (24, 40, 2.0)],
)
def test_logme_is_the_largest_evidence(size, dims, signal):
    features, y = task(1, size, dims, signal=signal)
    assert logme(features, y) == pytest.approx(largest_log_evidence(features, y), abs=1e-4)


def test_logme_does_not_depend_on_the_scale_of_the_features():
    for features, y in (task(2), task(2, size=20, dims=40)):
        assert logme(1e-4 * features, y) == pytest.approx(logme(features, y), abs=1e-6)
        assert logme(1e200 * features.double(), y) == pytest.approx(logme(features, y), abs=1e-6)


def test_logme_is_bounded_where_labels_are_met_exactly():
    y = torch.arange(30) % 3
    exact = logme(torch.eye(3)[y], y)
    # As if 1e-5 of the labels lay in the 27 of 30 directions that the features do not reach.
    bound = -0.5 * math.log(2 * math.pi * math.e * 1e-5 * 27 / 30 / 30)
    assert bound - 1 < exact < bound
    assert exact > logme(torch.eye(3)[y] + 0.01 * normal(30, 3), y) > 0


def test_logme_of_features_that_say_nothing_is_that_of_noise():
    y = torch.arange(30) % 3
    # The best β of each class is N / n_c: the labels are not centred.
    expected = -0.5 * math.log(2 * math.pi * math.e / 3)
    assert logme(torch.zeros(30, 4), y) == pytest.approx(expected, abs=1e-5)
    opposed = normal(15, 4)[:, None] * torch.tensor([1.0, -1.0])[:, None]
    assert logme(opposed.flatten(0, 1), y.sort().values) == pytest.approx(expected, abs=1e-5)


def h_score_by_inverse(features, y, shrinkage=0.0):
    f = features.double().numpy()
    means = np.stack([f[y.numpy() == c].mean(0) for c in y.tolist()])
    covariance = np.cov(f.T, bias=True)
    shrunk = (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / f.shape[1] * np.eye(f.shape[1])
    return (1 - shrinkage) * np.trace(np.linalg.pinv(shrunk, rcond=1e-10, hermitian=True) @ np.cov(means.T, bias=True))


@pytest.mark.parametrize("shrinkage", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("size", "dims"), [(60, 8), (20, 20), (15, 40)])
def test_h_score_equals_its_definition(size, dims, shrinkage):
    features, y = task(3, size, dims)
    expected = h_score_by_inverse(features, y, shrinkage)
    assert h_score(features, y, shrinkage) == pytest.approx(expected, abs=1e-6)


def test_h_score_of_dependent_features_is_that_of_the_independent_ones():
    features, y = task(4, dims=5)
    twice = torch.cat([features, features @ torch.ones(5, 2), torch.full((len(y), 1), 3.0)], 1)
    assert h_score(twice, y, 0.0) == pytest.approx(h_score(features, y, 0.0), abs=1e-6)
    assert h_score(twice, y, 0.0) == pytest.approx(h_score_by_inverse(twice, y), abs=1e-6)


@pytest.mark.parametrize(("size", "dims"), [(60, 8), (20, 40), (300, 3)])
def test_h_score_shrinks_as_ledoit_and_wolf(size, dims):
    features, y = task(5, size, dims)
    covariance, shrinkage = ledoit_wolf(features.double().numpy())
    assert 0 < shrinkage < 1
    assert h_score(features, y) == pytest.approx(h_score(features, y, float(shrinkage)), abs=1e-9)
    means = np.stack([features.double().numpy()[y.numpy() == c].mean(0) for c in y.tolist()])
    expected = (1 - shrinkage) * np.trace(np.linalg.solve(covariance, np.cov(means.T, bias=True)))
    assert h_score(features, y) == pytest.approx(expected, abs=1e-6)


def test_h_score_has_known_ends():
    y = torch.arange(30) % 3
    exact = torch.eye(3)[y]
    assert h_score(exact, y, 0.0) == pytest.approx(2, abs=1e-9)
    assert h_score(exact, y, 1.0) == 0
    assert h_score(constant(60, 4), y.repeat(2)) == h_score(constant(60, 4), y.repeat(2), 0.0) == 0
    # Without shrinkage as many features as samples explain any labels.
    assert h_score(normal(30, 30), y, 0.0) == pytest.approx(2, abs=1e-6)
    # A single feature is its own scale: nothing to shrink.
    single, labels = task(6, dims=1)
    assert h_score(single, labels) == pytest.approx(h_score(single, labels, 0.0), abs=1e-9)


def gbc_by_loops(features, y, dims, prior):
    f = features.double().numpy()
    f = f - f.mean(0)
    u, s, _ = np.linalg.svd(f, full_matrices=False)
    rank = int((s > 1e-5 * s[0]).sum())
    z = (u * s)[:, : min(dims, rank)]
    classes = sorted(set(y.tolist()))
    groups = {c: z[y.numpy() == c] for c in classes}
    total = -0.0
    within = [sum(((g - g.mean(0)) ** 2)[:, d].sum() for g in groups.values()) for d in range(z.shape[1])]
    pooled = [value / (len(z) - len(classes)) for value in within]

    def variance(c, d):
        g = groups[c][:, d]
        return (((g - g.mean()) ** 2).sum() + prior * pooled[d]) / (len(g) - 1 + prior)

    for i in classes:
        for j in classes:
            if i == j:
                continue
            distance = 0.0
            for d in range(z.shape[1]):
                v_i, v_j = variance(i, d), variance(j, d)
                mean = (v_i + v_j) / 2
                distance += (groups[i][:, d].mean() - groups[j][:, d].mean()) ** 2 / mean / 8
                distance += math.log(mean / math.sqrt(v_i * v_j)) / 2
            total -= math.exp(-distance)
    return total


@pytest.mark.parametrize(
    ("size", "dims", "kept", "prior"),
    [(60, 8, 64, 10.0), (60, 8, 3, 10.0), (60, 8, 64, 1e-9), (20, 40, 64, 10.0), (20, 40, 5, 2.0), (200, 90, 64, 10.0)],
)
def test_gbc_equals_its_definition(size, dims, kept, prior):
    features, y = task(7, size, dims, signal=0.4)
    expected = gbc_by_loops(features, y, kept, prior)
    assert gbc(features, y, dims=kept, prior=prior) == pytest.approx(expected, rel=1e-5)
    assert -6 < expected < -1e-6


def test_gbc_has_known_ends():
    y = torch.arange(30) % 3
    assert gbc(constant(30, 4), y) == pytest.approx(-6)
    assert gbc(constant(60, 4), torch.arange(60) % 2) == pytest.approx(-2)
    assert gbc(torch.eye(3)[y], y) == 0
    # One sample of each class has no variance of its own.
    assert -2 <= gbc(torch.eye(2), torch.tensor([0, 1])) <= 0
    assert math.isfinite(gbc(torch.cat([normal(20, 3), torch.zeros(1, 3)]), torch.tensor([0, 1] * 10 + [2])))


def test_nce_equals_a_loop():
    p, y = probabilities(0, 40, 5), torch.arange(40) % 3
    choices = [max(range(5), key=lambda z, row=row: float(row[z])) for row in p]
    pairs, alone = Counter(zip(choices, y.tolist(), strict=True)), Counter(choices)
    expected = sum(n / 40 * math.log(n / alone[z]) for (z, _), n in pairs.items())
    assert nce(p, y) == pytest.approx(expected, abs=1e-9)


def test_nce_has_known_ends():
    y = torch.arange(30) % 3
    assert nce(torch.eye(3)[y], y) == 0
    assert nce(torch.ones(30, 1), y) == pytest.approx(-math.log(3))
    assert nce(torch.full((30, 4), 0.25), y) == pytest.approx(-math.log(3))
    merged = torch.eye(2)[(y > 0).long()]
    assert nce(merged, y) == pytest.approx(-2 / 3 * math.log(2))


# What the default marginal error of 1e-3 may change in a conditional entropy of three classes, in nats: δ log 2 + h(δ).
BY_TOLERANCE = 1e-2


def otce_by_loops(source_features, source_y, features, y, reg):
    x, f = source_features.double().numpy(), features.double().numpy()
    squared = np.array([[((row - column) ** 2).sum() for column in f] for row in x])
    centred = squared - squared.mean(0) - squared.mean(1, keepdims=True) + squared.mean()
    epsilon = reg * math.sqrt((centred**2).mean())
    a, b = np.full(len(x), 1 / len(x)), np.full(len(f), 1 / len(f))
    plan = ot.sinkhorn(a, b, squared, epsilon, method="sinkhorn_log", numItermax=20_000, stopThr=1e-10)
    joint = Counter()
    for i, s in enumerate(source_y.tolist()):
        for j, t in enumerate(y.tolist()):
            joint[s, t] += plan[i, j]
    given = Counter()
    for (s, _), mass in joint.items():
        given[s] += mass
    return sum(mass * math.log(mass / given[s]) for (s, _), mass in joint.items() if mass > 0)


@pytest.mark.parametrize("reg", [0.1, 1.0])
def test_otce_equals_its_definition(reg):
    x, source_y = source()
    features, y = task(8, size=30)
    expected = otce_by_loops(x, source_y, features, y, reg)
    assert otce(x, source_y, features, y, reg, tol=1e-7, max_iter=20_000) == pytest.approx(expected, abs=1e-5)
    assert otce(x, source_y, features, y, reg) == pytest.approx(expected, abs=BY_TOLERANCE)
    assert -entropy(y) < expected < -0.1


def test_otce_does_not_depend_on_scale_or_offset():
    (x, source_y), (features, y) = source(), task(9)
    expected = otce(x, source_y, features, y)
    assert otce(3 * x + 7, source_y, 0.01 * features - 2, y) == pytest.approx(expected, abs=1e-4)


def test_otce_has_known_ends():
    features, y = task(10, signal=8.0)
    assert otce(features, y, features, y) == pytest.approx(0, abs=BY_TOLERANCE)
    # The centres of the classes, as the rows of a classifier's weight are, in place of source samples.
    balanced = torch.cat([features[y == c][:15] for c in range(3)])
    labels = torch.arange(3).repeat_interleave(15)
    weight = torch.stack([balanced[labels == c].mean(0) for c in range(3)])
    assert otce(weight, torch.arange(3), balanced, labels) == pytest.approx(0, abs=BY_TOLERANCE)
    nothing = pytest.approx(-entropy(y), abs=1e-6)
    assert otce(features, torch.zeros(len(y), dtype=torch.long), features, y) == nothing
    assert otce(constant(60, 8), torch.arange(60), features, y) == nothing
    assert otce(features, y, constant(60, 8), y) == nothing


def test_heuristics_are_what_they_say():
    assert source_accuracy(0.75) == 0.75
    assert num_parameters(1000) == pytest.approx(3) and num_parameters(1) == 0


@pytest.mark.parametrize(
    ("score", "value", "message"),
    [
        (source_accuracy, None, "teacher's catalogue entry must give it"),
        (source_accuracy, 75.0, r"must be in \[0, 1\], got 75"),
        (source_accuracy, -0.1, r"must be in \[0, 1\], got -0.1"),
        (source_accuracy, math.nan, r"must be in \[0, 1\], got nan"),
        (num_parameters, 0, "count must be >= 1, got 0"),
    ],
)
def test_heuristics_name_bad_input(score, value, message):
    with pytest.raises(ValueError, match=message):
        score(value)


@pytest.mark.parametrize("score", [logme, h_score, gbc, otce])
@pytest.mark.parametrize("dims", [8, 80])
def test_feature_scores_ignore_order_names_and_precision(score, dims):
    of = of_features(score)
    features, y = task(11, dims=dims)
    expected = pytest.approx(of(features, y), rel=1e-5, abs=1e-4 if score is otce else 1e-6)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    assert of(features[order], y[order]) == expected
    assert of(features, torch.tensor([7, 0, 3])[y]) == expected  # classes that are absent do not count
    assert of(features.double().requires_grad_(), y.to(torch.int32)) == expected


@pytest.mark.parametrize("score", [logme, h_score, gbc, otce])
def test_feature_scores_prefer_informative_labels(score):
    features, y = task(12, size=120, signal=1.5)
    permuted = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(1))]
    if score is otce:
        x, source_y = task(12, size=120, signal=1.5)
        assert otce(x, source_y, features, y) > otce(x, source_y, features, permuted) + 0.3
    else:
        assert score(features, y) > score(features, permuted) + 0.1


def test_nce_ignores_order_and_names_and_prefers_informative_labels():
    y = torch.arange(60) % 3
    p = 0.7 * torch.eye(3)[y] + 0.3 * probabilities(2, 60, 3)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    expected = pytest.approx(nce(p, y))
    assert nce(p[order], y[order]) == nce(p[:, [2, 0, 1]], y) == nce(p, torch.tensor([7, 0, 3])[y]) == expected
    assert nce(p, y) > nce(p, y[order]) + 0.3


def test_labelled_renumbers_the_classes_that_are_present():
    features, classes, counts = labelled(torch.zeros(4, 2), torch.tensor([5, 2, 5, 9]))
    assert features.dtype == torch.float64
    assert classes.tolist() == [1, 0, 1, 2] and counts.tolist() == [1, 2, 1]


GOOD = {"features": torch.eye(4)[:, :2], "y": torch.tensor([0, 1, 0, 1])}
GOOD_SOURCE = {"source_features": torch.eye(3)[:, :2], "source_y": torch.tensor([0, 1, 2])}
NONE = torch.zeros(0, dtype=torch.long)


@pytest.mark.parametrize("score", [logme, h_score, gbc, otce])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.zeros(4)}, r"features must have shape \(N, D\) with N, D >= 1, got shape \(4,\)"),
        ({"features": torch.zeros(0, 2), "y": NONE}, r"got shape \(0, 2\)"),
        ({"features": torch.zeros(4, 0)}, r"got shape \(4, 0\)"),
        ({"features": torch.full((4, 2), math.inf)}, r"features must be finite, got inf in shape \(4, 2\)"),
        ({"features": torch.full((4, 2), math.nan)}, r"features must be finite, got nan in shape \(4, 2\)"),
        ({"y": torch.tensor([0, 1, 0])}, r"y must have shape \(4,\), got shape \(3,\)"),
        ({"y": NONE}, r"y must have shape \(4,\), got shape \(0,\)"),
        ({"y": torch.tensor([[0], [1], [0], [1]])}, r"y must have shape \(4,\), got shape \(4, 1\)"),
        ({"y": torch.tensor([0.0, 1, 0, math.nan])}, "y must be class indices of an integer type, got torch.float32"),
        ({"y": torch.tensor([True, False, True, True])}, "y must be class indices of an integer type, got torch.bool"),
        ({"y": torch.tensor([0, 1, -1, 0])}, r"y must lie in \[0, 2\), got values in \[-1, 1\]"),
        ({"y": torch.tensor([3, 3, 3, 3])}, r"at least 2 classes, got class 3 alone in shape \(4,\)"),
    ],
)
def test_feature_scores_name_bad_input(score, change, message):
    with pytest.raises(ValueError, match=message):
        score(**((GOOD_SOURCE if score is otce else {}) | GOOD | change))


@pytest.mark.parametrize(
    ("score", "change", "message"),
    [
        (h_score, {"shrinkage": 1.5}, r"shrinkage must be in \[0, 1\], got 1.5"),
        (h_score, {"shrinkage": -0.1}, r"shrinkage must be in \[0, 1\], got -0.1"),
        (h_score, {"shrinkage": math.nan}, r"shrinkage must be in \[0, 1\], got nan"),
        (gbc, {"dims": 0}, "dims must be >= 1, got 0"),
        (gbc, {"prior": 0.0}, "prior must be a finite number > 0, got 0"),
        (gbc, {"prior": math.inf}, "prior must be a finite number > 0, got inf"),
        (otce, {"source_features": torch.zeros(3)}, r"source_features must have shape \(N, D\)"),
        (otce, {"source_features": torch.full((3, 2), math.inf)}, "source_features must be finite, got inf"),
        (otce, {"source_features": torch.zeros(3, 5)}, r"as many columns, got shapes \(3, 5\) and \(4, 2\)"),
        (otce, {"source_y": torch.tensor([0, 1])}, r"source_y must have shape \(3,\), got shape \(2,\)"),
        (otce, {"source_y": torch.tensor([0, -1, 1])}, "source_y must lie in"),
        (otce, {"reg": 0.0}, "reg must be a finite number > 0, got 0"),
        (otce, {"max_iter": 0}, "max_iter must be >= 1, got 0"),
        (otce, {"tol": -1.0}, "tol must be a finite number > 0, got -1"),
    ],
)
def test_options_and_sources_name_bad_values(score, change, message):
    with pytest.raises(ValueError, match=message):
        score(**((GOOD_SOURCE if score is otce else {}) | GOOD | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p": torch.full((4,), 0.5)}, r"p must have shape \(B, C\), got shape \(4,\)"),
        ({"p": torch.ones(4, 2)}, r"rows of p must sum to 1, got a sum of 2 in shape \(4, 2\)"),
        ({"p": torch.full((4, 2), math.nan)}, r"p must be finite, got nan in shape \(4, 2\)"),
        ({"p": torch.zeros(0, 2), "y": NONE}, r"at least one row, got shape \(0, 2\)"),
        ({"y": torch.tensor([0, 1, 0])}, r"y must have shape \(4,\), got shape \(3,\)"),
        ({"y": torch.tensor([0, 1, -1, 0])}, "y must lie in"),
        ({"y": torch.tensor([1, 1, 1, 1])}, r"at least 2 classes, got class 1 alone in shape \(4,\)"),
    ],
)
def test_nce_names_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        nce(**({"p": torch.full((4, 2), 0.5), "y": GOOD["y"]} | change))
