"""What a view says of held-out samples is what a bridge says that never saw them."""

import pytest
import torch

from pipeline.transport.bridge import fit_bridge
from pipeline.transport.centres import held_out, whitening


def embedded(count=40, width=6, *, classes=4, noise=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % classes
    centres = torch.randn(classes, width, generator=g)
    return centres[y] + noise * torch.randn(count, width, generator=g) + 3, y


def folds_of(y, folds=5):
    fold = torch.zeros_like(y)
    for k in range(int(y.max()) + 1):
        members = torch.nonzero(y == k)[:, 0]
        fold[members] = (torch.arange(len(members)) + k) % folds
    return fold


@pytest.mark.parametrize(("count", "width"), [(40, 60), (80, 12), (20, 20)], ids=["wide", "tall", "square"])
def test_held_out_equals_bridges_fitted_without_the_fold(count, width):
    features, y = embedded(count, width)
    found = held_out(features, y, 4)
    fold = folds_of(y)
    direct = torch.zeros(count, 4)
    for k in range(5):
        bridge = fit_bridge(
            "centres",
            logits=None,
            features=features[fold != k],
            labels=y[fold != k],
            num_classes=4,
            temperature=found.temperature,
            ridge=found.ridge,
        )
        direct[fold == k] = bridge.distribution(None, features[fold == k])
    assert found.rows.tolist() == list(range(count)) and torch.equal(found.y, y)
    torch.testing.assert_close(found.p, direct, atol=1e-5, rtol=1e-4)


def test_ridge_and_temperature_are_the_most_likely_of_all():
    features, y = embedded(60, 10, noise=2.0)
    found = held_out(features, y, 4)

    def likelihood(p):
        return float(p[torch.arange(60), y].log().mean())

    best = likelihood(found.p)
    for ridge in (0.01, 0.1, 1.0, 10.0):
        assert likelihood(held_out(features, y, 4, ridge=ridge).p) <= best + 1e-6


def test_the_bridge_takes_ridge_and_temperature_from_held_out_samples():
    features, y = embedded(60, 10)
    bridge = fit_bridge("centres", logits=None, features=features, labels=y, num_classes=4)
    found = held_out(features, y, 4)
    assert bridge.temperature == found.temperature
    torch.testing.assert_close(bridge.projection, whitening(features, found.ridge))
    torch.testing.assert_close(bridge.M, found.M, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(30, 50), (50, 30)], ids=["wide", "tall"])
def test_whitening_is_the_inverse_root_of_the_covariance(shape):
    features = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 3, shape[1])
    W = whitening(features.double(), 0.3)
    covariance = torch.cov(features.double().t(), correction=0)
    scale = covariance.trace() / min(shape[0] - 1, shape[1])
    root = covariance / scale + 0.3 * torch.eye(shape[1], dtype=torch.float64)
    torch.testing.assert_close(W @ root @ W, torch.eye(shape[1], dtype=torch.float64))


def test_the_only_sample_of_a_class_is_not_asked():
    features, y = embedded(21, 5)
    y = torch.where(torch.arange(21) == 20, 3, y % 3)
    found = held_out(features, y, 4)
    assert found.rows.tolist() == list(range(20)) and found.p.shape == (20, 4)


def test_an_unrelated_view_is_unsure_and_a_wide_one_is_not_sure_of_noise():
    _, y = embedded(40)
    noise = torch.randn(40, 200, generator=torch.Generator().manual_seed(3))
    assert float(held_out(noise, y, 4).p.amax(1).mean()) < 0.4


def test_features_that_do_not_vary_say_nothing():
    found = held_out(torch.ones(8, 3), torch.arange(8) % 2, 2)
    torch.testing.assert_close(found.p, torch.full((8, 2), 0.5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"folds": 1}, "folds must be >= 2, got 1"),
        ({"ridge": -1.0}, "ridge must be a finite number > 0, got -1"),
        ({"features": torch.full((8, 3), torch.nan)}, "features must be finite"),
        ({"labels": torch.zeros(8, dtype=torch.long)}, r"classes \[1\] have none"),
        ({"labels": torch.zeros(7, dtype=torch.long)}, r"must have shape \(8,\)"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"features": torch.randn(8, 3), "labels": torch.arange(8) % 2, "num_classes": 2} | change
    with pytest.raises(ValueError, match=message):
        held_out(**arguments)
