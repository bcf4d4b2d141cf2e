"""Small nets for images of about 28 to 32 pixels, of unlike architectures.

Every net is ``Net(num_classes, in_channels=1, width=...)``; ``features(x)`` maps preprocessed images (B, in_channels,
H, W) to penultimate features (B, D), ``classifier`` is the ``nn.Linear`` from D to num_classes that follows, and the
named stages can serve as taps. They take images of any size from 8 pixels on.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

__all__ = [
    "MLP",
    "ResNet",
    "SmallCNN",
    "SmallMobileNet",
    "SmallVGG",
    "mlp",
    "resnet8",
    "resnet14",
    "resnet20",
    "small_cnn",
    "small_mobilenet",
    "small_vgg",
]


def _check(num_classes: int, in_channels: int, width: int) -> None:
    for name, value in (("num_classes", num_classes), ("in_channels", in_channels), ("width", width)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")


def _conv_block(inputs: int, outputs: int, *, stride: int = 1, groups: int = 1, kernel: int = 3) -> nn.Sequential:
    """Build convolution, batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class _Net(nn.Module):
    """What all nets share: features, then the classifier."""

    classifier: nn.Linear

    def features(self, x: Tensor) -> Tensor:
        """Map images (B, in_channels, H, W) to features (B, D)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, in_channels, H, W) to logits (B, num_classes)."""
        return self.classifier(self.features(x))


