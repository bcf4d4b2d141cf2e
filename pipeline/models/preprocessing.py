"""What a net wants done to stored images, as a module of plain torch: batched, on any device, exportable."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from pipeline.models.spec import PreprocessingSpec

# ITU-R 601 luma, what PIL uses to convert RGB to grey.
_LUMA = (0.299, 0.587, 0.114)


class Preprocessing(nn.Module):
    r"""Channels, resize, crop, division by 255 and normalisation.

    .. math:: y_c = \frac{x_c / 255 - \mathrm{mean}_c}{\mathrm{std}_c}

    Parameters
    ----------
    spec : PreprocessingSpec
    dtype : torch.dtype
        Of the output; everything before is computed in float32.

    Notes
    -----
    ``forward`` maps images (B, C, H, W), uint8 or float in 0..255 with C of 1 or 3, to (B, channels, h, w). Nothing is
    rounded back to whole pixel values. Its constants are no part of the state dict.
    """

    scale: Tensor
    shift: Tensor
    luma: Tensor

    def __init__(self, spec: PreprocessingSpec, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.spec = spec
        self.dtype = dtype
        # One value a channel even where the file gives one for all: broadcasting against it then also repeats a grey
        # image for a net that wants three channels, after the resize instead of before it.
        mean = torch.tensor(spec.mean, dtype=torch.float64).expand(spec.channels).reshape(1, -1, 1, 1)
        std = torch.tensor(spec.std, dtype=torch.float64).expand(spec.channels).reshape(1, -1, 1, 1)
        self.register_buffer("scale", (1 / (255 * std)).float(), persistent=False)
        self.register_buffer("shift", (-mean / std).float(), persistent=False)
        self.register_buffer("luma", torch.tensor(_LUMA).reshape(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Map stored images to what the net wants.

        Raises
        ------
        ValueError
            On a shape other than (B, 1 or 3, H, W), or an integer type other than uint8.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images must be (B, 1 or 3, H, W), got {tuple(images.shape)}")
        if not (images.dtype == torch.uint8 or images.is_floating_point()):
            raise ValueError(f"images must be uint8 or float in 0..255, got {images.dtype}")
        x = images.to(torch.float32)
        if x.shape[1] == 3 and self.spec.channels == 1:
            x = (x * self.luma).sum(dim=1, keepdim=True)
        x = self._resized(x)
        return (x * self.scale + self.shift).to(self.dtype)

    def _resized(self, x: Tensor) -> Tensor:
        height, width = self.spec.side((x.shape[1], x.shape[2], x.shape[3]))
        crop = self.spec.crop or 1.0
        full = (round(height / crop), round(width / crop))
        if full != (x.shape[2], x.shape[3]):
            if self.spec.interpolation == "nearest":
                x = interpolate(x, full, mode="nearest-exact")
            else:
                x = interpolate(x, full, mode=self.spec.interpolation, align_corners=False, antialias=True)
            if self.spec.interpolation == "bicubic":
                x = x.clamp(0, 255)  # a cubic overshoots at edges
        if full != (height, width):
            top, left = (full[0] - height) // 2, (full[1] - width) // 2
            x = x[:, :, top : top + height, left : left + width]
        return x
