"""Adapters between nets of different architectures: learnt maps into a space that both share.

Shapes: B images; a feature map has C channels and H × W positions, a sequence L tokens of D, a vector D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_KINDS = {1: "D", 2: "L, D", 3: "C, H, W"}


def common_dim(channels_a: int, channels_b: int) -> int:
    """Return the number of channels of the space that two nets share: half of the smaller one's, at least 8.

    The rule is ours. It gives the published widths [1]_ for two ResNet-18s: [64, 64, 128, 256, 512] to
    [32, 32, 64, 128, 256].

    Raises
    ------
    ValueError
        For numbers below 1.

    References
    ----------
    .. [1] Shen et al., "Customizing student networks from heterogeneous teachers via adaptive knowledge amalgamation",
       ICCV 2019 (arXiv 1908.07121).
    """
    if min(channels_a, channels_b) < 1:
        raise ValueError(f"channels must be >= 1, got {channels_a} and {channels_b}")
    return max(min(channels_a, channels_b) // 2, 8)


def same_positions(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Resize two feature maps (B, C, H, W) bilinearly to the smaller height and the smaller width of both."""
    size = [min(pair) for pair in zip(a.shape[2:], b.shape[2:], strict=True)]
    return _resized(a, size), _resized(b, size)


def _resized(x: Tensor, size: list[int]) -> Tensor:
    if list(x.shape[2:]) == size:
        return x
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


class CommonSpace(nn.Module):
    """Where a net and a source of knowledge meet at one feature point.

    1×1 convolutions without bias, A of the net's features and B of the source's; the loss of an image is the mean of
    (A F_net − B F_source)² over channels and positions [1]_. Without the source's side it is (A F_net − F_source)²,
    onto raw features.

    The larger map is resized to the smaller one, before the convolution, with which it commutes. Vectors take a
    linear map; where either side is no feature map, the other is averaged over its positions or tokens. This, and
    rows of B that start with norm 1, is ours.

    Parameters
    ----------
    net_shape, source_shape : tuples
        Of the features without the batch: (C, H, W), (L, D) or (D,).
    source_side
        Whether the source has a convolution of its own.

    Raises
    ------
    ValueError
        For features that are neither maps, nor sequences, nor vectors.

    References
    ----------
    .. [1] Shen et al., "Customizing student networks from heterogeneous teachers via adaptive knowledge amalgamation",
       ICCV 2019 (arXiv 1908.07121).
    """

    def __init__(self, net_shape: Sequence[int], source_shape: Sequence[int], *, source_side: bool = True) -> None:
        super().__init__()
        self.ndims = _ndim("net", net_shape), _ndim("source", source_shape)
        self.maps = self.ndims == (3, 3)
        mine, theirs = (shape[0] if len(shape) == 3 else shape[-1] for shape in (net_shape, source_shape))
        dim = common_dim(mine, theirs) if source_side else theirs
        self.net = self._map(mine, dim)
        self.source: nn.Conv2d | nn.Linear | None = None
        if source_side:
            self.source = self._map(theirs, dim)
            with torch.no_grad():
                self.source.weight.copy_(F.normalize(torch.randn_like(self.source.weight), dim=1))

    def _map(self, channels: int, dim: int) -> nn.Conv2d | nn.Linear:
        if self.maps:
            return nn.Conv2d(channels, dim, 1, bias=False)
        return nn.Linear(channels, dim, bias=False)

    def forward(self, net: Tensor, source: Tensor) -> Tensor:
        """Return the mean square of each image.

        Parameters
        ----------
        net : (B, *net_shape) tensor
            Height, width and number of tokens may differ from those of `net_shape`.
        source : (B, *source_shape) tensor
            No gradient flows to it.

        Returns
        -------
        (B,) tensor

        Raises
        ------
        ValueError
            For features of another kind, and batches of different sizes.
        """
        if (net.ndim - 1, source.ndim - 1) != self.ndims or len(net) != len(source):
            expected = " and ".join(f"(B, {_KINDS[ndim]})" for ndim in self.ndims)
            raise ValueError(
                f"net and source must have shapes {expected} with one B, got "
                f"{tuple(net.shape)} and {tuple(source.shape)}"
            )
        # Either may have run in half precision.
        net, source = net.to(self.net.weight.dtype), source.detach().to(self.net.weight.dtype)
        if self.maps:
            net, source = same_positions(net, source)
        else:
            net, source = _vectors(net), _vectors(source)
        if self.source is not None:
            source = self.source(source)
        mine: Tensor = self.net(net)
        mine, source = _at_least_single(mine), _at_least_single(source)
        return (mine - source).square().flatten(1).mean(1)

    def penalty(self) -> Tensor:
        """Return mean_o (‖B_o‖² − 1)² over the rows o of the source's side; 0 where it has none.

        Without it, A = 0 and B = 0 is the best that both can do. With features that stay fixed, a row of B ends at
        ‖B_o‖² = 1 − λ/2 at equal weights, λ the least mean square that A leaves unexplained of a row of norm 1: for
        λ ≥ 2 it still goes to 0.
        """
        if self.source is None:
            return self.net.weight.new_zeros(())
        return (self.source.weight.flatten(1).square().sum(1) - 1).square().mean()


def _ndim(name: str, shape: Sequence[int]) -> int:
    if len(shape) not in _KINDS or min(shape) < 1:
        raise ValueError(f"{name} features must have shape (C, H, W), (L, D) or (D,), got {tuple(shape)}")
    return len(shape)


def _vectors(x: Tensor) -> Tensor:
    return x.flatten(2).mean(2) if x.ndim == 4 else x.mean(1) if x.ndim == 3 else x


def _at_least_single(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Adapters(nn.Module):
    """All that is learnt between a net and one source of knowledge, and dropped after the training.

    Parameters
    ----------
    points : sequence of (net_shape, source_shape)
        Of each feature point, see `CommonSpace`; may be empty.
    source_side
        Whether the source has convolutions of its own.

    Attributes
    ----------
    logit_scale : (1,) tensor
        m, learnt, 1 at the start.
    """

    def __init__(self, points: Sequence[tuple[Sequence[int], Sequence[int]]] = (), *, source_side: bool = True) -> None:
        super().__init__()
        self.points = nn.ModuleList([CommonSpace(net, source, source_side=source_side) for net, source in points])
        self.logit_scale = nn.Parameter(torch.ones(1))

    def features(self, net: Sequence[Tensor], source: Sequence[Tensor]) -> Tensor:
        """Return Σ over the feature points of the mean square of each image (B,); one tensor a point on either side."""
        each = [point(mine, theirs) for point, mine, theirs in zip(self.points, net, source, strict=True)]
        return torch.stack(each).sum(0)

    def logits(self, net: Tensor, source: Tensor) -> Tensor:
        """Return the mean over classes of (m z_net − z_source)² of each image (B,).

        Parameters
        ----------
        net, source : (B, C) tensors
            Logits of the same classes. No gradient flows to those of the source.

        Raises
        ------
        ValueError
            For shapes that do not match.
        """
        if net.ndim != 2 or net.shape != source.shape:
            raise ValueError(f"logits must have one shape (B, C), got {tuple(net.shape)} and {tuple(source.shape)}")
        return (self.logit_scale * net - _at_least_single(source.detach())).square().mean(1)

    def penalty(self) -> Tensor:
        """Return Σ over the feature points of mean_o (‖B_o‖² − 1)², see `CommonSpace.penalty`."""
        total = self.logit_scale.new_zeros(())
        for point in self.points:
            assert isinstance(point, CommonSpace)
            total = total + point.penalty()
        return total