class SmallCNN(_Net):
    """Three convolutions, of which the first two stride; made to be fast on one CPU core.

    Parameters
    ----------
    num_classes, in_channels : int
    width : int
        Channels of the first stage; the others have 2 and 4 times as many, which is D.

    Notes
    -----
    Stages: ``stage1``, ``stage2``, ``stage3``. Striding instead of pooling halves the cost of a training step, because
    the cost of a small net on a CPU lies in the activations at high resolution.
    """

    def __init__(self, num_classes: int, in_channels: int = 1, width: int = 24) -> None:
        super().__init__()
        _check(num_classes, in_channels, width)
        self.stage1 = _conv_block(in_channels, width, stride=2)
        self.stage2 = _conv_block(width, 2 * width, stride=2)
        self.stage3 = _conv_block(2 * width, 4 * width)
        self.classifier = nn.Linear(4 * width, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Map images (B, in_channels, H, W) to features (B, 4 width)."""
        return self.stage3(self.stage2(self.stage1(x))).mean(dim=(2, 3))


class MLP(_Net):
    """Two hidden layers on a grid of averaged pixels.

    Parameters
    ----------
    num_classes, in_channels : int
    width : int
        Units of each hidden layer, which is D.
    grid : int
        Images of another size are averaged to grid × grid first, so that the net takes any size.

    Notes
    -----
    Stages: ``stage1``, ``stage2``.
    """

    def __init__(self, num_classes: int, in_channels: int = 1, width: int = 128, grid: int = 14) -> None:
        super().__init__()
        _check(num_classes, in_channels, width)
        self.pool = nn.AdaptiveAvgPool2d(grid)
        self.stage1 = nn.Sequential(
            nn.Linear(in_channels * grid * grid, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)
        )
        self.stage2 = nn.Sequential(nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True))
        self.classifier = nn.Linear(width, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Map images (B, in_channels, H, W) to features (B, width)."""
        return self.stage2(self.stage1(self.pool(x).flatten(1)))


class SmallVGG(_Net):
    """Two convolutions a stage, three stages, in the manner of VGG (Simonyan and Zisserman, 2015) with batch norm.

    Parameters
    ----------
    num_classes, in_channels : int
    width : int
        Channels of the first stage; the others have 2 and 4 times as many, which is D.

    Notes
    -----
    Stages: ``stage1``, ``stage2``, ``stage3``.
    """

    def __init__(self, num_classes: int, in_channels: int = 1, width: int = 16) -> None:
        super().__init__()
        _check(num_classes, in_channels, width)
        channels = (in_channels, width, 2 * width, 4 * width)
        self.stage1, self.stage2, self.stage3 = (
            nn.Sequential(_conv_block(inputs, outputs), _conv_block(outputs, outputs), nn.MaxPool2d(2))
            for inputs, outputs in pairwise(channels)
        )
        self.classifier = nn.Linear(4 * width, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Map images (B, in_channels, H, W) to features (B, 4 width)."""
        return self.stage3(self.stage2(self.stage1(x))).mean(dim=(2, 3))


class _BasicBlock(nn.Module):
    """Two convolutions and a shortcut; the shortcut is a 1 × 1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv_block(inputs, outputs, stride=stride)
        self.conv2 = nn.Sequential(nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv2(self.conv1(x)) + self.shortcut(x))


class ResNet(_Net):
    """Residual net for small images (He et al., 2016, section 4.2): three stages of `blocks` basic blocks.

    Parameters
    ----------
    num_classes, in_channels : int
    width : int
        Channels of the first stage; the others have 2 and 4 times as many, which is D.
    blocks : int
        Blocks of each stage; the net has 6 `blocks` + 2 layers.

    Notes
    -----
    Stages: ``stem``, ``stage1``, ``stage2``, ``stage3``.
    """

    def __init__(self, num_classes: int, in_channels: int = 1, width: int = 16, blocks: int = 1) -> None:
        super().__init__()
        _check(num_classes, in_channels, width)
        if blocks < 1:
            raise ValueError(f"blocks must be >= 1, got {blocks}")
        self.stem = _conv_block(in_channels, width)
        self.stage1 = self._stage(width, width, blocks, stride=1)
        self.stage2 = self._stage(width, 2 * width, blocks, stride=2)
        self.stage3 = self._stage(2 * width, 4 * width, blocks, stride=2)
        self.classifier = nn.Linear(4 * width, num_classes)

    @staticmethod
    def _stage(inputs: int, outputs: int, blocks: int, *, stride: int) -> nn.Sequential:
        first = _BasicBlock(inputs, outputs, stride)
        return nn.Sequential(first, *(_BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))

    def features(self, x: Tensor) -> Tensor:
        """Map images (B, in_channels, H, W) to features (B, 4 width)."""
        return self.stage3(self.stage2(self.stage1(self.stem(x)))).mean(dim=(2, 3))


class SmallMobileNet(_Net):
    """Depthwise separable convolutions (Howard et al., 2017): few parameters, little arithmetic.

    Parameters
    ----------
    num_classes, in_channels : int
    width : int
        Channels of the stem; the stages have 2, 4 and 8 times as many, the last of which is D.

    Notes
    -----
    Stages: ``stem``, ``stage1``, ``stage2``, ``stage3``.
    """

    def __init__(self, num_classes: int, in_channels: int = 1, width: int = 16) -> None:
        super().__init__()
        _check(num_classes, in_channels, width)
        self.stem = _conv_block(in_channels, width)
        channels = (width, 2 * width, 4 * width, 8 * width)
        self.stage1, self.stage2, self.stage3 = (
            nn.Sequential(_conv_block(inputs, inputs, stride=2, groups=inputs), _conv_block(inputs, outputs, kernel=1))
            for inputs, outputs in pairwise(channels)
        )
        self.classifier = nn.Linear(8 * width, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Map images (B, in_channels, H, W) to features (B, 8 width)."""
        return self.stage3(self.stage2(self.stage1(self.stem(x)))).mean(dim=(2, 3))


def small_cnn(num_classes: int, in_channels: int = 1, width: int = 24) -> SmallCNN:
    """Build a `SmallCNN`."""
    return SmallCNN(num_classes, in_channels, width)


def mlp(num_classes: int, in_channels: int = 1, width: int = 128, grid: int = 14) -> MLP:
    """Build an `MLP`."""
    return MLP(num_classes, in_channels, width, grid)


def small_vgg(num_classes: int, in_channels: int = 1, width: int = 16) -> SmallVGG:
    """Build a `SmallVGG`."""
    return SmallVGG(num_classes, in_channels, width)


def small_mobilenet(num_classes: int, in_channels: int = 1, width: int = 16) -> SmallMobileNet:
    """Build a `SmallMobileNet`."""
    return SmallMobileNet(num_classes, in_channels, width)


def resnet8(num_classes: int, in_channels: int = 1, width: int = 16) -> ResNet:
    """Build a `ResNet` of 8 layers."""
    return ResNet(num_classes, in_channels, width, blocks=1)


def resnet14(num_classes: int, in_channels: int = 1, width: int = 16) -> ResNet:
    """Build a `ResNet` of 14 layers."""
    return ResNet(num_classes, in_channels, width, blocks=2)


def resnet20(num_classes: int, in_channels: int = 1, width: int = 16) -> ResNet:
    """Build a `ResNet` of 20 layers."""
    return ResNet(num_classes, in_channels, width, blocks=3)
