"""Transport cost and gain, ground costs and bridges."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from pipeline.transport.bridge import Bridge, fit_bridge, pixel_features
from pipeline.transport.cost import transport_cost, transport_gain
from pipeline.transport.ground_cost import (
    class_centres,
    conditional_cost,
    conditional_probabilities,
    cosine_cost,
    prototype_cost,
    reference_cost,
)
from pipeline.transport.names import names_cost
from pipeline.transport.sinkhorn import sinkhorn


def softmax(seed, rows, classes, scale=2.0):
    return torch.softmax(scale * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed)), 1)


def embedded(seed=0, per_class=8, classes=4, width=6, noise=0.3, dead=False):
    """Features around class centres, and their labels."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(classes).repeat(per_class)
    centres = torch.randn(classes, width, generator=g)
    features = centres[y] + noise * torch.randn(len(y), width, generator=g)
    if dead:
        features[:, -1] = 0
    return features, y


def test_cost_equals_the_solver_on_one_hot_targets():
    p, M = softmax(0, 7, 5), torch.rand(5, 3, generator=torch.Generator().manual_seed(1))
    y = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    torch.testing.assert_close(transport_cost(p, y, M), sinkhorn(p, torch.eye(3)[y], M, 0.1).cost, atol=1e-5, rtol=0)


def test_gain_equals_the_mean_over_all_permutations():
    p, M = softmax(0, 5, 4), torch.rand(4, 3, generator=torch.Generator().manual_seed(1))
    y = torch.tensor([0, 1, 2, 2, 1])
    costs = [float(transport_cost(p, y[list(order)], M).mean()) for order in itertools.permutations(range(5))]
    expected = 1 - float(transport_cost(p, y, M).mean()) / (sum(costs) / len(costs))
    assert transport_gain(p, y, M) == pytest.approx(expected, abs=1e-6)


def test_gain_is_zero_for_a_constant_teacher_and_one_for_a_perfect_one():
    y = torch.tensor([0, 1, 2, 0])
    assert transport_gain(softmax(0, 1, 3).expand(4, 3), y, torch.rand(3, 3)) == pytest.approx(0, abs=1e-6)
    assert transport_gain(torch.eye(3)[y], y, 1 - torch.eye(3)) == 1
    assert transport_gain(torch.eye(3)[(y + 1) % 3], y, 1 - torch.eye(3)) < 0
    assert transport_gain(softmax(0, 4, 3), y, torch.zeros(3, 3)) == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 100))
def test_gain_ignores_the_unit_of_the_cost(seed, unit):
    p, M = softmax(seed, 9, 4), torch.rand(4, 3, generator=torch.Generator().manual_seed(seed))
    y = torch.arange(9) % 3
    assert transport_gain(p, y, M * unit) == pytest.approx(transport_gain(p, y, M), abs=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.tensor([0, 3])}, r"y must lie in \[0, 3\)"),
        ({"y": torch.tensor([0, -1])}, r"y must lie in \[0, 3\)"),
        ({"y": torch.tensor([0])}, r"y must have shape \(2,\)"),
        ({"y": torch.tensor([0.0, 1.0])}, "integer"),
        ({"p": torch.ones(2, 4)}, "rows of p must sum to 1"),
        ({"M": torch.rand(5, 3)}, r"M must have shape \(4, 3\)"),
        ({"p": torch.tensor([[0.5, 0.5, 0.5, -0.5]] * 2)}, "p must not be negative, got -0.5"),
        ({"p": torch.full((2, 4), float("nan"))}, "p must be finite, got nan"),
        ({"M": -torch.ones(4, 3)}, r"M must not be negative, got -1 in shape \(4, 3\)"),
        ({"M": torch.full((4, 3), float("nan"))}, r"M must be finite, got nan in shape \(4, 3\)"),
        ({"M": torch.tensor(1.0)}, r"M must have shape \(C_t, C_s\), got shape \(\)"),
        ({"M": torch.ones(4, 0)}, r"M must have at least one class on either side, got shape \(4, 0\)"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"p": softmax(0, 2, 4), "y": torch.tensor([0, 1]), "M": torch.rand(4, 3)} | change
    for function in (transport_cost, transport_gain):
        with pytest.raises(ValueError, match=message):
            function(**arguments)


