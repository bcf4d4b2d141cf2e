"""Nets of the benchmark's zoo that come from PyPI."""

from __future__ import annotations

from torch import nn


def efficientnet_lite(number: int) -> nn.Module:
    """Build an EfficientNet-Lite as the PyPI package efficientnet-lite-pytorch defines it."""
    from efficientnet_lite_pytorch import EfficientNet

    return EfficientNet.from_name(f"efficientnet-lite{number}")
