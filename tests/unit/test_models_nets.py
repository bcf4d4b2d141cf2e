from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.models import nets
from pipeline.models.student import NETS


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(("channels", "side"), [(1, 28), (3, 32), (1, 8)])
def test_logits_are_the_classifier_of_the_features(name: str, channels: int, side: int) -> None:
    net = getattr(nets, name)(num_classes=7, in_channels=channels).eval()
    x = torch.randn(4, channels, side, side)
    features = net.features(x)
    assert isinstance(net.classifier, nn.Linear)
    assert features.shape == (4, net.classifier.in_features)
    assert net(x).shape == (4, 7)
    torch.testing.assert_close(net(x), features @ net.classifier.weight.T + net.classifier.bias)


@pytest.mark.parametrize("name", NETS)
def test_width_makes_a_net_wider(name: str) -> None:
    narrow, wide = (getattr(nets, name)(4, width=width) for width in (8, 16))
    assert wide.classifier.in_features == 2 * narrow.classifier.in_features


@pytest.mark.parametrize("name", NETS)
def test_every_parameter_takes_part(name: str) -> None:
    net = getattr(nets, name)(3, width=8)
    net(torch.randn(6, 1, 28, 28)).square().sum().backward()
    assert not [key for key, value in net.named_parameters() if value.grad is None or not value.grad.any()]


@pytest.mark.parametrize(("name", "layers"), [("resnet8", 8), ("resnet14", 14), ("resnet20", 20)])
def test_a_resnet_has_the_layers_of_its_name(name: str, layers: int) -> None:
    modules = getattr(nets, name)(10).named_modules()
    counted = [m for key, m in modules if isinstance(m, (nn.Conv2d, nn.Linear)) and "shortcut" not in key]
    assert len(counted) == layers


def test_the_default_student_is_small() -> None:
    assert 30_000 <= sum(p.numel() for p in nets.small_cnn(10).parameters()) <= 60_000


@pytest.mark.parametrize("argument", ["num_classes", "in_channels", "width"])
def test_sizes_below_one_are_refused(argument: str) -> None:
    with pytest.raises(ValueError, match=f"{argument} must be >= 1, got 0"):
        nets.SmallCNN(**{"num_classes": 2, argument: 0})