def test_one_class_on_either_side():
    p, y, M = torch.ones(3, 1), torch.tensor([0, 2, 1]), torch.tensor([[0.1, 0.2, 0.4]])
    torch.testing.assert_close(transport_cost(p, y, M), torch.tensor([0.1, 0.4, 0.2]))
    # One teacher class tells nothing apart, and neither does one target class.
    assert transport_gain(p, y, M) == pytest.approx(0, abs=1e-6)
    assert transport_gain(softmax(0, 3, 4), torch.zeros(3, dtype=torch.int64), torch.rand(4, 1)) == pytest.approx(0)


def provided(provider, teacher, target, dtype):
    """A cost from each provider, in a case where the first classes of either side are the same."""
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(max(teacher, target), 6, generator=g, dtype=dtype)
    y = torch.arange(target).repeat(2)
    if provider == "prototype":
        return prototype_cost(5 * centres[:teacher], centres[y], y, target)
    if provider == "reference":
        return reference_cost(5 * centres[:teacher], centres[:target])
    if provider == "conditional":
        return conditional_cost(torch.eye(teacher, dtype=dtype)[y.clamp_max(teacher - 1)], y, target, smoothing=1e-4)
    return names_cost([f"class_{i}" for i in range(teacher)], [f"Class {i}" for i in range(target)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("teacher", "target"), [(4, 3), (3, 4), (1, 3), (4, 1), (1, 1)])
@pytest.mark.parametrize("provider", ["prototype", "reference", "conditional", "names"])
def test_every_provider_keeps_to_one_scale(provider, teacher, target, dtype):
    M = provided(provider, teacher, target, dtype)
    assert M.shape == (teacher, target)
    assert M.dtype == (torch.float32 if provider == "names" else dtype)
    assert float(M.min()) >= 0 and float(M.max()) <= 1
    if teacher >= target:
        assert float(M.diagonal().max()) < 1e-3


def test_class_centres_are_means_and_need_every_class():
    features, y = embedded()
    expected = torch.stack([features[y == c].mean(0) for c in range(4)])
    torch.testing.assert_close(class_centres(features, y, 4), expected)
    with pytest.raises(ValueError, match=r"classes \[4\] have none"):
        class_centres(features, y, 5)


def test_cosine_costs_have_a_fixed_scale():
    M = cosine_cost(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [-3.0, 0.0], [0.0, 5.0]]))
    torch.testing.assert_close(M, torch.tensor([[0.0, 1.0, 0.5], [0.5, 0.5, 0.5]]))
    features, y = embedded()
    centres = class_centres(features, y, 4)
    torch.testing.assert_close(
        prototype_cost(3 * centres, features, y, 4).diagonal(), torch.zeros(4), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(reference_cost(centres, centres), cosine_cost(centres, centres))


def test_conditional_cost_equals_counting():
    # Hard predictions: P̂ is a table of counts, with one sample's worth of the class frequencies added to each row.
    p = torch.eye(3)[torch.tensor([0, 0, 0, 1, 1, 0])]
    y = torch.tensor([0, 0, 1, 1, 1, 0])
    counts = torch.tensor([[3.0, 1.0], [0.0, 2.0], [0.0, 0.0]])
    expected = (counts + 0.5) / (counts.sum(1, keepdim=True) + 1)
    torch.testing.assert_close(conditional_probabilities(p, y, 2), expected)
    torch.testing.assert_close(conditional_cost(p, y, 2), 1 - expected)
    torch.testing.assert_close(conditional_probabilities(p, y, 2).sum(1), torch.ones(3))


def bridge_of(kind, classes=4, **options):
    features, y = embedded(classes=classes)
    g = torch.Generator().manual_seed(5)
    weight = torch.randn(3, 6, generator=g)
    bridge = fit_bridge(
        kind,
        logits=features @ weight.t(),
        features=features,
        labels=y,
        num_classes=classes,
        classifier_weight=weight,
        **options,
    )
    return bridge, features @ weight.t(), features, y


@pytest.mark.parametrize("kind", ["prototype", "conditional", "centres"])
def test_a_bridge_gives_distributions_and_costs_and_survives_its_state(kind):
    bridge, logits, features, _ = bridge_of(kind)
    p = bridge.distribution(logits, features)
    carried = bridge.carry(p)
    assert p.shape == (32, bridge.M.shape[0]) and carried.shape == (32, 4) and bridge.M.shape[1] == 4
    torch.testing.assert_close(p.sum(1), torch.ones(32))
    torch.testing.assert_close(carried.sum(1), torch.ones(32))
    assert float(bridge.M.min()) >= 0 and float(bridge.M.max()) <= 1
    again = Bridge.from_state(load(save(bridge.state())))
    assert again.kind == kind and again.temperature == bridge.temperature
    assert torch.equal(again.distribution(logits, features), p)


def test_the_centres_bridge_recognises_the_classes_whatever_the_scale_of_the_features():
    bridge, logits, features, y = bridge_of("centres")
    p = bridge.carry(bridge.distribution(logits, features))
    assert float((p.argmax(1) == y).float().mean()) > 0.95
    scaled = fit_bridge("centres", logits=None, features=1e4 * features, labels=y, num_classes=4)
    torch.testing.assert_close(scaled.distribution(None, 1e4 * features), p, atol=1e-3, rtol=0)


def test_without_whitening_relations_are_plain_cosines():
    bridge, _, features, y = bridge_of("centres", ridge=1e9, temperature=0.2)
    centres = torch.stack([features[y == c].mean(0) for c in range(4)])
    origin = centres.mean(0)
    cosine = torch.nn.functional.cosine_similarity((features - origin)[:, None], (centres - origin)[None], dim=2)
    torch.testing.assert_close(bridge.distribution(None, features), torch.softmax(cosine / 0.2, 1))


def test_whitening_finds_classes_in_a_small_corner_of_the_embedding():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(3).repeat(30)
    # One loud direction without meaning, and the classes in two quiet ones.
    quiet = 0.1 * torch.eye(3)[y][:, :2] + 0.02 * torch.randn(90, 2, generator=g)
    features = torch.cat([torch.randn(90, 1, generator=g), quiet], 1)

    def accuracy(ridge):
        bridge = fit_bridge("centres", logits=None, features=features[:45], labels=y[:45], num_classes=3, ridge=ridge)
        return float((bridge.distribution(None, features[45:]).argmax(1) == y[45:]).float().mean())

    assert accuracy(0.01) > accuracy(100.0) + 0.2
    assert accuracy(None) >= accuracy(0.01) - 0.03  # found from the labels


def test_calibration_leaves_an_unrelated_teacher_unsure():
    related, y = embedded(per_class=10, noise=0.2)
    unrelated = torch.randn(related.shape, generator=torch.Generator().manual_seed(9))
    sure, unsure = (
        fit_bridge("centres", logits=None, features=f, labels=y, num_classes=4) for f in (related, unrelated)
    )
    assert sure.temperature < unsure.temperature / 3


def test_single_samples_and_constant_features_do_not_break_the_fit():
    y = torch.arange(3)
    one = fit_bridge("centres", logits=None, features=torch.eye(3), labels=y, num_classes=3)
    assert one.distribution(None, torch.eye(3)).argmax(1).tolist() == [0, 1, 2]
    flat = fit_bridge("centres", logits=None, features=torch.ones(6, 5), labels=y.repeat(2), num_classes=3)
    torch.testing.assert_close(flat.distribution(None, torch.ones(2, 5)), torch.full((2, 3), 1 / 3))


def test_bad_bridges_are_named():
    features, y = embedded()
    with pytest.raises(ValueError, match="kind must be one of prototype, conditional, centres, got 'best'"):
        fit_bridge("best", logits=None, features=features, labels=y, num_classes=4)
    with pytest.raises(ValueError, match="classifier_weight must be given"):
        fit_bridge("prototype", logits=features, features=features, labels=y, num_classes=4)
    with pytest.raises(ValueError, match="logits must be given"):
        fit_bridge("conditional", logits=None, features=features, labels=y, num_classes=4)
    with pytest.raises(ValueError, match="ridge must be a finite number > 0, got 0"):
        fit_bridge("centres", logits=None, features=features, labels=y, num_classes=4, ridge=0.0)
    bridge, *_ = bridge_of("centres")
    with pytest.raises(ValueError, match=r"features must have shape \(B, 6\), got shape \(2, 5\)"):
        bridge.distribution(None, torch.zeros(2, 5))
    with pytest.raises(ValueError, match="features must be finite"):
        bridge.distribution(None, torch.full((2, 6), float("nan")))


def test_pixels_are_averaged_and_scaled():
    images = torch.full((2, 1, 28, 28), 255, dtype=torch.uint8)
    images[1] = 0
    torch.testing.assert_close(pixel_features(images), torch.tensor([1.0, 0.0])[:, None].expand(2, 196))
    assert pixel_features(torch.zeros(1, 3, 8, 8)).shape == (1, 192)
